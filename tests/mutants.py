"""Wrong answers made by the dozen: every small change of a right answer's source, one at a time.

:func:`mutants` parses the file of a right answer, follows it into its helpers, and yields each change as a label and a
function that builds the changed answer. What changes: an operator, a comparison, a constant (an axis, a bound, a
factor), an operand or a call that is left out, arguments in another order, a quotient that is rounded another way, a
softmax without its maximum or with one maximum for all rows, an axis that is forgotten, a sort that is turned round, a
statement that is missing, a condition that always or never holds, a loop that begins late or ends early, what is joined
in another order, a size that is remembered from the first call, and an argument that the answer ignores or takes for
another. Besides, the right answer's results are changed: flipped, shortened, rounded, remembered from an earlier call.
"""

import ast
import copy
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from types import ModuleType

import torch

Change = tuple[str, ast.AST]
ROOT = "_answer"
BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
BINARY |= {ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
BINARY |= {ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr}
ORDERED = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.MatMult, ast.Pow)
COMPARED = {ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE)}
COMPARED |= {ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE)}
COMPARED |= {ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,)}
COMPARED |= {ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,)}
CALLED = {"max": "min", "min": "max", "amax": "amin", "amin": "amax", "maximum": "minimum", "minimum": "maximum"}
CALLED |= {"tril": "triu", "triu": "tril", "sum": "mean", "mean": "sum", "sin": "cos", "cos": "sin", "any": "all"}
CALLED |= {"all": "any", "floor": "ceil", "ceil": "floor", "sorted": "list", "argmax": "argmin", "cumsum": "flip"}
CALLED |= {"exp": "expm1", "log": "log1p", "log2": "log", "popleft": "pop", "zeros": "ones", "ones": "zeros"}
SYMMETRIC = {"transpose", "swapaxes", "min", "max", "allclose", "equal", "isclose", "maximum", "minimum", "logaddexp"}
NAIVE = {"softmax": "_naive_softmax", "log_softmax": "_naive_log_softmax", "logsumexp": "_naive_logsumexp"}
ONE_MAXIMUM = {
    "softmax": "_one_max_softmax",
    "logsumexp": "_one_max_logsumexp",
    "logaddexp": "_one_max_logaddexp",
}
REDUCED = {"sum", "mean", "amax", "amin", "any", "all"}
TURNED = {"sort": "descending", "argsort": "descending", "sorted": "reverse"}


@dataclass(frozen=True)
class Mutant:
    """One change of a right answer.

    Attributes:
        label: stays the same from run to run.
        build: makes the changed answer.
        acts: not empty where the changed answer may give something else; a change of results notes when it did.
    """

    label: str
    build: Callable[[], Callable]
    acts: list = field(default_factory=lambda: [True])


def mutants(name: str, module: ModuleType) -> Iterator[Mutant]:
    """Every mutant of the right answer to the exercise ``name``, in the order of its source.

    Args:
        name: a key of the module's ``RIGHT``, whose value is a function, a class or an expression that makes one.
        module: where it stands.
    """
    answer = module.RIGHT[name]
    if getattr(answer, "__module__", None) not in (None, module.__name__):  # the exercise's own
        module, root = inspect.getmodule(answer), named(answer.__name__)
        tree = ast.parse(inspect.getsource(module))
    else:
        tree = ast.parse(inspect.getsource(module))
        root = answer_node(tree, name, answer)
    for definition in tree.body:
        if isinstance(definition, ast.FunctionDef) and definition.name == answer.__name__:
            Settled(definition).visit(definition)
    tree = reachable(ast.Module([*tree.body, root], []), ROOT)
    yield Mutant("its numbers are NaN", lambda: nan_of(answer))
    yield from wrong_results(answer)
    seen = set()
    for definition in tree.body:
        if isinstance(definition, (ast.Import, ast.ImportFrom)):
            continue
        is_answer = definition is root or (isinstance(root, ast.Assign) and show(root.value) == definition.name)
        for site in sites(definition, is_answer):
            label = site.label if definition is root else f"{definition.name}: {site.label}"
            if label not in seen:
                seen.add(label)
                yield Mutant(label, lambda site=site: site.build(tree, module))


def named(name: str) -> ast.Assign:
    """``ROOT`` as another name of something in the module."""
    return ast.parse(f"{ROOT} = {name}").body[0]


def answer_node(tree: ast.Module, name: str, answer: Callable) -> ast.AST:
    """A definition of ``ROOT`` as what the module's ``RIGHT`` holds under a name; a lambda becomes a function."""
    rights = next(n.value for n in tree.body if isinstance(n, ast.Assign) and show(n.targets[0]) == "RIGHT")
    if not isinstance(rights, ast.Dict):
        return named(answer.__name__)
    value = next(value for key, value in zip(rights.keys, rights.values, strict=True) if key.value == name)
    if isinstance(value, ast.Lambda):
        root = ast.parse(f"def {ROOT}(): pass").body[0]
        root.args, root.body = value.args, [ast.Return(value.body)]
    else:
        root = ast.Assign([ast.Name(ROOT, ast.Store())], value)
    return ast.copy_location(root, value)


def reachable(tree: ast.Module, name: str) -> ast.Module:
    """The part of a module that one of its functions or classes needs, in its order."""
    defined = {d.name: d for d in tree.body if isinstance(d, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            defined |= {n.id: node for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    found, queue = [], [name]
    while queue:
        node = defined.get(queue.pop())
        if node is not None and node not in found:
            found.append(node)
            queue += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    kept = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) or node in found]
    return ast.Module(kept, [])


class Settled(ast.NodeTransformer):
    """Put the defaults of an answer's options in their places, and leave out the branches that they never take.

    The exercise does not know these options: the files of answers make wrong answers of right ones by them.
    """

    def __init__(self, function: ast.FunctionDef):
        arguments = function.args
        last = arguments.args[len(arguments.args) - len(arguments.defaults) :]
        pairs = [*zip(last, arguments.defaults, strict=True)]
        pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None]
        self.values = {a.arg: default for a, default in pairs}
        assigned = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.values = {name: value for name, value in self.values.items() if name not in assigned}

    def visit_Name(self, node: ast.Name) -> ast.AST:
        value = self.values.get(node.id) if isinstance(node.ctx, ast.Load) else None
        return node if value is None else ast.copy_location(copy.deepcopy(value), node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        node = self.generic_visit(node)
        return node if known(node.test) is None else node.body if known(node.test) else node.orelse

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.AST]:
        node = self.generic_visit(node)
        return node if known(node.test) is None else node.body if known(node.test) else node.orelse

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        node = self.generic_visit(node)
        is_and = isinstance(node.op, ast.And)
        if any(known(value) is (not is_and) for value in node.values):  # False and ..., True or ...
            return ast.copy_location(ast.Constant(not is_and), node)
        kept = [value for value in node.values if known(value) is not is_and] or node.values[-1:]
        return kept[0] if len(kept) == 1 else ast.copy_location(ast.BoolOp(node.op, kept), node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        node = self.generic_visit(node)
        if isinstance(node.op, ast.Mult) and isinstance(node.left, ast.Constant) and node.left.value == 1:
            return node.right
        is_nothing = isinstance(node.op, ast.Add) and isinstance(node.right, ast.Constant) and node.right.value == 0
        return node.left if is_nothing else node


def known(test: ast.AST) -> bool | None:
    """Whether a condition of constants holds; None where it depends on something."""
    if any(isinstance(node, (ast.Name, ast.Call, ast.Attribute)) for node in ast.walk(test)):
        return None
    return bool(eval(compile(ast.fix_missing_locations(ast.Expression(test)), "", "eval")))


@dataclass(frozen=True)
class Site:
    """A place in a tree and what to put there."""

    owner: ast.AST
    field: str
    index: int | None
    new: object
    label: str

    def build(self, tree: ast.Module, module: ModuleType) -> Callable:
        """The changed answer; the tree is left as it was."""
        old = getattr(self.owner, self.field)
        if self.index is None:
            setattr(self.owner, self.field, self.new)
        else:
            setattr(self.owner, self.field, [*old[: self.index], *self.new, *old[self.index + 1 :]])
        try:
            code = compile(ast.fix_missing_locations(copy.deepcopy(tree)), module.__file__, "exec")
        finally:
            setattr(self.owner, self.field, old)
        space = {"__name__": module.__name__, "_at_first": _AtFirst(), **HELPERS}
        exec(code, space)
        return space[ROOT]


def sites(definition: ast.AST, is_answer: bool) -> Iterator[Site]:
    """Every change inside a function or class; arguments are ignored only where the exercise hands them over."""
    first = definition.lineno
    if is_answer and isinstance(definition, (ast.FunctionDef, ast.ClassDef)):
        yield from ignored_arguments(definition)
        yield from swapped_arguments(definition)
    defaults = {node for a in ast.walk(definition) if isinstance(a, ast.arguments) for node in defaults_of(a)}
    for owner in ast.walk(definition):
        if owner in defaults:  # the files of answers have options that the exercise does not know
            continue
        for part, value in ast.iter_fields(owner):
            if part in ("returns", "annotation", "decorator_list", "defaults", "kw_defaults"):
                continue
            for index, node in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(node, ast.AST):
                    continue
                at = index if isinstance(value, list) else None
                for label, new in changes(node, owner):
                    where = f"line {getattr(node, 'lineno', first) - first + 1}: {label}"
                    yield Site(owner, part, at, new if at is None else [new], where)


def defaults_of(arguments: ast.arguments) -> Iterator[ast.AST]:
    """Every node of the defaults of a function's options."""
    for default in (*arguments.defaults, *arguments.kw_defaults):
        yield from [] if default is None else ast.walk(default)


def show(node: ast.AST) -> str:
    """A node's source on one line."""
    return " ".join(ast.unparse(node).split())


def changes(node: ast.AST, owner: ast.AST) -> Iterator[Change]:
    """What may stand in a node's place."""
    for new in (*replacements(node, owner), *cut_loops(node, owner), *first_sizes(node)):
        before, after = show(node), "nothing" if isinstance(new, ast.Pass) else show(new)
        if before != after:
            yield f"{before} -> {after}", new


def replacements(node: ast.AST, owner: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.BinOp):
        yield from [ast.BinOp(node.left, BINARY[type(node.op)](), node.right)] if type(node.op) in BINARY else []
        yield from [ast.BinOp(node.right, node.op, node.left)] if isinstance(node.op, ORDERED) else []
        yield from rounded(node)
        yield from (node.left, node.right)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for op in COMPARED.get(type(node.ops[0]), ()):
            yield ast.Compare(node.left, [op()], node.comparators)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Invert, ast.Not, ast.USub)):
        yield node.operand
        inner = node.operand
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.FloorDiv) and isinstance(inner.left, ast.UnaryOp):
            yield ast.BinOp(inner.left.operand, ast.FloorDiv(), inner.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.Constant):
        yield from constants(node, owner)
    elif isinstance(node, ast.Call):
        yield from calls(node)
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse, ast.IfExp(node.test, node.orelse, node.body))
    elif isinstance(node, ast.If):
        for value in (True, False):
            yield ast.If(ast.Constant(value), node.body, node.orelse)
    elif isinstance(node, ast.Slice):
        for part in ("lower", "upper", "step"):
            if getattr(node, part) is not None:
                yield ast.Slice(**{p: None if p == part else getattr(node, p) for p in ("lower", "upper", "step")})
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield ast.comprehension(node.target, node.iter, [], node.is_async)
    elif isinstance(node, ast.AugAssign):
        yield ast.Pass()
        if type(node.op) in BINARY:
            yield ast.AugAssign(node.target, BINARY[type(node.op)](), node.value)
    elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
        yield ast.Pass()
    elif isinstance(node, ast.Assign):
        yield from [ast.Pass()] if isinstance(owner, (ast.For, ast.While, ast.If)) else []
    elif isinstance(node, ast.Break):
        yield ast.Continue()
    elif isinstance(node, ast.Continue):
        yield ast.Break()
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield node.value
    elif isinstance(node, (ast.List, ast.Tuple)) and isinstance(node.ctx, ast.Load) and len(node.elts) > 1:
        yield type(node)(node.elts[::-1], ast.Load())
        yield type(node)([*node.elts[1:], node.elts[0]], ast.Load())


def rounded(node: ast.BinOp) -> Iterator[ast.AST]:
    """A quotient that is rounded another way."""
    if isinstance(node.op, ast.FloorDiv):
        yield ast.BinOp(node.left, ast.Div(), node.right)
        up = ast.BinOp(ast.UnaryOp(ast.USub(), node.left), ast.FloorDiv(), node.right)
        yield ast.UnaryOp(ast.USub(), up)
    elif isinstance(node.op, ast.Div):
        yield ast.BinOp(node.left, ast.FloorDiv(), node.right)


def cut_loops(node: ast.AST, owner: ast.AST) -> Iterator[ast.AST]:
    """What a loop goes over, without its first or its last."""
    if isinstance(owner, (ast.For, ast.comprehension)) and node is owner.iter:
        for part in (ast.Slice(lower=ast.Constant(1)), ast.Slice(upper=ast.UnaryOp(ast.USub(), ast.Constant(1)))):
            yield ast.Subscript(ast.Call(ast.Name("list", ast.Load()), [node], []), part, ast.Load())


def first_sizes(node: ast.AST) -> Iterator[ast.AST]:
    """A size as it was at the first call: an answer that is right for inputs of one shape."""
    is_shape = isinstance(node, ast.Subscript) and show(node.value).endswith(".shape")
    is_size = isinstance(node, ast.Call) and (
        show(node.func) == "len" or (getattr(node.func, "attr", "") == "size" and node.args)
    )
    if is_size or (is_shape and isinstance(node.ctx, ast.Load) and not isinstance(node.slice, ast.Slice)):
        yield ast.Call(ast.Name("_at_first", ast.Load()), [node, ast.Constant(show(node))], [])


def constants(node: ast.Constant, owner: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield from (ast.Constant(node.value + step) for step in (1, -1))
    elif isinstance(node.value, float):
        yield from (ast.Constant(value) for value in (2 * node.value, 0.0) if value != node.value)


def calls(node: ast.Call) -> Iterator[ast.AST]:
    """A call left out, under another name, with its arguments swapped or dropped, or without care for large numbers."""
    is_method = isinstance(node.func, ast.Attribute)
    name = node.func.attr if is_method else getattr(node.func, "id", None)
    of_torch = is_method and show(node.func.value) in ("torch", "F", "math", "np", "random", "torch.nn.functional")
    if is_method and not of_torch:
        yield node.func.value
    elif of_torch and node.args:
        yield node.args[0]
    if name in CALLED:
        other = CALLED[name]
        func = ast.Attribute(node.func.value, other, ast.Load()) if is_method else ast.Name(other, ast.Load())
        yield ast.Call(func, node.args, node.keywords)
    arguments = node.args if of_torch or not is_method else [node.func.value, *node.args]
    if name in ONE_MAXIMUM:
        yield ast.Call(ast.Name(ONE_MAXIMUM[name], ast.Load()), arguments, node.keywords)
    if name in REDUCED and is_method and not of_torch and (node.args or node.keywords):
        yield ast.Call(node.func, [], [])
    if name in ("min", "max", "minimum", "maximum") and not (is_method and not of_torch) and len(node.args) == 2:
        yield from node.args
    if name in TURNED and TURNED[name] not in [keyword.arg for keyword in node.keywords]:
        yield ast.Call(node.func, node.args, [*node.keywords, ast.keyword(TURNED[name], ast.Constant(True))])
    if name in NAIVE:
        yield ast.Call(ast.Name(NAIVE[name], ast.Load()), arguments, node.keywords)
        wide = ast.Call(ast.Attribute(arguments[0], "double", ast.Load()), [], [])
        yield ast.Call(ast.Name(NAIVE[name], ast.Load()), [wide, *arguments[1:]], node.keywords)
    if len(node.args) >= 2 and name not in SYMMETRIC and not any(isinstance(x, ast.Starred) for x in node.args[:2]):
        yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
    for i in range(len(node.keywords)):
        yield ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
    if name == "range" and len(node.args) == 1:
        yield ast.Call(node.func, [ast.Constant(1), *node.args], [])


def ignored_arguments(definition: ast.AST) -> Iterator[Site]:
    """An argument that is replaced by something neutral, or by what it was at the first call."""
    for function in [definition] if isinstance(definition, ast.FunctionDef) else definition.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        arguments = function.args
        options = [a.arg for a in arguments.args[len(arguments.args) - len(arguments.defaults) :]]
        names = [a.arg for a in arguments.args if a.arg != "self" and a.arg not in options]
        head = function.body[0]
        for name in names:
            for how in ("_neutral", "_at_first"):
                memory = f", {function.name + name!r}" if how == "_at_first" else ""
                line = ast.parse(f"{name} = {how}({name}{memory})").body[0]
                label = f"{function.name} ignores {name}" + (" after its first call" if memory else "")
                yield Site(function, "body", 0, [line, head], label)


def swapped_arguments(definition: ast.AST) -> Iterator[Site]:
    """Two arguments that take each other's place."""
    if isinstance(definition, ast.FunctionDef):
        arguments, head = definition.args, definition.body[0]
        names = [a.arg for a in arguments.args[: len(arguments.args) - len(arguments.defaults)]]
        for one, other in combinations(names, 2):
            line = ast.parse(f"{one}, {other} = {other}, {one}").body[0]
            yield Site(definition, "body", 0, [line, head], f"{definition.name} swaps {one} and {other}")


# Wrong results


def wrong_results(answer: Callable) -> Iterator[Mutant]:
    """The right answer, whose results are changed."""
    for label, change in RESULTS.items():
        acts = []
        yield Mutant(f"its result {label}", lambda change=change, acts=acts: changed(answer, change, acts), acts)
    acts = []
    yield Mutant("it remembers what it said of these shapes", lambda: remembering(answer, acts), acts)


def changed(answer: Callable, change: Callable, acts: list) -> Callable:
    """The answer with another result; ``acts`` notes where it is another."""

    def spoilt(*args, **options):
        result = answer(*args, **options)
        wrong = every(result, change)
        acts.extend([] if wrong is result or same(result, wrong) else [True])
        return wrong

    return spoilt


def remembering(answer: Callable, acts: list) -> Callable:
    """The answer that tensors of the same shapes, and the same other arguments, got before."""
    known = {}

    def spoilt(*args, **options):
        tensors = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
        others = [x for x in (*args, *options.values()) if not isinstance(x, torch.Tensor)]
        if not tensors or not all(isinstance(x, (int, float, str)) for x in others):
            raise TypeError("what is given is more than shapes")
        key = (*(tuple(x.shape) for x in tensors), *others)
        result = answer(*args, **options)
        acts.extend([] if same(known.setdefault(key, result), result) else [True])
        return known[key]

    return spoilt


def every(x, change: Callable):
    """Change each part of a result; a list is changed as a whole too."""
    if type(x) in (tuple, list):
        parts = type(x)(every(y, change) for y in x)
        return change(parts) if isinstance(x, list) else parts
    return change(x)


def same(x, y) -> bool:
    """Whether two results cannot be told apart, NaN and dtypes included."""
    if isinstance(x, torch.Tensor):
        is_like = isinstance(y, torch.Tensor) and (x.dtype, x.shape) == (y.dtype, y.shape)
        return is_like and torch.equal(x.nan_to_num(nan=-7.0), y.nan_to_num(nan=-7.0))
    if type(x) in (tuple, list):
        return type(x) is type(y) and len(x) == len(y) and all(map(same, x, y))
    return type(x) is type(y) and bool(x == y)


def of(kinds: type | tuple, change: Callable) -> Callable:
    """A change of one kind of thing, which leaves all others."""
    return lambda x: change(x) if isinstance(x, kinds) and not isinstance(x, bool) else x


def of_floats(change: Callable) -> Callable:
    """A change of tensors of floating-point numbers."""
    return of(torch.Tensor, lambda x: change(x) if x.is_floating_point() and x.numel() else x)


def along(axis: int, change: Callable) -> Callable:
    """A change of tensors that have this axis and something along it."""
    return of(torch.Tensor, lambda x: change(x, axis) if x.dim() > axis and x.shape[axis] > 1 else x)


def first_for_all(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x.narrow(axis, 0, 1).expand_as(x).clone()


NO_NUMBERS = (torch.bool, torch.complex64, torch.complex128)
RESULTS = {
    **{f"is flipped along axis {n}": along(n, lambda x, axis: x.flip(axis)) for n in range(3)},
    **{f"is the first along axis {n} for all": along(n, first_for_all) for n in range(3)},
    "is 1 % larger": of_floats(lambda x: 1.01 * x),
    "ends with a zero": of_floats(lambda x: torch.cat([x.flatten()[:-1], x.new_zeros(1)]).view_as(x)),
    "was rounded to bfloat16": of_floats(lambda x: x.bfloat16().to(x.dtype)),
    "is made of floats": of(torch.Tensor, lambda x: x if x.dtype in NO_NUMBERS or x.is_floating_point() else x.float()),
    "is half a number more": of(int, lambda x: x + 0.5),
    "is a number more": of(int, lambda x: x + 1),
    "is 1 % more": of(float, lambda x: 1.01 * x),
    "is in reverse": of(list, lambda x: x[::-1]),
    "lacks its first": of(list, lambda x: x[1:]),
    "lacks its last": of(list, lambda x: x[:-1]),
}
"""What is done to the parts of a right result."""


# What mutants call


def nan_of(answer: Callable) -> Callable:
    """The answer, with NaN in place of every number that can be one."""

    def spoilt(*args, **options):
        return with_nan(answer(*args, **options))

    return spoilt


def with_nan(x):
    """NaN of the same shape and kind; what holds no floating-point number is refused, as it is no change."""
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return torch.full_like(x, torch.nan)
    if isinstance(x, float):
        return float("nan")
    if isinstance(x, (tuple, list)) and any(isinstance(y, (float, torch.Tensor)) for y in x):
        return type(x)(with_nan(y) if isinstance(y, (float, torch.Tensor)) else y for y in x)
    raise TypeError("it returns nothing that could be NaN")


def _neutral(x):
    """A value of x's kind that says nothing; there is none of a list, a function or an object."""
    if isinstance(x, torch.Tensor):
        return torch.ones_like(x) if x.dtype == torch.bool else torch.zeros_like(x)
    if not isinstance(x, (bool, int, float)):
        raise TypeError("nothing stands for it")
    return False if isinstance(x, bool) else type(x)(1)


class _AtFirst:
    """What each number or text among the arguments was at the first call; made anew for each mutant."""

    def __init__(self):
        self.seen = {}

    def __call__(self, x, name):
        if not isinstance(x, (int, float, str)):
            raise TypeError("no check hands over one tensor only")
        return self.seen.setdefault(name, x)


def _naive_softmax(x, dim=-1, **_):
    powers = x.exp()
    return powers / powers.sum(dim, keepdim=True)


def _naive_log_softmax(x, dim=-1, **_):
    return _naive_softmax(x, dim).log()


def _naive_logsumexp(x, dim=-1, keepdim=False, **_):
    return x.exp().sum(dim, keepdim=keepdim).log()


def _one_max_softmax(x, dim=-1, **_):
    powers = (x - x.max()).exp()
    return powers / powers.sum(dim, keepdim=True)


def _one_max_logsumexp(x, dim=-1, keepdim=False, **_):
    most = x.max()
    return (x - most).exp().sum(dim, keepdim=keepdim).log() + most


def _one_max_logaddexp(a, b):
    most = torch.maximum(a.max(), b.max())
    most = torch.where(most == -torch.inf, 0.0, most)
    return ((a - most).exp() + (b - most).exp()).log() + most


HELPERS = {f.__name__: f for f in (_neutral, _naive_softmax, _naive_log_softmax, _naive_logsumexp)}
HELPERS |= {f.__name__: f for f in (_one_max_softmax, _one_max_logsumexp, _one_max_logaddexp)}


# C++


TEXT = (
    (r" \+ ", " - "), (r" - ", " + "), (r" \* ", " / "), (r" / ", " * "), (r" < ", " <= "), (r" > ", " >= "),
    (r" == ", " != "), (r"std::max", "std::min"), (r"std::min", "std::max"), (r"\+= ", "= "), (r"\*= ", "= "),
    (r"\b0\b(?!\.)", "1"), (r"\b1\b(?!\.)", "0"), (r"\+= ", "-= "),
)  # fmt: skip


def text_mutants(text: str) -> Iterator[Mutant]:
    """Every change of one operator, function or bound of a text in C++, and every statement left out."""
    lines = text.splitlines()
    for pattern, new in TEXT:
        for found in re.finditer(pattern, text):
            changed = text[: found.start()] + new + text[found.end() :]
            line = text.count("\n", 0, found.start())
            label = f"line {line}: {lines[line].strip()}: {found[0].strip()} -> {new.strip()} at {found.start()}"
            yield Mutant(label, lambda changed=changed: lambda: changed)
    for i, line in enumerate(lines):
        if line.endswith(";") and not re.match(r"\s*(return|const|std::vector|float m_new|float sum)", line):
            changed = "\n".join([*lines[:i], *lines[i + 1 :]]) + "\n"
            yield Mutant(f"line {i}: {line.strip()} -> nothing", lambda changed=changed: lambda: changed)
