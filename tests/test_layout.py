"""One topic, one word, one row: the tree is what the table of the design says."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "tformer_lib"

ROWS = {
    "01-tokens": ("tokens",),
    "02-attention": ("attention",),
    "03-masks": ("masks",),
    "04-positional-encoding": ("positional_encoding",),
    "05-transformer": ("transformer",),
    "06-training": ("training",),
    "08-rope": ("rope",),
    "09-kv-cache": ("kv_cache", "generation"),
    "10-grouped-query-attention": ("grouped_query_attention",),
    "11-sparse-attention": ("sparse_attention",),
    "12-linear-attention": ("linear_attention",),
    "15-flash-math": ("flash_attention",),
    "16-flash-kernels": ("flash_attention",),
    "18-paged-attention": ("paged_attention",),
    "19-serving": ("serving",),
    "20-profiling": ("profiling",),
    "21-scaling-out": ("distributed",),
}
"""Notebook -> the modules that it explains; the first one names the test."""

ROOMS = {"__init__", "contract", "jit", "ladder", "pretrained", "stories"}
"""Modules that serve all topics."""

GROUND = {"contract", "masks", "positional_encoding", "rope", "jit", "ladder", "profiling", "stories", "tokens"}
FORMS = {"attention", "flash_attention", "paged_attention", "linear_attention", "sparse_attention"}
FORMS |= {"grouped_query_attention", "kv_cache"}
MODELS = {"transformer"}
USERS = {"generation", "training", "serving", "distributed", "pretrained"}
FLOORS = (GROUND, FORMS, MODELS, USERS)

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


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_has_its_row(notebook):
    assert notebook in ROWS, f"{notebook} is in no row of the design"
    for module in ROWS[notebook]:
        assert module in MODULES, f"{notebook} explains tformer_lib/{module}, which is missing"
    assert (ROOT / "tests" / f"test_{ROWS[notebook][0]}.py").exists(), f"tests/test_{ROWS[notebook][0]}.py is missing"


@pytest.mark.parametrize("module", MODULES)
def test_module_is_in_a_row_or_a_room(module):
    assert module in ROOMS | {m for modules in ROWS.values() for m in modules}


@pytest.mark.parametrize("notebook", sorted(ROWS))
def test_module_has_its_test_and_chapter(notebook):
    module = ROWS[notebook][0]
    if module not in MODULES:
        pytest.skip(f"tformer_lib/{module} is not built yet")
    assert (ROOT / "tests" / f"test_{module}.py").exists(), f"tformer_lib/{module} has no test"
    chapters = [n for n, modules in ROWS.items() if modules[0] == module]
    assert any(chapter in NOTEBOOKS for chapter in chapters), f"tformer_lib/{module} has no chapter"


def test_table_of_contents_lists_every_notebook_once():
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]
    assert [f for f in listed if f.startswith("notebooks/")] == [f"notebooks/{name}" for name in ordered(listed)]
    assert sorted(f for f in listed if f.startswith("notebooks/")) == [f"notebooks/{name}" for name in NOTEBOOKS]
    for file in listed:
        assert list((ROOT / "book").glob(f"{file}.*")), f"_toc.yml lists {file}, which does not exist"


def ordered(listed: list[str]) -> list[str]:
    """The notebooks in the order that they are listed, without repetition."""
    return list(dict.fromkeys(f.removeprefix("notebooks/") for f in listed if f.startswith("notebooks/")))


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


@pytest.mark.parametrize("module", MODULES)
def test_only_teaching_draws(module):
    assert not {name.partition(".")[0] for path in sources(module) for name in imports(path)} & PICTURES
