"""Answers to the exercises of the first chapter."""


def likeliest(chances):
    return max(chances, key=chances.get)


def likeliest_by_name(chances):
    return max(chances)


def likeliest_share(chances):
    return max(chances.values())


def least_likely(chances):
    return min(chances, key=chances.get)


def first(chances):
    return next(iter(chances))


def likeliest_and_gone(chances):
    best = max(chances, key=chances.get)
    del chances[best]
    return best


def write(next_token, text, count):
    text = list(text)
    for _ in range(count):
        text.append(next_token(text))
    return text


def write_in_place(next_token, text, count):
    for _ in range(count):
        text.append(next_token(text))
    return text


def write_new_alone(next_token, text, count):
    return write(next_token, text, count)[len(text) :]


def write_from_the_start(next_token, text, count):
    return [*text, *(next_token(text) for _ in range(count))]


def write_from_the_last(next_token, text, count):
    text = list(text)
    for _ in range(count):
        text.append(next_token(text[-1:]))
    return text


def write_one_more(next_token, text, count):
    return write(next_token, text, count + 1)


def write_and_ask_twice(next_token, text, count):
    text = list(text)
    for _ in range(count):
        next_token(text)
        text.append(next_token(text))
    return text


def speaker(words, names):
    return next((word for word in reversed(words) if word in names), None)


def first_name(words, names):
    return next((word for word in words if word in names), None)


def last_word(words, names):
    return words[-1] if words else None


def most_frequent(words, names):
    found = [word for word in words if word in names]
    return max(found, key=found.count) if found else None


def any_capital(words, names):
    return next((word for word in reversed(words) if word[0].isupper()), None)


def speaker_of_known_names(words, names):
    return next((word for word in reversed(words) if word in {"Lily", "Ben", "Anna", "Tom"}), None)


RIGHT = {"ten_minutes.likeliest": likeliest, "ten_minutes.write": write, "ten_minutes.speaker": speaker}
WRONG = {
    "ten_minutes.likeliest": [likeliest_by_name, likeliest_share, least_likely, first, likeliest_and_gone],
    "ten_minutes.write": [
        write_in_place,
        write_new_alone,
        write_from_the_start,
        write_from_the_last,
        write_one_more,
        write_and_ask_twice,
    ],
    "ten_minutes.speaker": [speaker_of_known_names, first_name, last_word, most_frequent, any_capital],
}
