"""Show, change, compile and run kernel sources on the page.

``show_kernel("flash_attention/2_tiled.cu", "multiply_scores")`` shows a function as it stands in ``kernels/``, so that
no kernel is typed twice. ``build`` is ``jit.load`` with one line of output. ``compile_small`` and ``run_small`` are the
edit, compile, run loop of a learner: functions of ``kernels/flash_attention/small.cpp`` are replaced by the learner's,
built by the same loader, and run in a process of their own, which may crash or hang without harm. ``compile_step`` is
the same for a whole step of the ladder, with its speed beside the original's.
"""

import contextlib
import ctypes
import html
import io
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from IPython.display import HTML, display
from torch import Tensor

from tformer_lib import jit
from tformer_lib.teaching.bench import Bench, compile_step, step_file
from tformer_lib.teaching.display import show_markdown

__all__ = [
    "Bench",
    "KernelError",
    "build",
    "compile_small",
    "compile_step",
    "compile_text",
    "definition",
    "kernel_text",
    "replace_functions",
    "run_small",
    "show_kernel",
    "show_ledger",
    "show_table",
    "step_file",
]

SMALL = "flash_attention/small.cpp"
EDITED = "your kernel"
GUARD = 64
"""Rows of NaN before and after each of q, k and v, and of a mark around out: what lies outside is noticed."""

MARK = -12345.0
DEFINED = r"^(?!return|if|for|else|using|struct)[A-Za-z_][\w:<>,&* ]*[ &*\n](\w+)\("
SECONDS = 10.0


class KernelError(RuntimeError):
    """A learner's kernel does not compile, crashes, hangs or writes outside its output."""


# --- show ----------------------------------------------------------------------------------------------------------


def show_kernel(file: str, *names: str, start: str | None = None, stop: str | None = None) -> None:
    """Show functions or structs of a kernel file, or the lines from one text up to another, as they stand there.

    Args:
        file: under ``kernels/``, such as ``"flash_attention/1_scalar.cu"``.
        names: functions or structs, each shown whole with the comment above it.
        start: show the lines from the first that holds this text ...
        stop: ... up to the first after it that holds this one, which is left out, as are braces before it that close
            what was opened above ``start``; without it, to the brace that closes the first line's.
    """
    text = kernel_text(file)
    parts = [definition(text, name) for name in names]
    if start is not None:
        parts.append(between(text, start, stop))
    body = "\n\n".join(parts) if parts else text.rstrip()
    show_markdown(f"From `kernels/{file}`:\n\n```cpp\n{body}\n```")


def kernel_text(file: str) -> str:
    """The text of a file under ``kernels/``."""
    return (jit.kernels_folder() / file).read_text(encoding="utf-8")


def definition(text: str, name: str) -> str:
    """The source of a function or struct, from the comment or template line above it to its closing brace.

    Raises:
        ValueError: nothing of that name is defined in the text.
    """
    begin, end = span(text, name)
    return dedent(text[begin:end])


def span(text: str, name: str) -> tuple[int, int]:
    """Where a definition begins, with the comments and the template line above it, and where it ends."""
    head = rf"^ {{0,4}}(?:struct {name}\b|(?!return|if|for)[A-Za-z_].*\b{name}\(|{name}\()"
    for match in re.finditer(head, text, flags=re.MULTILINE):
        opening, semicolon = text.find("{", match.start()), text.find(";", match.start())
        if opening < 0 or 0 <= semicolon < opening:
            continue  # a declaration or a call
        begin = match.start()
        if match.group().lstrip().startswith(f"{name}("):  # its type stands on the line above
            begin -= len(re.search(r"(?:[A-Za-z_][\w:<>,&* ]*\n)?\Z", text[:begin]).group())
        while above := re.search(r"(?<![^\n])[ ]{0,4}(?://|template|__global__).*\n\Z", text[:begin]):
            begin = above.start()
        return begin, closing(text, opening)
    raise ValueError(f"nothing called {name!r} is defined there")


def closing(text: str, opening: int) -> int:
    """The place after the brace that closes the one at ``opening``, and after the semicolon of a struct."""
    depth = 0
    for i in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i + 2 if text[i + 1 : i + 2] == ";" else i + 1
    raise ValueError("a brace is not closed")


def between(text: str, start: str, stop: str | None) -> str:
    """The lines from the first with ``start`` up to the next with ``stop`` or to its brace, moved to the left edge."""
    if stop is None and start in text:
        first = text.rfind("\n", 0, text.find(start)) + 1
        return dedent(text[first : closing(text, text.find("{", text.find(start)))])
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if start in line), None)
    if first is None:
        raise ValueError(f"no line holds {start!r}")
    rest = range(first + 1, len(lines))
    last = next((i for i in rest if stop in lines[i]), None)
    if last is None:
        raise ValueError(f"no line after {start!r} holds {stop!r}")
    return dedent(without_closers("\n".join(lines[first:last]).rstrip()))


def without_closers(text: str) -> str:
    """The text without the braces at its end that close what was opened before it."""
    while text.count("}") > text.count("{") and (above := re.search(r"\s*\n *\};?\Z", text)):
        text = text[: above.start()]
    return text


def dedent(text: str) -> str:
    """Move lines to the left by the least of their indentations; what the preprocessor reads has none."""
    lines = text.split("\n")
    margin = min(len(line) - len(line.lstrip(" ")) for line in lines if line.strip() and not line.startswith("#"))
    return "\n".join(line[margin:] if line[:margin].isspace() else line for line in lines)


def show_table(head: Sequence[str], rows: Iterable[Sequence]) -> None:
    """A table whose first column names the rows; a line break in a cell is kept. Wide ones scroll on a narrow screen.

    Args:
        head: the names of the columns.
        rows: the cells of each row.
    """
    names = "".join(f'<th scope="col">{cell_text(name)}</th>' for name in head)
    lines = [f"<tr>{names}</tr>"]
    for first, *others in rows:
        cells = "".join(f"<td>{cell_text(x)}</td>" for x in others)
        lines.append(f'<tr><th scope="row">{cell_text(first)}</th>{cells}</tr>')
    show_html_table(f"{head[0]} by {', '.join(map(str, head[1:]))}", lines)


def show_ledger(entries: Iterable[tuple[str, dict[str, str]]]) -> None:
    """A table with a block for each entry: its name, then what is said about it under each heading.

    Args:
        entries: (name, {heading: text}); a line break in a text is kept.
    """
    lines = []
    for name, parts in entries:
        lines.append(f'<tr><th colspan="2" scope="rowgroup">{cell_text(name)}</th></tr>')
        for heading, text in parts.items():
            first = f'<th scope="row" style="font-weight: normal; vertical-align: top">{cell_text(heading)}</th>'
            lines.append(f'<tr>{first}<td style="text-align: left">{cell_text(text)}</td></tr>')
    show_html_table("ledger", lines)


def show_html_table(label: str, lines: Iterable[str]) -> None:
    """Rows of HTML as a table that can be scrolled by keyboard. The class keeps the dark theme from a light ground."""
    region = f'style="overflow-x: auto" tabindex="0" role="region" aria-label="Table: {html.escape(label)}"'
    body = "\n".join(lines)
    display(HTML(f'<div {region}>\n<table class="table dataframe">\n{body}\n</table>\n</div>'))


def cell_text(cell) -> str:
    """A cell as HTML."""
    return html.escape(str(cell)).replace("\n", "<br>")


# --- compile and run -----------------------------------------------------------------------------------------------


def build(topic: str, step: int | str) -> None:
    """``jit.load`` with its progress kept off the page: one line says what is ready, and after how long."""
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        jit.load(topic, step)
    source = jit.find_source(topic, step)
    print(f"kernels/{topic}/{source.name}: built and loaded ({time.perf_counter() - start:.1f} s)")


def replace_functions(text: str, edited: str) -> str:
    """``text`` with each function that ``edited`` defines put in the place of the one of the same name.

    The compiler counts the lines of the edited functions from the first line of ``edited``.
    """
    edited = dedent(edited)
    names = re.findall(DEFINED, edited, flags=re.MULTILINE)
    if not names:
        raise KernelError("there is no function in your text: it should define those that it replaces")
    known = ", ".join(sorted(set(re.findall(DEFINED, text, flags=re.MULTILINE))))
    for name in names:
        try:
            begin, end = span(text, name)
            own_begin, own_end = span(edited, name)
        except ValueError:
            raise KernelError(f"small.cpp has no function {name!r} to replace; it has {known}") from None
        line = edited[:own_begin].count("\n") + 1
        after = text[:end].count("\n") + 2
        own = f'#line {line} "{EDITED}"\n{edited[own_begin:own_end]}\n#line {after} "small.cpp"'
        text = text[:begin] + own + text[end:]
    return text


def compile_small(edited: str = "") -> Path:
    """Build ``small.cpp`` with the functions of ``edited`` in the place of its own, and return the library's file.

    Raises:
        KernelError: there is no compiler, or it refused; the message is its first error.
    """
    if not jit.can_build_cpp():
        raise KernelError("this exercise needs a C++ compiler and ninja: install g++ and `pip install ninja`")
    text = kernel_text(SMALL)
    try:
        return Path(compile_text(replace_functions(text, edited) if edited else text)._name)
    except jit.BuildError as failure:
        errors = re.findall(r"^.*?([^/\n]*:\d+:\d+: (?:fatal )?error: .*)$", str(failure), flags=re.MULTILINE)
        raise KernelError(f"it does not compile: {errors[0] if errors else 'the linker refused it'}") from None


def compile_text(text: str) -> ctypes.CDLL:
    """Build a C++ text that exports C functions, without a word on the page, and load it."""
    folder = Path(tempfile.mkdtemp(prefix="tformer-")) / "flash_attention"
    folder.mkdir()
    source = folder / "small.cpp"
    source.write_text(text, encoding="utf-8")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return jit.load_source("small", source, "")


RUNNER = """
import ctypes, signal, sys
seconds, library, T, S, d, guard, causal, window, scale, softcap = sys.argv[1:]
signal.alarm(int(seconds))  # ends even an endless loop, if nobody is there to do it
T, S, d, guard, causal, window = map(int, (T, S, d, guard, causal, window))
data = bytearray(sys.stdin.buffer.read())
floats = (ctypes.c_float * (len(data) // 4)).from_buffer(data)
place, pointers = 0, []
for rows in (T, S, S, T):
    pointers.append(ctypes.c_void_p(ctypes.addressof(floats) + 4 * d * (place + guard)))
    place += rows + 2 * guard
forward = ctypes.CDLL(library).forward
forward.restype = None
forward(*pointers, T, S, d, ctypes.c_float(float(scale)), causal, window, ctypes.c_float(float(softcap)))
sys.stdout.buffer.write(bytes(data)[4 * d * (place - T - 2 * guard):])
"""


def run_small(
    library: Path, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """One head by a library of ``compile_small``, in a process of its own.

    Args:
        library: the file that ``compile_small`` returned.
        q: (T, d) float32.
        k, v: (S, d) float32.

    Returns:
        out (T, d).

    Raises:
        KernelError: it crashed, did not end, or wrote outside of out.
    """
    (T, d), S = q.shape, k.shape[0]
    parts = [guarded(x, math.nan) for x in (q, k, v)] + [guarded(torch.full((T, d), math.nan), MARK)]
    options = [T, S, d, GUARD, int(causal), window, d**-0.5, softcap]
    words = [sys.executable, "-I", "-c", RUNNER, str(math.ceil(SECONDS) + 1), str(library), *map(str, options)]
    try:
        data = torch.cat(parts).numpy().tobytes()
        done = subprocess.run(words, input=data, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise KernelError(f"it was stopped after {SECONDS:.0f} seconds: does a loop not move on?") from None
    if done.returncode:
        raise KernelError("it crashed: does it read or write outside of its arrays?")
    out = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(T + 2 * GUARD, d)
    if (out[:GUARD] != MARK).any() or (out[T + GUARD :] != MARK).any():
        raise KernelError("it writes outside of out")
    return out[GUARD : T + GUARD]


def guarded(x: Tensor, value: float) -> Tensor:
    """Rows of ``value`` around x, as float32."""
    rows = torch.full((GUARD, x.shape[1]), value)
    return torch.cat([rows, x.float(), rows])
