"""Exercises that answer: a check tests the learner's function on many inputs and says in words what failed.

A chapter's checks stand in ``tformer_lib/teaching/exercises/<topic>.py``::

    from tformer_lib.teaching.exercises.engine import exercise, require

    @exercise("masks.causal", title="A causal mask", hints=("Compare two ranges.", "Which index is the query's?"))
    def check_causal(fn):
        mask = fn(4, 6)
        require_shape(mask, (4, 6), "the mask")
        require(not mask[0, 5], "row 0 attends to position 5: the future leaks")

The check of an exercise raises :class:`NotYet` through the ``require`` functions. :func:`check`, which a
notebook calls, never raises: it prints one line, ``passed: ...`` or ``not yet: ...``.
"""

import contextlib
import dis
import hashlib
import importlib
import inspect
import json
import marshal
import operator
import pkgutil
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsFloat

import numpy as np
import torch

from tformer_lib.checkpoint import write_atomically
from tformer_lib.teaching.display import show_markdown
from tformer_lib.teaching.exercises import record
from tformer_lib.teaching.exercises.sources import Unportable, source_of

FOLDER = Path(__file__).parent
PACKAGE = __name__.rpartition(".")[0]

INVERTED = "is inverted: True means that a query may look, and here it hides"
"""What to say of a mask whose every entry is the other way round; the message begins with the mask."""

UNWRITTEN = "the function is still to be written: it raises NotImplementedError"

LONGEST = 400
"""Characters of a message; a longer one is cut."""


class NotYet(Exception):
    """The learner's answer fails in the way that the message says."""


@dataclass(frozen=True)
class Exercise:
    """One exercise: its name ``topic.word``, its title, its hints in the order they help, and its check."""

    name: str
    title: str
    hints: tuple[str, ...]
    check: Callable[[Callable], None]
    in_place: bool = False
    """Whether the answer is to change what it is given."""

    @property
    def topic(self) -> str:
        """The word before the dot."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Outcome:
    """What a check found: ``message`` is empty where the answer passed."""

    passed: bool
    message: str = ""


REGISTRY: dict[str, Exercise] = {}
HINTS_GIVEN: dict[str, int] = {}


def exercise(name: str, *, title: str, hints: Sequence[str], in_place: bool = False) -> Callable[[Callable], Callable]:
    """Register the decorated check under ``name``.

    Args:
        name: ``topic.word``, the topic being the file's name.
        title: a few words, shown by ``progress()``.
        hints: from the gentlest to the one that almost tells.
        in_place: whether the answer is to change what it is given.
    """
    if "." not in name or isinstance(hints, str) or not hints:
        raise ValueError(f"an exercise needs a name 'topic.word' and a sequence of hints, got {name!r} and {hints!r}")

    def register(check: Callable[[Callable], None]) -> Callable[[Callable], None]:
        REGISTRY[name] = Exercise(name, title, tuple(hints), check, in_place)
        return check

    return register


def find(name: str) -> Exercise:
    """The exercise called ``name``, importing its chapter's checks.

    Raises:
        NotYet: there is none; the message lists the chapter's.
    """
    if not isinstance(name, str):
        raise NotYet(f"there is no exercise {name!r:.60}: its name comes first, as in check('masks.causal', my_causal)")
    topic = name.partition(".")[0]
    if topic.isidentifier() and topic in topics():
        importlib.import_module(f"{PACKAGE}.{topic}")
    if name in REGISTRY:
        return REGISTRY[name]
    known = ", ".join(sorted(n for n in REGISTRY if n.startswith(f"{topic}."))) or "none"
    raise NotYet(f"there is no exercise {name!r}; those of {topic!r}: {known}")


def topics() -> list[str]:
    """The chapters that have checks."""
    own = {"engine", "record", "sources"}
    return sorted(m.name for m in pkgutil.iter_modules([str(FOLDER)]) if m.name not in own)


def all_exercises() -> list[Exercise]:
    """Every exercise of every chapter, in the order of the files."""
    for topic in topics():
        importlib.import_module(f"{PACKAGE}.{topic}")
    return sorted(REGISTRY.values(), key=lambda e: e.topic)


def examine(name: str, answer: Callable) -> Outcome:
    """Run the check of ``name`` on ``answer``, with the same random inputs on every call, and leave no trace.

    Args:
        name: the exercise.
        answer: the learner's function.
    """
    watched = Watched(answer) if callable(answer) else answer
    outcome = attempt(name, answer, watched)
    if outcome.passed or not callable(answer) or not watched.changed or REGISTRY[name].in_place:
        return outcome
    again = attempt(name, answer, Watched(answer, restore=True))
    if not again.passed:
        return again
    names = ", ".join(watched.changed)
    return Outcome(False, one_line(f"right, but your function changes what it was given, {names}: work on a copy"))


def attempt(name: str, answer: Callable, watched: Callable) -> Outcome:
    """Run the check once on ``watched``, which calls ``answer``."""
    before = np.random.get_state()
    try:
        with ordinary_state():
            torch.manual_seed(0)
            np.random.seed(0)
            find(name).check(watched)
        return Outcome(True)
    except NotYet as failure:
        return Outcome(False, one_line(str(failure)))
    except (Exception, SystemExit) as error:
        return Outcome(False, one_line(explain(error, answer)))
    finally:
        np.random.set_state(before)


@contextlib.contextmanager
def ordinary_state() -> Iterator[None]:
    """Torch as it is after its import, whatever the notebook has set: types, device, gradients, random numbers."""
    dtype = torch.get_default_dtype()
    elsewhere = torch.get_default_device().type != "cpu"
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu") if elsewhere else contextlib.nullcontext(),
    ):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


class Watched:
    """The learner's function, with an eye on the caller's tensors, lists, dictionaries and sets that it changes.

    Args:
        answer: the function.
        restore: whether they get back what they held after a call, so that the check can judge the rest.
    """

    def __init__(self, answer: Callable, *, restore: bool = False):
        self.answer, self.restore = answer, restore
        self.changed: list[str] = []

    def __call__(self, *args, **options):
        if not any(isinstance(x, CHANGEABLE) for x in (*args, *options.values())):
            return self.answer(*args, **options)  # some checks ask for thousands of numbers
        given = {name: x for name, x in self.named(args, options).items() if isinstance(x, CHANGEABLE)}
        marks = {name: mark_of(x) for name, x in given.items()}
        held = {name: held_by(x) for name, x in given.items()} if self.restore else {}
        result = self.answer(*args, **options)
        changed = {name: x for name, x in given.items() if mark_of(x) != marks[name]}
        self.changed += [name for name in changed if name not in self.changed]
        if self.restore and changed:
            result = apart(result, changed.values())
            for name, x in changed.items():
                put_back(x, held[name])
        return result

    def named(self, args: tuple, options: dict) -> dict[str, object]:
        """The arguments by the learner's names for them."""
        try:
            signature = inspect.signature(self.answer)
            kinds = {parameter.kind for parameter in signature.parameters.values()}
            if not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
                return dict(signature.bind(*args, **options).arguments)
        except (TypeError, ValueError):  # they do not fit, or the function is not written in Python
            pass
        return {f"argument {i}": x for i, x in enumerate(args, 1)} | options


CHANGEABLE = (torch.Tensor, list, dict, set)


def mark_of(x) -> object:
    """What is another after a change: a tensor's version, or which things a list, a dictionary or a set holds."""
    if isinstance(x, torch.Tensor):
        return None if x.is_inference() else x._version
    return list(map(id, x)), list(map(id, x.values())) if isinstance(x, dict) else None


def held_by(x) -> object:
    """A copy of what a tensor, a list, a dictionary or a set holds."""
    return x.detach().numpy().copy() if isinstance(x, torch.Tensor) else x.copy()


def put_back(x, held) -> None:
    """Let it hold again what it held."""
    if isinstance(x, torch.Tensor):
        x.detach().numpy()[...] = held
    elif isinstance(x, list):
        x[:] = held
    else:
        x.clear()
        x.update(held)


def apart(result, changed: Iterable):
    """The result with copies of what is one of the changed things, or a tensor in the memory of one."""
    if any(result is x for x in changed):
        return result.copy() if not isinstance(result, torch.Tensor) else result.clone()
    if isinstance(result, (tuple, list)):
        return type(result)(apart(part, changed) for part in result)
    places = {x.untyped_storage().data_ptr() for x in changed if isinstance(x, torch.Tensor)}
    shared = isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() in places
    return result.clone() if shared else result


def check(name: str, answer: Callable) -> None:
    """Test an answer and print one line: ``passed: ...`` or ``not yet: ...`` with the reason.

    An answer whose name starts with ``solution`` is the book's own, and is not counted in ``progress()``. Neither is a
    function that is still to be written.

    Args:
        name: the exercise, such as ``"masks.causal"``.
        answer: your function.
    """
    outcome = examine(name, answer)
    own = callable(answer) and not getattr(answer, "__name__", "").startswith("solution")
    if own and isinstance(name, str) and name in REGISTRY and outcome.message != UNWRITTEN:
        record.add(name, answer=mark(answer), right=outcome.passed)
        if outcome.passed:
            with contextlib.suppress(Unportable):  # the capstone says why it has none
                record.keep(name, source_of(answer))
    print(f"passed: {REGISTRY[name].title}" if outcome.passed else f"not yet: {outcome.message}")


def mark(answer: Callable) -> str:
    """A short mark of what an answer says, by which the same answer is known again."""
    try:
        said = inspect.getsource(answer).encode()
    except (OSError, TypeError):  # not written in a cell or a file
        code = getattr(answer, "__code__", None)
        said = marshal.dumps(code) if code else repr(answer).encode()
    return hashlib.sha256(said).hexdigest()[:12]


def hand_in(learner: str) -> None:
    """Write your progress into a file that you can send to your teacher: ``ada.json`` beside the notebook.

    Args:
        learner: your name, as the table of the class will have it.
    """
    name = "".join(letter if letter.isalnum() else "-" for letter in learner.strip().lower()).strip("-")
    if not name:
        print("hand_in wants your name: exercises.hand_in('Ada')")
        return
    found = record.read()
    write_atomically(
        Path(f"{name}.json"), (json.dumps({"learner": learner.strip(), **found}, indent=1) + "\n").encode()
    )
    print(f"{name}.json: {len(found['passed'])} passed, {len(found['tries'])} tried")


def hint(name: str) -> None:
    """Print the next hint of an exercise; the first call gives the gentlest.

    Args:
        name: the exercise, such as ``"masks.causal"``.
    """
    try:
        hints = find(name).hints
    except NotYet as failure:
        print(failure)
        return
    given = HINTS_GIVEN.get(name, 0)
    HINTS_GIVEN[name] = given + 1
    if given < len(hints):
        print(f"hint {given + 1} of {len(hints)}: {hints[given]}")
    else:
        print("that was the last hint; the solution is folded under the exercise")


def progress() -> None:
    """Show which exercises of each chapter you have passed, as the local progress file has it."""
    found, known = record.read(), all_exercises()
    count = sum(e.name in found["passed"] for e in known)
    rows = [f"| `{e.name}` | {e.title} | {state(e.name, found)} |" for e in known]
    table = ["| exercise | what | state |", "|---|---|---|", *rows]
    show_markdown(f"{count} of {len(known)} exercises passed.\n\n" + "\n".join(table))


def state(name: str, found: dict) -> str:
    """What a learner's record says of an exercise: passed, tried how often, or nothing."""
    count = found["tries"].get(name, {}).get("count", 0)
    tries = f"{count} {'try' if count == 1 else 'tries'}" if count else ""
    if name in found["passed"]:
        return f"passed, {tries}" if tries else "passed"
    return tries


def explain(error: BaseException, answer: Callable) -> str:
    """Put an exception that came while checking into words for the learner."""
    if not callable(answer):
        return f"expected a function, got {type(answer).__name__}"
    if isinstance(error, NotImplementedError) and raised_by_hand(error):
        return UNWRITTEN
    if "NoneType" in str(error) and not raised_inside(error, answer):
        return "your function returns None: is a return missing?"
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    line = raised_inside(error, answer)
    if line:
        return f"your function raises {words} (in its line {line})"
    return f"the result cannot be used: {words}"


def raised_inside(error: BaseException, answer: Callable) -> int:
    """The line of the answer, counted from its ``def``, that the exception passed through; 0 if through none."""
    code = getattr(answer, "__code__", None)
    if code is None:
        return 0
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__) if f.f_code is code]
    lines = [n for f, n in traceback.walk_tb(error.__traceback__) if f in frames]
    return lines[-1] - code.co_firstlineno + 1 if lines else 0


def raised_by_hand(error: BaseException) -> bool:
    """Whether a ``raise`` that a learner can have written raised it, and not an operator of torch."""
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    frame = last.tb_frame
    raises = frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raises and frame.f_globals.get("__name__", "").partition(".")[0] != "torch"


def one_line(text: str) -> str:
    """The text on one line, cut where it is very long."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def require(condition, message: str) -> None:
    """Fail with ``message`` unless ``condition`` holds.

    Args:
        condition: a boolean, or a tensor or array with one element.
        message: what is wrong with the answer, in words that lead on.
    """
    if not bool(condition):
        raise NotYet(message)


def require_integer(x, name: str = "the result") -> int:
    """``x`` as an int, be it one of Python, of NumPy, or a tensor of one; fail where it is no whole number."""
    require(x is not None, f"{name} is None: is a return missing?")
    refused = f"{name} should be a whole number, an int, and is {x!r:.60}, a {type(x).__name__}"
    truth = isinstance(x, (bool, np.bool_)) or (isinstance(x, torch.Tensor) and x.dtype == torch.bool)
    require(not truth, refused)
    try:
        return operator.index(x)
    except (TypeError, RuntimeError):
        raise NotYet(refused) from None


def require_number(x, name: str = "the result") -> float:
    """``x`` as a float, be it a number of Python, of NumPy, or a tensor of one; fail where it is no number."""
    require(x is not None, f"{name} is None: is a return missing?")
    if isinstance(x, SupportsFloat) and not (isinstance(x, torch.Tensor) and x.numel() != 1):
        return float(x.detach() if isinstance(x, torch.Tensor) else x)
    raise NotYet(f"{name} should be a number, and is a {type(x).__name__}")


def has_parts(x, count: int) -> bool:
    """Whether ``x`` is a tuple or a list of ``count`` things, or an array or a tensor of ``count`` numbers."""
    in_a_row = isinstance(x, (tuple, list)) or (isinstance(x, (np.ndarray, torch.Tensor)) and x.ndim == 1)
    return in_a_row and len(x) == count


def require_tensor(x, name: str = "the result") -> None:
    """Fail unless ``x`` is a tensor."""
    if x is None:
        raise NotYet(f"{name} is None: is a return missing?")
    require(isinstance(x, torch.Tensor), f"{name} should be a tensor, and is a {type(x).__name__}")


def require_shape(x, shape: Sequence[int], name: str = "the result") -> None:
    """Fail unless ``x`` is a tensor of this shape."""
    require_tensor(x, name)
    require(tuple(x.shape) == tuple(shape), f"{name} should have shape {tuple(shape)}, not {tuple(x.shape)}")


def require_dtype(x, dtype: torch.dtype, name: str = "the result") -> None:
    """Fail unless ``x`` is a tensor of this dtype."""
    require_tensor(x, name)
    require(x.dtype == dtype, f"{name} should be {dtype}, and is {x.dtype}")


def require_finite(x, name: str = "the result") -> None:
    """Fail where ``x`` holds NaN or infinity, saying where the first one is."""
    require_tensor(x, name)
    bad = ~torch.isfinite(x)
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise NotYet(f"{name} holds {x[where].item()} at index {list(where)}")


def is_close(x, other: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Whether ``x`` is a tensor of the same shape and, but for rounding, of the same numbers, of whatever dtype."""
    fits = isinstance(x, torch.Tensor) and x.shape == other.shape
    return fits and torch.allclose(x.detach().double(), other.detach().double(), rtol=1e-5, atol=tolerance)


def in_digits(found: float, wanted: float, form: str = ".4g") -> tuple[str, str]:
    """Two numbers in a form, or, where they would look the same, in as many digits as tell them apart."""
    forms = [form, *(f".{digits}g" for digits in range(5, 18))]
    pairs = [(format(found, f), format(wanted, f)) for f in forms]
    return next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])


def require_close(
    x, expected: torch.Tensor, message: str, *, tolerance: float = 1e-4, name: str = "the result"
) -> None:
    """Fail unless ``x`` has the shape of ``expected``, is finite where it is, and differs by at most ``tolerance``.

    Args:
        x: the answer's tensor.
        expected: the true one.
        message: what a difference means; the largest difference and its place are added.
        tolerance: absolute, plus as much relative to ``expected``.
        name: what ``x`` is, for messages about its shape.
    """
    require_shape(x, expected.shape, name)
    if torch.isfinite(expected).all():
        require_finite(x, name)
    actual, wanted = x.detach().double(), expected.detach().double()
    wrong = ~torch.isclose(actual, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        place = f"at index {list(where)} " if where else ""
        found, right = in_digits(actual[where].item(), wanted[where].item())
        raise NotYet(f"{message} ({place}it is {found}, expected {right})")
