"""What the chapter on kernels stands on: excerpts of the sources, the learner's loop, and the figures' formulas."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tformer_lib import flash_attention, jit
from tformer_lib.attention import attend
from tformer_lib.flash_attention import in_triton
from tformer_lib.teaching import kernels
from tformer_lib.teaching.exercises.flash_kernels import true_attention
from tformer_lib.teaching.widgets import flash_kernels as widgets

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "nvidia-h200"
NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
needs_compiler = pytest.mark.skipif(not jit.can_build_cpp(), reason="needs a C++ compiler and ninja")

TEXT = """
struct Pair {
    int a, b;
};

// Twice x.
template <class T>
T twice(T x) {
    if (x > 0) { return x + x; }
    return twice<T>(-x);
}

int other() { return twice(2); }
"""


def test_a_definition_is_shown_with_its_comment_and_no_more():
    assert kernels.definition(TEXT, "Pair") == "struct Pair {\n    int a, b;\n};"
    assert kernels.definition(TEXT, "twice").startswith("// Twice x.\ntemplate <class T>\nT twice(T x) {")
    assert kernels.definition(TEXT, "twice").endswith("return twice<T>(-x);\n}")
    with pytest.raises(ValueError, match="nothing called 'thrice'"):
        kernels.definition(TEXT, "thrice")


def test_lines_are_shown_up_to_a_text_or_to_their_brace():
    assert kernels.between(TEXT, "if (x > 0)", None) == "if (x > 0) { return x + x; }"
    assert kernels.between(TEXT, "struct Pair", "Twice x") == "struct Pair {\n    int a, b;\n};"
    with pytest.raises(ValueError, match="no line holds"):
        kernels.between(TEXT, "nowhere", "Pair")
    with pytest.raises(ValueError, match="no line after"):
        kernels.between(TEXT, "other()", "Pair")


def test_lines_from_the_middle_end_without_braces_that_nothing_shown_opens():
    assert kernels.between(TEXT, "if (x > 0)", "int other") == "if (x > 0) { return x + x; }\nreturn twice<T>(-x);"
    assert kernels.between("f {\n  a;\n  if {\n    b;\n  }\n}\n};\nend", "a;", "end") == "a;\nif {\n  b;\n}"


def test_lines_keep_the_depth_that_they_have_to_one_another():
    text = "    {\n        a;\n#pragma unroll\n        b;\n    }\n    c;"
    assert kernels.between(text + "\nend", "a;", "end") == ("    a;\n#pragma unroll\n    b;\n}\nc;")


def test_functions_are_replaced_by_name():
    text = kernels.replace_functions(TEXT, "\nint other() { return 5; }\n")
    assert "return 5;" in text
    assert "twice(2)" not in text
    assert f'#line 2 "{kernels.EDITED}"' in text
    for wrong, message in (("7", "no function in your text"), ("int third() { return 3; }", "no function 'third'")):
        with pytest.raises(kernels.KernelError, match=message):
            kernels.replace_functions(TEXT, wrong)


@needs_compiler
@pytest.mark.parametrize(("T", "S", "causal"), [(1, 1, False), (16, 32, True), (33, 70, True), (50, 20, True)])
def test_the_small_kernel_is_attention(T, S, causal):
    q, k, v = torch.randn(T, 12), torch.randn(S, 12), torch.randn(S, 12)
    out = kernels.run_small(kernels.compile_small(), q, k, v, causal=causal)
    torch.testing.assert_close(out.double(), true_attention(q, k, v, causal), rtol=0, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(
    ("edited", "message"),
    [
        ("int last_key(const Problem& p, int i) { return p.missing; }", r"does not compile: your kernel:1:\d+: error"),
        ("int last_key(const Problem& p, int i) { __builtin_trap(); }", "it crashed"),
        ("int first_key(const Problem& p, int) { p.out[-1] = 0; return 0; }", "writes outside of out"),
    ],
)
def test_a_kernel_that_fails_harms_nobody(edited, message):
    q = torch.randn(4, 8)
    with pytest.raises(kernels.KernelError, match=message):
        kernels.run_small(kernels.compile_small(edited), q, q, q)


@needs_compiler
def test_a_kernel_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(kernels, "SECONDS", 0.5)
    q = torch.randn(4, 8)
    endless = 'int first_key(const Problem&, int) { for (;;) asm volatile(""); }'
    with pytest.raises(kernels.KernelError, match="does a loop not move on"):
        kernels.run_small(kernels.compile_small(endless), q, q, q)


def test_without_a_compiler_the_learner_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(jit, "can_build_cpp", lambda: False)
    with pytest.raises(kernels.KernelError, match=r"install g\+\+"):
        kernels.compile_small()


def test_every_layout_of_the_bank_explorer_keeps_all_pieces_apart():
    for d, layouts in widgets.banks().data["places"].items():
        for layout, rows in layouts.items():
            places = [place for row in rows for place in row]
            assert len(set(places)) == len(places), (d, layout)
        turns = {name: max_in_one_group([row[3] for row in rows]) for name, rows in layouts.items()}
        assert turns == {"as it comes": 8, "one piece of padding a row": 1, "XOR swizzle": 1}


def max_in_one_group(places: list[int]) -> int:
    """How many of the places lie in the busiest group of banks."""
    groups = [place % widgets.GROUPS for place in places]
    return max(groups.count(group) for group in groups)


DEALING = """
#define __device__
#include <cmath>
#include <cstdio>
#include <cstdlib>
using std::max, std::min;
#include "flash_attention/sight.cuh"

int main() {
    flash::Arguments a{};
    a.kv_heads = 1;
    while (std::scanf("%ld %ld %ld %d %ld %ld %ld", &a.queries, &a.keys, &a.window, &a.ahead, &a.batch, &a.heads,
                      &a.head_dim) == 7) {
        a.value_dim = a.head_dim;
        const int tiles = (a.queries + 127) / 128, together = flash::heads_in_bundle(a, 2);
        std::printf("%d", together);
        for (int i = 0; i < tiles * a.batch * a.heads; ++i) {
            const flash::Work work = flash::work_in_bundles(i, a.batch, a.heads, tiles, together);
            std::printf(" %d,%d,%d", int(work.b), int(work.h), work.tile);
        }
        std::puts("");
    }
}
"""


@needs_compiler
def test_every_tile_of_rows_is_dealt_once_and_long_ones_first(tmp_path):
    """A block that takes a long tile last keeps all others waiting."""
    source, program = tmp_path / "dealing.cpp", tmp_path / "dealing"
    source.write_text(DEALING)
    command = [jit.compiler(), "-std=c++20", f"-I{jit.kernels_folder()}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    lengths, windows, aheads = ((1, 1), (700, 700), (1300, 600), (300, 1700)), (0, 1, 129, 500, 9000), (-1, 0, 1, 260)
    sizes = ((1, 1, 128), (3, 5, 128), (3, 5, 8192))  # batch, heads, head_dim: a head, one bundle of heads, several
    shapes = list(itertools.product(lengths, windows, aheads, sizes))
    text = "".join(f"{T} {S} {window} {ahead} {b} {h} {d}\n" for (T, S), window, ahead, (b, h, d) in shapes)
    answers = subprocess.run([program], input=text, check=True, capture_output=True, text=True).stdout.splitlines()
    for ((T, _), window, ahead, (batch, heads, _)), answer in zip(shapes, answers, strict=True):
        together, *words = answer.split()
        dealt, tiles = [tuple(map(int, word.split(","))) for word in words], -(-T // 128)
        assert sorted(dealt) == list(itertools.product(range(batch), range(heads), range(tiles)))
        if window or ahead != 0:
            continue  # tiles are alike, but for those at the ends of the text
        for begin in range(0, len(dealt), int(together) * tiles):
            order = [tile for *_, tile in dealt[begin : begin + int(together) * tiles]]
            assert order == sorted(order, reverse=True)  # the last rows see the most keys


def test_every_rung_has_a_name_and_the_last_is_the_step():
    for step, rungs in flash_attention.RUNGS.items():
        assert rungs == tuple(f"{step}{letter}" for letter in "abcde")
        assert [flash_attention.LADDER.name(rung) for rung in rungs] == [*rungs[:-1], step]
        for rung in rungs[:-1]:
            assert jit.find_source("flash_attention", rung).stem.startswith(f"{rung}_")


def test_the_ledger_names_rows_that_were_measured():
    """A row of a changed kernel and the whole one beside it stand in the same file, which is one run."""
    for entry in json.loads((RESULTS / "flash_attention-ledger.json").read_text())["steps"]:
        assert {"step", "hypothesis", "predicted", "measured", "learnt"} == set(entry) - {"record"}
        record = json.loads((RESULTS / f"{entry.get('record', 'flash_attention')}.json").read_text())
        assert set(entry["measured"].values()) <= {row["name"] for row in record["rows"]}, entry["step"]


def test_the_alternative_texts_of_chapter_17_say_what_was_recorded():
    rows = json.loads((RESULTS / "flash_attention.json").read_text())["rows"]
    cells = json.loads((NOTEBOOKS / "17-flash-hopper.ipynb").read_text())["cells"]
    texts = [cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "") for cell in cells]
    charts = [text for text in texts if "bar charts" in text and "TFLOP" in text]
    assert len(charts) == 2
    for text in charts:
        way = "backward" if "backward" in text else "forward"
        said = re.findall(r"(step \w+|SDPA \w+|FlashAttention-3|[\w]+\.cu) near (\d+)", text)
        assert len(said) == text.count(" near ")
        for name, number in said:
            name = name.lower() if name.startswith("SDPA") else name
            speeds = [row["rate"] / 1e12 for row in rows if row["case"].startswith(way) and row["contestant"] == name]
            assert any(abs(speed - float(number)) <= 0.03 * speed for speed in speeds), (name, number)


def test_the_ledger_holds_no_measured_number():
    for entry in json.loads((RESULTS / "flash_attention-ledger.json").read_text())["steps"]:
        assert not re.search(r"\d", entry["learnt"].replace("d 64", "").replace("d 128", "")), entry["step"]


def test_the_translation_to_triton_refuses_in_words_what_it_cannot_do(monkeypatch):
    q = torch.randn(1, 2, 5, 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch sees none here"):
        in_triton.flash_attention_in_triton(q, q, q)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(in_triton, "triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed here"):
        in_triton.flash_attention_in_triton(q, q, q)
    monkeypatch.setattr(in_triton, "refusal", lambda: None)
    with pytest.raises(ValueError, match=r"bfloat16 and float16, got torch\.float32"):
        in_triton.flash_attention_in_triton(q, q, q)
    half, odd = q.bfloat16(), torch.randn(1, 2, 5, 24).bfloat16()
    with pytest.raises(ValueError, match=r"head_dim of .*, got 24"):
        in_triton.flash_attention_in_triton(odd, odd, odd)
    with pytest.raises(ValueError, match="a scale above 0, got -1"):
        in_triton.flash_attention_in_triton(half, half, half, scale=-1.0)
    with pytest.raises(ValueError, match="q has 2 heads"):
        in_triton.flash_attention_in_triton(half, half.repeat(1, 3, 1, 1), half.repeat(1, 3, 1, 1))


@pytest.mark.skipif(in_triton.refusal() is not None, reason=str(in_triton.refusal()))
@pytest.mark.parametrize(
    ("T", "S", "heads", "kv_heads"), [(1, 1, 1, 1), (5, 70, 2, 1), (40, 24, 2, 2), (129, 257, 4, 2)]
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", in_triton.HEAD_DIMS)
def test_the_translation_to_triton_is_attention(T, S, heads, kv_heads, causal, d):
    q = torch.randn(2, T, heads, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k, v = (torch.randn(2, kv_heads, S, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    exact = attend(q.double(), k.double(), v.double(), causal=causal)
    plain = (attend(q, k, v, causal=causal).double() - exact).abs().max()
    out = in_triton.flash_attention_in_triton(q, k, v, causal=causal)
    assert (out.double() - exact).abs().max() <= 2 * plain + 1e-5


IDLE = """
const all = (state) => Object.values(SCHEDULES).map((one) => Math.round(100 * simulate(one, state, 24).idle));
const wide = { product: 704, softmax: 1088, load: 1152, stages: 2 };
const narrow = { product: 256, softmax: 768, load: 416, stages: 2 };
console.log(JSON.stringify({
  wide: all(wide), narrow: all(narrow), "one buffer": all({ ...wide, stages: 1 }), "near": all({ ...wide, load: 416 }),
  "no softmax": all({ ...wide, softmax: 0 }), "no softmax, near": all({ ...wide, softmax: 0, load: 416 }),
}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the figure's code")
def test_the_pipeline_explorer_says_what_chapter_17_says():
    figure = (Path(widgets.__file__).parent / "flash_hopper.js").read_text(encoding="utf-8")
    done = subprocess.run(["node", "-e", figure + IDLE], capture_output=True, text=True, check=True)
    # in order, in lockstep, in turns, softmax beside products, both
    assert json.loads(done.stdout) == {
        "wide": [44, 44, 0, 39, 0],
        "narrow": [60, 60, 33, 50, 33],
        "one buffer": [44, 44, 12, 39, 0],
        "near": [44, 44, 0, 21, 0],
        "no softmax": [39, 0, 0, 39, 0],
        "no softmax, near": [0, 0, 0, 0, 0],
    }
