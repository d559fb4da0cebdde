"""One topic, one word, one row: the tree is what the table of the design says."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from tools import chapters

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "tformer_lib"

COURSE = chapters.load()
ROWS = {chapter.name: chapter for chapter in COURSE.chapters}
FLOORS = tuple(COURSE.floors.values())
ROOMS = {
    "__init__",
    "checkpoint",
    "command_line",
    "contract",
    "jit",
    "ladder",
    "pretrained",
    "stories",
}
"""Modules that serve all topics, or whose chapter is being written."""

PICTURES = {"matplotlib", "ipywidgets", "anywidget", "IPython"}
"""Packages that only the teaching rooms import."""

NOTEBOOKS = sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))
PACKAGES = sorted(p.parent.name for p in LIBRARY.glob("*/__init__.py") if p.parent.name != "teaching")
MODULES = sorted([p.stem for p in LIBRARY.glob("*.py")] + PACKAGES)


def sources(module: str) -> list[Path]:
    """The files of a module: one, or all of a package."""
    return sorted((LIBRARY / module).rglob("*.py")) or [LIBRARY / f"{module}.py"]


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_git_keeps_nothing_beside_the_chapters_and_nothing_that_it_ignores():
    if shutil.which("git") is None:
        pytest.skip("git is not here")

    def listed(*asked: str) -> list[str]:
        ran = subprocess.run(["git", "-C", str(ROOT), "ls-files", *asked], capture_output=True, text=True)
        if ran.returncode:
            pytest.skip(f"not a git clone that may be read: {ran.stderr.strip()}")
        return ran.stdout.split()

    assert [name for name in listed("notebooks") if not name.endswith(".ipynb")] == ["notebooks/.ruff.toml"]
    assert listed("--cached", "--ignored", "--exclude-standard") == []


def test_notebooks_are_those_that_the_list_has():
    assert sorted(chapter.name for chapter in COURSE.chapters if chapter.ready) == NOTEBOOKS


@pytest.mark.parametrize("name", [chapter.name for chapter in COURSE.chapters if chapter.ready])
def test_chapter_has_its_modules_and_its_test(name):
    chapter = ROWS[name]
    for module in chapter.modules:
        assert module in MODULES, f"{name} explains tformer_lib/{module}, which is missing"
    assert (ROOT / chapter.test_file).exists(), f"{chapter.test_file} is missing"


@pytest.mark.parametrize("module", MODULES)
def test_module_is_in_a_row_or_a_room(module):
    assert module in ROOMS | {m for chapter in COURSE.chapters for m in chapter.modules}


@pytest.mark.parametrize("module", sorted(set(MODULES) - ROOMS))
def test_module_has_a_chapter(module):
    rows = [chapter for chapter in COURSE.chapters if module in chapter.modules]
    assert any(chapter.ready for chapter in rows), f"tformer_lib/{module} has no chapter"


def test_what_is_made_from_the_list_is_up_to_date():
    assert not chapters.stale(), "run python -m tools.chapters"


def test_every_earlier_address_leads_to_a_page_that_is_there():
    for old, new in COURSE.redirects().items():
        target = ROOT / "book" / Path(old).parent / new.removesuffix(".html")
        assert list(target.parent.glob(f"{target.name}.*")), f"{old} leads to {new}, which is not there"
        assert not list((ROOT / "book").glob(f"{old}.*")), f"{old} is a page"


def test_table_of_contents_lists_only_what_is_there():
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    for file in [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]:
        assert list((ROOT / "book").glob(f"{file}.*")), f"_toc.yml lists {file}, which does not exist"


@pytest.mark.parametrize(
    ("link", "target"),
    [("_config.yml", "../_config.yml"), ("_toc.yml", "../_toc.yml"), ("notebooks", "../notebooks")],
)
def test_book_links_to_the_top(link, target):
    path = ROOT / "book" / link
    if not path.is_symlink():
        pytest.skip("this checkout has no symbolic links")
    assert path.readlink() == Path(target)
    assert path.exists()


def imports(path: Path) -> set[str]:
    """The names of the modules that a file imports, at any place."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def library_imports(module: str) -> set[str]:
    """The other modules of the library that a module of the library imports."""
    names = set().union(*map(imports, sources(module)))
    return {match[1] for name in names if (match := re.match(r"tformer_lib\.(\w+)", name))} - {module}


def floor(module: str) -> int:
    """How high a module stands."""
    return next(i for i, modules in enumerate(FLOORS) if module in modules)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_imports_point_down(module):
    for other in library_imports(module):
        assert floor(other) <= floor(module), f"{module} imports {other}, which stands above it"
        assert module not in library_imports(other), f"{module} and {other} import each other"


def declared(*extras: str) -> set[str]:
    """The distributions that pyproject.toml asks for, with those of some extras, in lower case."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] + [name for extra in extras for name in project["optional-dependencies"][extra]]
    return {re.match(r"[\w.-]+", name)[0].lower() for name in asked}


OWN = {"tformer_lib", "benchmarks", "tools", "tests", "book"}
FOLDERS = {
    "tformer_lib": ("serve", "hub", "transformers"),
    "benchmarks": ("test", "transformers"),
    "book": (),
    "tools": ("test",),
    "tests": ("test", "serve", "hub", "transformers"),
}
"""Folder -> the extras that its files may import from. (A benchmark's peers are what the tests' oracles are.)"""


OPTIONAL = {"fla", "vllm", "flashinfer", "triton", "nanovllm"}
"""Peers of a benchmark on a GPU, which it leaves out where they are missing."""


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_imported_is_declared(folder):
    distributions, asked = packages_distributions(), declared(*FOLDERS[folder])
    files = [path for path in (ROOT / folder).rglob("*.py") if "_build" not in path.parts]
    local = {path.stem for path in files} | {path.parent.name for path in files} | OWN | set(sys.stdlib_module_names)
    for path in files:
        for name in {name.partition(".")[0] for name in imports(path)} - local - OPTIONAL:
            owners = {owner.lower() for owner in distributions.get(name, [])}
            assert owners & asked, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not ask for"


def test_the_extra_for_profiling_has_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["optional-dependencies"]) >= {"test", "profiling"}
    assert "profile" not in project["optional-dependencies"]


@pytest.mark.parametrize("module", MODULES)
def test_only_teaching_draws(module):
    assert not {name.partition(".")[0] for path in sources(module) for name in imports(path)} & PICTURES
