"""What the book is built from: its configuration, its offline parts, its bibliography, its generated tables."""

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import notebook_rules as rules
import pytest
import yaml
from IPython.core.interactiveshell import InteractiveShell
from pybtex.database import parse_file

from tformer_lib import flash_attention
from tools import page_picture, record_figure
from tools.chapters import load

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
    """``tools/vendor.py``, made to write into a folder of the test."""
    module = script(ROOT / "tools" / "vendor.py")
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
    assert vendor.main([]) == 0
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
    assert vendor.main([]) == 0
    assert "has SHA-512" in capsys.readouterr().out
    assert not vendor.VENDOR.exists()


def test_network_failure_is_told(vendor, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "npm error network\nnpm error code ENOTFOUND")
    monkeypatch.setattr(vendor.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(vendor.subprocess, "run", lambda *a, **k: failed)
    assert vendor.main([]) == 0
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
        assert re.fullmatch(r"(19|20)\d\d[a-z]?", entry.fields.get("year", "")), key
        assert entry.persons.get("author"), key
        assert "arxiv" not in entry.fields.get("note", "").lower(), f"{key}: as a note, its number is no link"


def test_no_work_is_listed_twice():
    entries = parse_file(BOOK / "references.bib").entries
    titles = [re.sub(r"\W", "", entry.fields["title"]).lower() for entry in entries.values()]
    assert sorted(titles) == sorted(set(titles))
    numbers = [entry.fields["eprint"] for entry in entries.values() if "eprint" in entry.fields]
    assert sorted(numbers) == sorted(set(numbers))


def test_no_two_works_are_cited_by_the_same_words():
    named = Counter()
    for entry in parse_file(BOOK / "references.bib").entries.values():
        names = [" ".join(person.prelast_names + person.last_names) for person in entry.persons["author"]]
        named[(names[0], names[1] if len(names) == 2 else len(names) > 2, entry.fields["year"])] += 1
    assert [words for words, count in named.items() if count > 1] == []  # 2024a and 2024b tell two apart


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_citations_are_in_the_bibliography(file):
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    cited = {key.strip() for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text) for key in keys.split(",")}
    assert cited <= set(parse_file(BOOK / "references.bib").entries)


def test_front_page_asks_the_question_of_every_chapter():
    tables = script(BOOK / "_ext" / "tables.py")
    listed = tables.chapters(ROOT)
    assert all(f"notebooks/{file.stem}.ipynb" in listed for file in NOTEBOOKS)
    assert all(chapter.question.endswith("?") and chapter.question in listed for chapter in load().chapters)


def test_the_charts_of_the_front_page_are_those_of_the_records():
    stale = [path.name for path, content in record_figure.files(ROOT).items() if path.read_text() != content]
    assert stale == [], "python -m tools.record_figure draws them anew"


def test_every_part_of_the_course_begins_with_a_page_that_lists_its_chapters():
    tables = script(BOOK / "_ext" / "tables.py")
    for part in yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]:
        files = [chapter["file"] for chapter in part["chapters"]]
        chapters = [file for file in files if file.startswith("notebooks/")]
        if len(chapters) > 1:
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


def test_the_time_that_the_whole_takes_is_the_sum_of_the_chapters():
    texts = ["".join("".join(c["source"]) for c in json.loads(n.read_text())["cells"]) for n in NOTEBOOKS]
    minutes = [int(re.search(r"\*\*Time:\*\* (\d+) minutes", text)[1]) for text in texts]
    for page in (BOOK / "index.md", ROOT / "README.md"):
        told = re.search(r"All (\d+) chapters together take about (\d+) hours to read", page.read_text())
        assert (int(told[1]), int(told[2])) == (len(minutes), round(sum(minutes) / 60))


def test_the_teachers_page_tells_the_minutes_of_each_chapter():
    tables, times = script(BOOK / "_ext" / "tables.py"), {}
    for notebook in NOTEBOOKS:
        text = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
        times[notebook.stem] = re.search(r"\*\*Time:\*\* (\d+) minutes", text)[1]
    assert "{{ times }}" in (BOOK / "teachers.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[\]\(notebooks/([\w-]+)\.ipynb\) \| (\d+) \| [1-9]\d* \|$", tables.times(ROOT), re.M)
    assert dict(listed) == times
    set_by_weeks = re.findall(r"\[\]\(notebooks/([\w-]+)\.ipynb\), (\d+) minutes", tables.syllabuses(ROOT))
    assert set_by_weeks
    assert {name: times[name] for name, _ in set_by_weeks} == dict(set_by_weeks)


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


@pytest.mark.parametrize(
    ("ratios", "told"),
    [
        ([1.04, 1.07, 1.11], "1.04 to 1.11, middle 1.07"),  # two digits would say "1 to 1.1"
        ([1.113, 1.114], "1.11"),
        ([0.0031, 0.3, 195.6], "0.0031 to 196, middle 0.30"),
    ],
)
def test_results_page_tells_ratios_that_lie_near_one_apart(ratios, told):
    assert script(BOOK / "_ext" / "results.py").spread_of(ratios) == told


def test_results_page_shows_something_of_every_file():
    results = script(BOOK / "_ext" / "results.py")
    for file, record in results.records_of(ROOT / "benchmarks" / "results"):
        assert "\n| " in results.body(record), f"{file.name} has a heading and a command on the page, and no number"


def test_results_page_says_which_faults_were_planted():
    findings = [
        {"case": "step 1", "tool": "memcheck", "summary": "0 errors", "expected": "clean", "clean": True},
        {"case": "step 2", "tool": "memcheck", "summary": "3 errors", "expected": "clean", "clean": False},
        {"case": "control: short", "tool": "memcheck", "summary": "1 error", "expected": "errors", "clean": False},
    ]
    told = script(BOOK / "_ext" / "results.py").sanitizer_table(findings)
    assert "| step 1 | memcheck | 0 errors | nothing |" in told
    assert "| control: short | memcheck | 1 error | the planted fault |" in told
    assert "found in 1 of 2 runs of kernels. The planted fault was found in 1 of 1 controls." in told


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("copy_bytes_per_second", 4.256e12, "4.26\xa0TB/s"),
        ("matmul_flops_per_second", 1.4222e11, "142\xa0GFLOP/s"),
        ("matmul_bfloat16_tflops", 679.0, "679\xa0TFLOP/s"),
        ("copy_gb_s", 19.63, "19.6\xa0GB/s"),
        ("bytes sent: ring: counted", 402653184.0, "402,653,184\xa0B"),
        ("bytes sent: ring: operations", 8, "8"),
        ("forecast: 350M ddp: held", 5672796160, "5,672,796,160\xa0B"),
        ("soak_draft_blocks_held", 0, "0"),
        ("spilled_bytes", 0, "0\xa0B"),
        ("launch_seconds", 1.908e-06, "1.91\xa0µs"),
        ("wall_seconds_ratios", 0.0, "0\xa0s"),
        ("microseconds_per_live_block: forward", 0.09739, "97.4\xa0ns"),
        ("kernels of GPT-2: milliseconds: ours: kinds: loss", 5.025, "5.03\xa0ms"),
        ("eager: window_us_with_operators", 6401, "6.4\xa0ms"),
        ("engine_tokens_per_second_while_some_wait", 45285.0, "45,285"),
        ("relative_error", 0.0023451, "0.002345"),
        ("copy_bytes_per_second", None, "None"),
        ("seconds_are_compared", True, "True"),
    ],
)
def test_results_page_tells_measures_with_their_unit(name, value, told):
    assert script(BOOK / "_ext" / "results.py").fact(name, value) == told


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("engine_median_host_seconds_per_decode_step", "engine median host time per decode step"),
        ("wall_seconds_nano-vllm, 64 GiB", "wall time, nano-vllm, 64 GiB"),
        ("ttft_objective_ms", "TTFT objective"),
        ("matmul_bfloat16_tflops", "matmul bfloat16"),
        ("best_val_loss", "best validation loss"),
        ("eager: window_us_with_operators", "eager: window time with operators"),
        ("attention: attend_sdpa / attend: ratio", r"attention: attend\_sdpa / attend: ratio"),  # names of functions
        ("config: model: norm_first", "`config: model: norm_first`"),  # a setting, to look for in the code
        ("a | b", r"a \| b"),
    ],
)
def test_results_page_names_facts_in_words(name, told):
    assert script(BOOK / "_ext" / "results.py").called(name) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(1.0, "2.00 times as fast as b"), (4.0, "takes 2.00 times as long as b"), (2.004, "as fast as b")],
)
def test_results_page_compares_a_row_with_its_peer(seconds, told):
    rows = {name: {"case": "c", "contestant": name, "name": name} for name in "ab"}
    rows["a"] |= {"seconds": seconds, "peer": "b"}
    rows["b"] |= {"seconds": 2.0, "peer": None}
    assert script(BOOK / "_ext" / "results.py").beside(rows["a"], rows) == told


@pytest.mark.parametrize("page", sorted([*BOOK.glob("*.md"), *BOOK.glob("parts/*.md")]), ids=lambda page: page.stem)
def test_page_has_one_title(page):
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(re.findall(r"^# ", text, flags=re.MULTILINE)) == 1
    assert text.startswith("# ")


def test_terms_are_found_as_whole_words():
    terms = script(BOOK / "_ext" / "terms.py")
    known = terms.definitions((BOOK / "glossary.md").read_text(encoding="utf-8"))
    assert len(known) > 40
    assert sum(len(meaning) > 20 for meaning in known.values()) > 40
    assert not [meaning for meaning in known.values() if re.search(r"[{`\\]", meaning)]
    assert [
        terms.named(m, known) for m in terms.pattern(known).findall("Tokens have a KV cache; the causal mask hides")
    ] == [*("token", "KV cache", "causal mask")]
    for other in ("ahead", "multi-tokens", "mla", "headless"):
        assert not terms.pattern(known).search(other)
    assert all((ROOT / "notebooks" / f"{chapter}.ipynb").exists() for chapter in terms.OTHER_SENSE)


def test_the_names_of_one_entry_are_linked_once():
    terms = script(BOOK / "_ext" / "terms.py")
    known = terms.definitions((BOOK / "glossary.md").read_text(encoding="utf-8"))
    assert set(terms.names_of_one_entry("TTFT", known)) == {"time to first token", "TTFT"}
    assert terms.names_of_one_entry("query", known) == ["query"]


def test_printed_tables_are_told_from_printed_sentences():
    mark = script(BOOK / "_ext" / "markup.py").mark_tables
    output = '<div class="output stream highlight-myst"><div><pre><span></span>{}\n</pre></div></div>'
    table = output.format("size   loss  steps\n  1    0.5      10\n 20    0.25     20\n300    0.1      30")
    prose = output.format("the loss falls: True\nand then,  rarely, it rises\nagain\nand again")
    sentences = output.format("at length   100: slowed by 1.0\nat length   512: by 2.0\nat length 1,024: by  4.0")
    assert "stream highlight-myst tf-table" in mark(table)
    assert mark(prose) == prose
    assert mark(sentences) == sentences, "numbers that are set right make no table"
    assert mark(prose + table).count("tf-table") == 1


def test_a_date_stays_on_one_line():
    join = script(BOOK / "_ext" / "markup.py").join_units
    assert join("<td>2026-11-30</td>") == '<td><span class="tf-joined">2026-11-30</span></td>'
    assert join("<code>2026-11-30</code>") == "<code>2026-11-30</code>"
    assert join("<td>12026-11-305</td>") == "<td>12026-11-305</td>"


def test_a_unit_stays_on_the_line_of_its_number():
    join = script(BOOK / "_ext" / "markup.py").join_units
    assert join("<p>It takes 13 % of 5.7 ms and <b>6</b> GB</p>") == (
        "<p>It takes 13\xa0% of 5.7\xa0ms and <b>6</b>\xa0GB</p>"
    )
    assert join('<p id="top-k">With top-k, desktop-k</p>') == (
        '<p id="top-k">With <span class="tf-joined">top-k</span>, desktop-k</p>'
    )
    assert join("<p>3.05 and 3.06 s. 257 kB, 2 sums</p>") == "<p>3.05 and 3.06\xa0s. 257\xa0kB, 2 sums</p>"
    for left in (
        "<pre>13 % of\n<span>5</span> ms</pre>",
        "<code>6 GB</code>",
        '<img alt="13 %"/>',
        "<p>2 GBs, 3 msec, the % sign</p>",
        "<p>no unit</p>",
    ):
        assert join(left) == left


def test_a_result_a_point_and_a_name_are_not_broken():
    join = script(BOOK / "_ext" / "markup.py").join_units
    assert join("<p>4 · (−1) + 2 · 3 = 2 at (0.5, −2)</p>") == "<p>4\xa0· (−1) + 2\xa0· 3 =\xa02 at (0.5,\xa0−2)</p>"
    assert join("<p>GPT-4o and DeepSeek-V3</p>") == (
        '<p><span class="tf-joined">GPT-4o</span> and <span class="tf-joined">DeepSeek-V3</span></p>'
    )
    for left in ("<p>(batch, T, 64) = x, a well-known pre-1990 name</p>", "<code>a = 3, (1, 2)</code>"):
        assert "\xa0" not in join(left)


def test_the_number_of_a_chapter_stays_beside_its_title():
    join = script(BOOK / "_ext" / "markup.py").join_chapters
    link = '<a class="reference internal" href="03-masks.html"><span class="std std-doc">3. Masks</span></a>'
    assert join(link) == link.replace("3. Masks", "3.\xa0Masks")
    assert join("<p>3. Masks</p>") == "<p>3. Masks</p>"


def test_a_printed_token_and_an_arrow_are_not_broken():
    join = script(BOOK / "_ext" / "markup.py").join_printed
    printed = "<div class=\"output stream\"><pre>['I', ' have', ' a b']\n</pre></div>"
    token = "<span class=\"tf-joined\">' have'</span>"
    space = token.replace(" have", " ")
    assert join(printed) == printed.replace("' have'", token).replace("' ',", f"{space},")
    comment = '<span class="c1"># (T, d) -&gt; (T,)</span>'
    assert join(comment) == comment.replace("-&gt;", '<span class="tf-joined">-&gt;</span>')
    for left in ("<pre>x = ' have'</pre>", '<span class="o">-&gt;</span>'):
        assert join(left) == left


def test_a_mark_stays_beside_its_formula():
    join = script(BOOK / "_ext" / "markup.py").join_marks
    formula = '<span class="math notranslate nohighlight">\\(O\\)</span>'
    assert join(f"<p>an output ({formula}), kept</p>") == (
        f'<p>an output <span class="tf-joined">({formula}),</span> kept</p>'
    )
    for left in (f"<p>the output {formula} is</p>", f"<p>(the output {formula} is)</p>"):
        assert join(left) == left


# Opening the chapters elsewhere


def launched(**settings) -> dict:
    """The theme's options after the launch extension saw the configuration with these settings."""
    options = {"launch_buttons": {"thebe": False}, "use_download_button": True}
    config = SimpleNamespace(html_theme_options=options, **{"course_address": "", "course_hub": "", **settings})
    script(BOOK / "_ext" / "launch.py").offer(None, config)
    return config.html_theme_options


def test_no_button_leads_elsewhere_without_an_address():
    assert launched() == {"launch_buttons": {"thebe": False}, "use_download_button": True}
    config = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]["config"]
    assert {"course_address", "course_hub"} <= set(config)


def test_one_setting_turns_the_buttons_on():
    options = launched(course_address="https://github.com/someone/lab/", course_hub="https://hub.school.edu")
    assert options["repository_url"] == "https://github.com/someone/lab"
    assert options["use_repository_button"]
    assert options["use_issues_button"]
    assert set(options["launch_buttons"]) == {"thebe", "binderhub_url", "colab_url", "jupyterhub_url"}
    with pytest.raises(Exception, match="https://github"):
        launched(course_address="git@github.com:someone/lab")


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of the configuration and two chapters."""
    (tmp_path / "notebooks").mkdir()
    for file in (ROOT / "_config.yml", *NOTEBOOKS[:2]):
        (tmp_path / file.relative_to(ROOT)).write_bytes(file.read_bytes())
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_address_goes_into_the_configuration_and_the_chapters_and_out_again(copied):
    set_address = script(ROOT / "tools" / "address.py").set_address
    before = contents(copied)
    set_address(copied, "https://github.com/someone/lab")
    after = contents(copied)
    assert all(after[name] != before[name] for name in before)
    config = yaml.safe_load((copied / "_config.yml").read_text())
    assert config["sphinx"]["config"]["course_address"] == "https://github.com/someone/lab"
    for path in (copied / "notebooks").glob("*.ipynb"):
        assert not rules.complaints(path)
        cell = next(c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code")
        assert cell["metadata"]["tags"] == ["remove-cell"], "the page does not show it"
        assert "git clone" in "".join(cell["source"])
        assert "https://github.com/someone/lab " in "".join(cell["source"])
    set_address(copied, "https://github.com/someone/lab")
    assert contents(copied) == after, "a second time changes nothing"
    set_address(copied, "")
    assert contents(copied) == before


@pytest.mark.parametrize("given", ["", " ", "https://github.com/someone/lab.git/", "http://github.com/a/b", "a/b"])
def test_an_address_is_set_or_refused_in_one_line(given, copied, capsys):
    module = script(ROOT / "tools" / "address.py")
    module.ROOT = copied
    before, fits = contents(copied), given.strip().startswith("https://") or not given.strip()
    assert module.main([given]) == (0 if fits else 2)
    said = capsys.readouterr()
    assert (said.err == "") == fits
    assert (said.out + said.err).count("\n") == 1
    assert (contents(copied) == before) == (not given.startswith("https://"))
    assert "https://github.com/someone/lab" in said.out or not given.startswith("https://")


def test_colab_s_cell_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    shell = InteractiveShell()
    asked = []
    shell.run_line_magic = lambda *call, **options: asked.append(call)
    shell.system = asked.append
    source = "".join(script(ROOT / "tools" / "address.py").colab_cell("https://github.com/someone/lab")["source"])
    shell.run_cell(source).raise_error()
    assert asked == []
    assert "/content/course" not in sys.path
    sys.modules["google.colab"] = sys
    try:
        shell.run_cell(source).raise_error()
    finally:
        del sys.modules["google.colab"]
    assert len(asked) == 3
    assert "/content/course" in sys.path, "a running kernel does not see an editable install"


# Containers and workflows, which cannot be run here, are read


def test_container_installs_and_serves_the_course():
    text = (ROOT / "Dockerfile").read_text()
    steps = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    words = [line.split(maxsplit=1)[0] for line in steps.splitlines() if line.strip()]
    assert set(words) <= {"ARG", "FROM", "RUN", "COPY", "WORKDIR", "USER", "ENV", "EXPOSE", "CMD"}
    assert "make setup" in steps
    before, _, after = steps.partition("make setup")
    assert re.findall(r"^COPY .*", before, re.MULTILINE) == [
        "COPY --chown=learner:learner pyproject.toml Makefile README.md LICENSE ./"
    ], "a change of the course would install everything again"
    assert re.findall(r"^COPY .*", after, re.MULTILINE) == ["COPY --chown=learner:learner . ."]
    assert "USER root" not in steps.split("CMD")[0].splitlines()[-1]
    command = json.loads(re.search(r"^CMD (\[.*\])$", steps, re.MULTILINE)[1])
    assert "lab" in command
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert container["postCreateCommand"] == "make setup TORCH=cpu"


@pytest.mark.parametrize("name", ["test", "publish"])
def test_workflow_calls_the_commands_of_the_readme(name):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = " ".join(step.get("run", "") for step in steps)
    if name == "test":
        assert commands.split() == [".ci/run"]
        script = ROOT / ".ci" / "run"
        assert os.access(script, os.X_OK)
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        commands = script.read_text()
        assert re.findall(r"^make .*", commands, re.MULTILINE) == ["make lint", "make book", "make test"]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set(re.findall(r"\bmake ([a-z]+)", commands))
    assert called
    assert called <= targets
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    if name == "publish":
        assert {"pages": "write", "id-token": "write"}.items() <= workflow["permissions"].items()


def test_the_table_of_names_has_names_that_are_there():
    table = (BOOK / "notation.md").read_text(encoding="utf-8").partition("## The same settings under other names")[2]
    ours = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| ") and "---" not in line)
    words = {word.partition("=")[0] for word in re.findall(r"`([^`]+)`", ours)}
    taken = {*signature(flash_attention.flash_attention).parameters}
    taken |= {*signature(flash_attention.flash_attention_varlen).parameters, "flash_attention_varlen"}
    assert len(words) > 8
    assert words <= taken


def test_the_picture_of_a_page_shows_the_figure_as_it_is_now():
    noted = f"figure\0{page_picture.checksum()}".encode()
    assert noted in page_picture.PICTURE.read_bytes(), "make book, then: python -m tools.page_picture"


@pytest.fixture
def small_book(tmp_path) -> Path:
    """The sources of three pages, for Sphinx alone: the front page, one chapter and the glossary."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(BOOK / '_ext')!r})\nextensions = ['search']\n"
    )
    (tmp_path / "index.rst").write_text("Front\n=====\n\n.. toctree::\n\n   notebooks/09-kv-cache\n   glossary\n")
    (tmp_path / "notebooks" / "09-kv-cache.rst").write_text("The KV cache\n============\n\nText.\n")
    (tmp_path / "glossary.rst").write_text("Glossary\n========\n\n.. glossary::\n\n   KV cache\n      What is kept.\n")
    return tmp_path


def subjects_in_the_index(book: Path) -> dict[str, set[str]]:
    """Build the small book, in a process of its own as a reader does; subject -> the pages that it leads to."""
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(book), str(book / "out")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    text = (book / "out" / "searchindex.js").read_text()
    index = json.loads(text[text.index("{") : text.rindex("}") + 1])
    return {
        word: {index["docnames"][number] for number, *_ in places} for word, places in index["indexentries"].items()
    }


def test_a_second_build_keeps_the_subjects_of_unchanged_pages(small_book):
    first = subjects_in_the_index(small_book)
    assert first["kv cache"] == {"notebooks/09-kv-cache", "glossary"}
    front = small_book / "index.rst"
    front.write_text(front.read_text() + "\nOne more sentence.\n")
    assert subjects_in_the_index(small_book) == first
    (small_book / "glossary.rst").write_text("Glossary\n========\n\nThe term went.\n")
    assert subjects_in_the_index(small_book) == {word: {"notebooks/09-kv-cache"} for word in first}
    front.write_text(front.read_text().replace("   glossary\n", ""))
    (small_book / "glossary.rst").unlink()
    assert subjects_in_the_index(small_book) == {word: {"notebooks/09-kv-cache"} for word in first}
