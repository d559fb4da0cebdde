"""Show the library's own source, and the results that were measured elsewhere, on the page."""

import html
import inspect
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from IPython import get_ipython
from IPython.display import Markdown, display
from torch import Tensor

PACKAGE = Path(__file__).resolve().parents[1]


def show_source(*objects, first: str = "", last: str = "") -> None:
    """Show the source of functions or classes as a highlighted block, with the file that each comes from.

    Args:
        objects: functions, methods or classes of the library.
        first: show each from the first line that holds this text; from its head if not given.
        last: and up to the first line after that which holds this; to its end if not given.

    Raises:
        ValueError: there is no such line.
    """
    for thing in objects:
        thing = inspect.unwrap(thing)
        source = part(inspect.getsource(thing), first, last)
        show_markdown(f"From `{source_file(thing)}`:\n\n```python\n{source}\n```")


def part(source: str, first: str, last: str) -> str:
    """The lines of a source between the two that hold these texts, with no more indentation than they need."""
    lines = source.rstrip().splitlines()
    begin = next((i for i, line in enumerate(lines) if first in line), None)
    if begin is None:
        raise ValueError(f"no line of the source holds {first!r}")
    end = next((i for i, line in enumerate(lines) if i >= begin and last in line), None) if last else len(lines) - 1
    if end is None:
        raise ValueError(f"no line of the source from {first!r} on holds {last!r}")
    return textwrap.dedent("\n".join(lines[begin : end + 1]))


def source_file(thing) -> str:
    """The file that defines ``thing``, as the reader finds it in the project."""
    path = Path(inspect.getsourcefile(thing)).resolve()
    known = any(path.is_relative_to(folder) for folder in (PACKAGE, PACKAGE.parent / "benchmarks"))
    return path.relative_to(PACKAGE.parent).as_posix() if known else path.name


def show_markdown(text: str) -> None:
    """Show Markdown in a notebook; print it elsewhere."""
    if get_ipython() is None:
        print(text)
    else:
        display(Markdown(text))


def under(difference: float | Tensor, bound: float) -> str:
    """A difference by rounding as words: ``under 1e-12`` where it is, so that every machine prints the same.

    Args:
        difference: a number, or a tensor that holds one.
        bound: what the difference should be below; a larger one is given as it is, and so is what is no number.
    """
    size = abs(difference.item() if isinstance(difference, Tensor) else difference)
    return f"under {short(f'{bound:.0e}')}" if size < bound else short(f"{size:.2g}")


def short(number: str) -> str:
    """1e-05 as people write it: 1e-5."""
    return number.replace("e-0", "e-")


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Show a table in a notebook; print it elsewhere. (The book reads Markdown in outputs without its tables.)

    Args:
        columns: the heads of the columns; the first column names the rows, as code if the names are those of a program.
        rows: the cells of each row; what stands between two asterisks ``**`` is bold.
    """
    plain = "\n".join(" | ".join(row) for row in (columns, *rows))
    if get_ipython() is None:
        print(plain)
        return
    heads = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in columns)
    as_code = are_identifiers([row[0] for row in rows])
    body = "\n".join(
        f'<tr><th scope="row">{row_name(name, as_code)}</th>{"".join(map(table_cell, cells))}</tr>'
        for name, *cells in rows
    )
    table = f'<table class="table">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'
    display({"text/html": table, "text/plain": plain}, raw=True)


def are_identifiers(names: Sequence[str]) -> bool:
    """Whether a column names variables, settings or tensors: no spaces within a name, and one has an underscore."""
    words = [word for name in names for word in name.split(", ")]
    return not any(" " in word for word in words) and any("_" in word for word in words)


def row_name(name: str, as_code: bool) -> str:
    """The name of a row, in HTML."""
    return f"<code>{html.escape(name)}</code>" if as_code else html.escape(name)


def table_cell(text: str) -> str:
    """One cell of a table, in HTML."""
    bold = len(text) > 4 and text.startswith("**") and text.endswith("**")
    return f"<td><strong>{html.escape(text[2:-2])}</strong></td>" if bold else f"<td>{html.escape(text)}</td>"


def results(device: str, topic: str) -> dict:
    """What a script of ``benchmarks/`` measured on ``device``; says the hardware, the versions and the command.

    Args:
        device: the folder under ``benchmarks/results/``: ``"cpu"``, ``"nvidia-h200"``.
        topic: the file's name without its ending: the topic's word, and what more there is after a hyphen.

    Raises:
        FileNotFoundError: nothing was recorded there.
    """
    path = results_folder() / device / f"{topic}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "nothing"
        raise FileNotFoundError(
            f"no results for {topic!r} on {device!r} (recorded there: {known}); "
            f"make them with python -m benchmarks.{topic.partition('-')[0]}, whose --help says how"
        )
    record = json.loads(path.read_text(encoding="utf-8"))
    show_markdown(provenance(record))
    return record


def results_folder() -> Path:
    """``benchmarks/results`` of the checkout: beside the package, or above the working directory."""
    for root in (PACKAGE.parent, *Path.cwd().resolve().parents, Path.cwd()):
        if (root / "benchmarks" / "results").is_dir():
            return root / "benchmarks" / "results"
    raise FileNotFoundError("benchmarks/results is not here: run the notebook from a checkout of the course")


def provenance(record: dict) -> str:
    """One sentence: measured on which device, with which versions, when, by which command."""
    versions = ", ".join(f"{name} {value}" for name, value in record.get("versions", {}).items() if value)
    date = str(record.get("date", "an unknown date"))[:10]
    return (
        f"*Measured on {record.get('device', 'an unnamed device')} ({versions}), {date}, "
        f"by `{record.get('command', 'an unrecorded command')}`.*"
    )
