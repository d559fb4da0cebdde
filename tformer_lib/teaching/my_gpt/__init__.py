"""The capstone of part I: the reader's own answers become a GPT that loads the book's weights.

    gpt = teaching.capstone()           # says what is still missing
    gpt = teaching.capstone(fill=True)  # with the book's answers in the place of what is missing
    print(gpt.write("Once, Tom"))

``book`` holds the book's answers, ``frame`` what holds the parts together: the weights, the blocks, and the loop that
writes. Both are copied into ``my_gpt.py``, so that the file can be read from top to bottom and run by itself.
"""

import ast
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch.overrides import TorchFunctionMode

from tformer_lib import pretrained
from tformer_lib.checkpoint import write_atomically
from tformer_lib.teaching.exercises import engine, record
from tformer_lib.teaching.exercises.sources import Source, Unportable, source_of
from tformer_lib.teaching.my_gpt import book, frame
from tformer_lib.teaching.running import STORY

MARK = '"""My GPT, put together by teaching.capstone()'
"""How the file begins, by which it is known again."""

TOLERANCE = 1e-9
"""What logits in float64 may differ by: orders of summation differ, and nothing else."""

UNKEPT = "is solved, but its answer was not kept: run its check again"


@dataclass(frozen=True)
class Part:
    """An exercise that is a part of a GPT: the chapter that asks for it, and what the file calls it."""

    chapter: int
    name: str


PARTS = {
    "tokens.encode": Part(1, "encode"),
    "attention.split_heads": Part(2, "split_heads"),
    "masks.causal": Part(3, "causal"),
    "attention.attend": Part(3, "attend"),
    "transformer.rms_norm": Part(5, "rms_norm"),
    "generation.temperature": Part(7, "temperature"),
    "generation.top_p": Part(7, "top_p"),
    "generation.draw": Part(7, "draw"),
}
"""In the order of the chapters."""


def capstone(
    answers: Mapping[str, Callable] | None = None,
    *,
    fill: bool = False,
    path: str | Path = "my_gpt.py",
    prompt: str = "Once, Lily",
) -> ModuleType | None:
    """Collect your answers into a file, load the book's weights into it, compare its logits, and let it write.

    Your answers are kept when a check passes, beside your progress. What is missing or wrong is named, and nothing is
    returned then.

    Args:
        answers: functions by the name of their exercise, in the place of those that were kept.
        fill: take the book's answer for what is missing; the file says so.
        path: the file; one that the capstone wrote before is written anew.
        prompt: how the story begins that it writes.

    Returns:
        The file as a module: ``gpt``, ``write``, ``load_weights`` and your functions.

    Raises:
        ValueError: ``answers`` names no part of a GPT, or the file is somebody else's.
    """
    path = Path(path)
    check_file(path)
    own, missing = collect(answers or {})
    for name, part in PARTS.items():
        found = "yours" if name in own else missing[name]
        filled = "; the book's is taken" if fill and name in missing else ""
        print(f"chapter {part.chapter}, exercise {name}: {found}{filled}")
    if missing and not fill:
        print(
            f"{len(missing)} of {len(PARTS)} parts are missing. teaching.capstone(fill=True) takes the book's for them."
        )
        return None
    try:
        write_atomically(path, compose(own).encode())
    except Unportable as problem:
        print(f"not yet: {problem}")
        return None
    module = load(path)
    if (wrong := find_wrong(module, own)) is not None:
        print(f"not yet: {wrong}")
        return None
    print(f"\n{path.name}: largest difference from the library's logits, in float64: below {TOLERANCE:g}\n")
    print(module.write(prompt))
    return module


def check_file(path: Path) -> None:
    """Refuse a file that the capstone did not write."""
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        raise ValueError(f"{path} is not the capstone's: name another file with path=...")


def collect(given: Mapping[str, Callable]) -> tuple[dict[str, Source], dict[str, str]]:
    """The reader's answers, and for each part without one why there is none."""
    for name in given:
        if name not in PARTS:
            raise ValueError(f"{name!r} is no part of a GPT; there are {', '.join(PARTS)}")
    own, missing, kept, passed = {}, {}, record.answers(), record.passed()
    for name in PARTS:
        try:
            if name in given:
                own[name] = source_of(given[name])
            elif name in kept:
                own[name] = kept[name]
            else:
                missing[name] = UNKEPT if name in passed else "is not solved yet"
        except Unportable as problem:
            missing[name] = f"cannot stand in a file: {problem}"
    return own, missing


def compose(own: Mapping[str, Source]) -> str:
    """The text of the file.

    Raises:
        Unportable: two answers define the same name differently, or one takes a name that the file needs.
    """
    lines = [f"{MARK}.", "", "Each part says whose it is. Run it with: python my_gpt.py", '"""', ""]
    imports = [*imports_of(book), *imports_of(frame)]
    imports = [line for line in imports if "teaching.my_gpt" not in line]
    for source in own.values():
        imports += [line for line in source.imports if line not in imports]
    lines += [*dict.fromkeys(imports)]
    taken: dict[str, str] = {}
    for name, part in PARTS.items():
        lines += [
            "",
            "",
            f"# {name} (chapter {part.chapter}): {'my answer' if name in own else 'the answer of the book'}",
        ]
        if name not in own:
            lines.append(inspect.getsource(getattr(book, part.name)).rstrip())
            continue
        for called, text in own[name].definitions.items():
            check_name(name, called, text, taken)
            if called not in taken:
                lines.append(text.rstrip())
            taken[called] = text
        if own[name].function != part.name:
            lines += ["", "", f"{part.name} = {own[name].function}"]
    return "\n".join([*lines, "", "", "# What holds the parts together: the book's", body_of(frame)])


def check_name(exercise: str, called: str, text: str, taken: Mapping[str, str]) -> None:
    """Refuse a name that means something else in the file."""
    needed = {node.name for node in ast.parse(inspect.getsource(frame)).body if hasattr(node, "name")}
    needed |= {part.name for name, part in PARTS.items() if name != exercise}
    if called in needed:
        raise Unportable(f"your answer to {exercise} defines {called}, a name that the file needs: give it another")
    if taken.get(called, text) != text:
        raise Unportable(f"your answer to {exercise} defines {called}, and another answer does so differently")


def imports_of(module: ModuleType) -> list[str]:
    """The lines that import something."""
    text = inspect.getsource(module)
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return [ast.unparse(node) for node in nodes]


def body_of(module: ModuleType) -> str:
    """What follows its docstring and its imports."""
    text = inspect.getsource(module)
    last = max(node.end_lineno for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom))
    return "\n".join(text.splitlines()[last:]).lstrip("\n") + "\n"


def load(path: Path) -> ModuleType:
    """The file as a module, whatever was loaded from it before."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def find_wrong(module: ModuleType, own: Mapping[str, Source]) -> str | None:
    """The first part of the reader's that is wrong, in words; None if the model is the library's."""
    for name in own:
        outcome = engine.examine(name, getattr(module, PARTS[name].name))
        if not outcome.passed:
            return f"chapter {PARTS[name].chapter}, exercise {name}: {outcome.message}"
    model, encoding = pretrained.load()
    numbers = [encoding.eot_token, *encoding.encode_ordinary(STORY)]
    if module.Tokens().numbers(STORY) != numbers:
        return "chapter 1, exercise tokens.encode: the running story has other tokens than the library's"
    ids, weights = torch.tensor([numbers]), module.load_weights()
    expected = model.double()(ids)
    mine = {name: getattr(module, PARTS[name].name) for name in own}
    answers = {name: Widened(answer) for name, answer in mine.items()}
    found = logits_with(module, answers, ids, weights)
    rounded = [name for name, answer in answers.items() if answer.returns_narrow]
    if close(found, expected) and not rounded:
        return None
    off = f"the logits differ from the library's by up to {difference(found, expected):.1g}"
    for name in rounded or own:  # with the book's answer in the place of one, is the rest right?
        mended = logits_with(module, answers | {name: getattr(book, PARTS[name].name)}, ids, weights)
        if name in rounded or close(mended, expected):
            words = f"chapter {PARTS[name].chapter}, exercise {name}: with your answer {off} (in float64)"
            narrow = ": it computes in float32 what it gets in float64; keep to the type of its input"
            return words + narrow * answers[name].is_narrow
    return f"{off}, and no answer alone is the reason"


def logits_with(module: ModuleType, answers: Mapping[str, Callable], ids: torch.Tensor, weights: dict) -> torch.Tensor:
    """The logits of the file's model with these answers in the place of the file's."""
    before = {PARTS[name].name: getattr(module, PARTS[name].name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(module, PARTS[name].name, answer)
        return module.gpt(ids, weights)
    finally:
        for called, answer in before.items():
            setattr(module, called, answer)


class Widened(TorchFunctionMode):
    """A part whose result is float64 again, whether it was not, and whether anything in it was narrower.

    Args:
        answer: the part.
    """

    def __init__(self, answer: Callable):
        super().__init__()
        self.answer, self.is_narrow, self.returns_narrow = answer, False, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.is_narrow |= result.dtype != torch.float64
        return result

    def __call__(self, *args):
        with self:
            result = self.answer(*args)
        if not isinstance(result, torch.Tensor) or not result.is_floating_point():
            return result
        self.returns_narrow |= result.dtype != torch.float64
        return result.double()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are equal, but for the order of summation."""
    return difference(found, expected) <= TOLERANCE


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; infinite where shapes differ."""
    return (found.double() - expected).abs().max().item() if found.shape == expected.shape else torch.inf
