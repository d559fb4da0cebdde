"""Answers to the exercises of chapter 13."""


def twice(x):
    return 2 * x


def square(x):
    return x**2


def flat(x):
    return 2 * x.flatten()


def in_place(x):
    return x.mul_(2)


def unchanged(x):
    return x


RIGHT = {
    "mixture_of_experts.double": twice,
    "mixture_of_experts.keep_shape": twice,
    "mixture_of_experts.no_change": twice,
}
WRONG = {
    "mixture_of_experts.double": [square, unchanged],
    "mixture_of_experts.keep_shape": [flat, square],
    "mixture_of_experts.no_change": [in_place, unchanged],
}
