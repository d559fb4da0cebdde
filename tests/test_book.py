"""What the book is built from: its configuration, its offline parts, its bibliography, its generated tables."""

import base64
import importlib.util
import json
import re
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def script(path: Path):
    """A script of the book as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def vendor(tmp_path, monkeypatch):
    """``book/vendor.py``, made to write into a folder of the test."""
    module = script(BOOK / "vendor.py")
    monkeypatch.setattr(module, "VENDOR", tmp_path / "vendor")
    return module


def test_configuration_executes_nothing():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["execute"]["execute_notebooks"] == "off"
    assert config["launch_buttons"]["thebe"] is False


def test_checksums_are_whole(vendor):
    for name, checksum in vendor.PACKAGES.items():
        assert re.fullmatch(r"(@[\w-]+/)?[\w-]+@\d+\.\d+\.\d+", name), "a version must be exact"
        assert len(base64.b64decode(checksum, validate=True)) == 64


def test_no_npm_leaves_a_book_that_builds(vendor, monkeypatch, capsys):
    monkeypatch.setattr(vendor.shutil, "which", lambda name: None)
    assert vendor.main() == 0
    assert "npm is not installed" in capsys.readouterr().out
    assert not vendor.VENDOR.exists()


def fake_npm(tmp_path: Path):
    """Stands for ``npm pack``: writes an archive that is not the one that was checked."""

    def run(command, cwd, **options):
        (tmp_path / "package.json").write_text("{}")
        with tarfile.open(Path(cwd) / "evil.tgz", "w:gz") as archive:
            archive.add(tmp_path / "package.json", "package/package.json")
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_another_archive_is_refused(vendor, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(vendor.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(vendor.subprocess, "run", fake_npm(tmp_path))
    assert vendor.main() == 0
    assert "has SHA-512" in capsys.readouterr().out
    assert not vendor.VENDOR.exists()


def test_network_failure_is_told(vendor, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "npm error network\nnpm error code ENOTFOUND")
    monkeypatch.setattr(vendor.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(vendor.subprocess, "run", lambda *a, **k: failed)
    assert vendor.main() == 0
    assert "ENOTFOUND" in capsys.readouterr().out


def configured(folder: Path) -> SimpleNamespace:
    """The configuration after the offline extension saw it, for a book in ``folder``."""
    config = SimpleNamespace(html_extra_path=[], mathjax_path="https://a.network", nb_ipywidgets_js={"https://a": {}})
    script(BOOK / "_ext" / "offline.py").use_vendored(SimpleNamespace(srcdir=str(folder)), config)
    return config


def test_book_uses_the_network_only_without_vendored_files(tmp_path):
    assert configured(tmp_path).mathjax_path == "https://a.network"
    (tmp_path / "vendor" / "offline").mkdir(parents=True)
    assert configured(tmp_path).mathjax_path == "https://a.network"
    (tmp_path / "vendor" / "offline" / "complete").touch()
    config = configured(tmp_path)
    assert config.html_extra_path == ["vendor"]
    assert not any(address.startswith("http") for address in [config.mathjax_path, *config.nb_ipywidgets_js])


def test_bibliography_is_complete():
    entries = parse_file(BOOK / "references.bib").entries
    for key, entry in entries.items():
        assert entry.fields.get("title"), key
        assert re.fullmatch(r"(19|20)\d\d", entry.fields.get("year", "")), key
        assert entry.persons.get("author"), key


def test_no_work_is_listed_twice():
    entries = parse_file(BOOK / "references.bib").entries
    titles = [re.sub(r"\W", "", entry.fields["title"]).lower() for entry in entries.values()]
    assert sorted(titles) == sorted(set(titles))
    numbers = [entry.fields["eprint"] for entry in entries.values() if "eprint" in entry.fields]
    assert sorted(numbers) == sorted(set(numbers))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_citations_are_in_the_bibliography(file):
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    cited = {key.strip() for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text) for key in keys.split(",")}
    assert cited <= set(parse_file(BOOK / "references.bib").entries)


def test_front_page_asks_the_question_of_every_chapter():
    tables = script(BOOK / "_ext" / "tables.py")
    assert {file.stem for file in NOTEBOOKS} <= set(tables.QUESTIONS)
    listed = tables.chapters(ROOT)
    contents = (ROOT / "_toc.yml").read_text()
    assert all(f"notebooks/{f.stem}.ipynb" in listed for f in NOTEBOOKS if f"notebooks/{f.stem}\n" in contents)


def test_every_part_of_the_course_begins_with_a_page_that_lists_its_chapters():
    tables = script(BOOK / "_ext" / "tables.py")
    for part in yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]:
        files = [chapter["file"] for chapter in part["chapters"]]
        chapters = [file for file in files if file.startswith("notebooks/")]
        if chapters:
            assert files[0].startswith("parts/"), f"the part {part['caption']!r} has no introduction"
            assert "{{ part }}" in (BOOK / f"{files[0]}.md").read_text(encoding="utf-8")
            listed = tables.part(ROOT, files[0])
            assert re.findall(r"notebooks/[\w-]+", listed) == chapters
            assert len(re.findall(r"\| \d+ \|$", listed, flags=re.MULTILINE)) == len(chapters), (
                "a chapter names no time"
            )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_chapter_begins_with_what_it_teaches_the_time_and_what_it_needs(notebook):
    first = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    box = re.search(
        r"^:::\{admonition\} What you will be able to do\n:class: tip\n(.*?)^:::$", first + "\n", re.DOTALL | re.M
    )
    assert box, "the box 'What you will be able to do' is missing"
    assert len(re.findall(r"^- ", box[1], flags=re.MULTILINE)) >= 3
    assert re.search(r"^\*\*Time:\*\* .*minutes.*\*\*You need:\*\* \S", box[1], re.MULTILINE)


def test_status_page_says_what_made_the_outputs():
    record = json.loads((BOOK / "status.json").read_text())
    assert {"Processor", "System", "Python", "torch", "matplotlib"} <= set(record)
    assert "torch" in script(BOOK / "_ext" / "tables.py").outputs(ROOT)


def test_status_page_lists_every_recorded_measurement():
    listed = script(BOOK / "_ext" / "tables.py").measurements(ROOT)
    for file in (ROOT / "benchmarks" / "results").glob("*/*.json"):
        record = json.loads(file.read_text())
        if isinstance(record, dict) and "command" in record:
            assert f"| {file.stem} |" in listed


@pytest.mark.parametrize("page", sorted([*BOOK.glob("*.md"), *BOOK.glob("parts/*.md")]), ids=lambda page: page.stem)
def test_page_has_one_title(page):
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(re.findall(r"^# ", text, flags=re.MULTILINE)) == 1
    assert text.startswith("# ")
