"""Show the library's own source, and the results that were measured elsewhere, on the page."""

import inspect
import json
import textwrap
from pathlib import Path

from IPython import get_ipython
from IPython.display import Markdown, display

PACKAGE = Path(__file__).resolve().parents[1]


def show_source(*objects) -> None:
    """Show the source of functions or classes as a highlighted block, with the file that each comes from.

    Args:
        objects: functions, methods or classes of the library.
    """
    for thing in objects:
        thing = inspect.unwrap(thing)
        source = textwrap.dedent(inspect.getsource(thing)).rstrip()
        show_markdown(f"From `{source_file(thing)}`:\n\n```python\n{source}\n```")


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


def results(device: str, topic: str) -> dict:
    """What ``python -m benchmarks.<topic>`` measured on ``device``; says the hardware, the versions and the command.

    Args:
        device: the folder under ``benchmarks/results/``: ``"cpu"``, ``"nvidia-h200"``.
        topic: the topic's word.

    Raises:
        FileNotFoundError: nothing was recorded there.
    """
    path = results_folder() / device / f"{topic}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json"))) or "nothing"
        raise FileNotFoundError(
            f"no results for {topic!r} on {device!r} (recorded there: {known}); "
            f"make them with python -m benchmarks.{topic}"
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
