"""Counters: what Nsight Compute measured of each kernel, read from its CSV."""

import csv
import re
from pathlib import Path

from tformer_lib.profiling.intervals import short_name

COUNTERS = {
    "seconds": ("gpu__time_duration.sum",),
    "sm_share": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "issue_share": (
        "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
        "smsp__issue_active.avg.pct_of_peak_sustained_active",
    ),
    "tensor_share": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",),
    "dram_share": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",),
    "dram_read": ("dram__bytes_read.sum",),
    "l2_hits": ("lts__t_sector_hit_rate.pct",),
    "occupancy": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}
"""Our word -> Nsight Compute's, the first that was collected. Shares are of a peak: what the processors, their tensor
cores and the memory can do, the cycles in which an instruction could be issued, the warps that fit."""

STALLS = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
"""Why a warp did not issue an instruction; "selected" and "not_selected" are no reasons to wait."""

UNITS = {"ns": 1e-9, "us": 1e-6, "usecond": 1e-6, "nsecond": 1e-9, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0}
UNITS |= {f"{prefix}byte": 10.0**power for prefix, power in (("", 0), ("K", 3), ("M", 6), ("G", 9))} | {"%": 0.01}


def read_counters(path: Path | str, wanted: dict[str, tuple[str, ...]] = COUNTERS) -> list[dict]:
    """The kernels of a CSV that ``ncu --import report --csv --page raw`` printed, in the order they ran.

    Args:
        path: the file, or what :func:`shorten_counters` made of it.
        wanted: our word -> the names that a counter goes by; those that were not collected are left out.

    Returns:
        One dict a kernel: its name as ``"name"``, a short one as ``"kernel"``, each counter in seconds, bytes, shares
        or numbers, and as ``"waits_for"`` the commonest reason why its warps waited, where those were collected.
    """
    _, units, kernels = raw_page(path)
    named = [{"name": row["Kernel Name"], "kernel": short_name(row["Kernel Name"])} for row in kernels]
    return [names | counters_of(row, units, wanted) for names, row in zip(named, kernels, strict=True)]


def raw_page(path: Path | str) -> tuple[list[str], dict[str, str], list[dict[str, str]]]:
    """The columns of a raw page, the unit of each, and its rows.

    Raises:
        ValueError: the file is not ncu's raw page.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"') or line.startswith("ID,")), len(lines))
    reader = csv.DictReader(lines[start:])
    rows = list(reader)
    if not rows or "Kernel Name" not in rows[0]:
        raise ValueError(f"{path} is not the raw page of ncu: make it with ncu --import FILE --csv --page raw")
    return list(reader.fieldnames), rows[0], rows[1:]


def counters_of(row: dict[str, str], units: dict[str, str], wanted: dict[str, tuple[str, ...]]) -> dict:
    """One row's counters as numbers, in the unit that the second line of the file names."""
    found = {}
    for word, names in wanted.items():
        name = next((name for name in names if number_in(row.get(name)) is not None), None)
        if name is not None:
            found[word] = number_in(row[name]) * UNITS.get(units[name], 1.0)
    stalls = {match[1]: number_in(row[name]) or 0.0 for name in row if (match := STALLS.fullmatch(name))}
    reasons = {reason: value for reason, value in stalls.items() if "selected" not in reason}
    return found | ({"waits_for": max(reasons, key=reasons.get).replace("_", " ")} if reasons else {})


def number_in(text: str | None) -> float | None:
    """A number as ncu writes it, with commas between thousands; None where there is none."""
    return None if text in (None, "", "n/a", "nan") else float(text.replace(",", ""))


def shorten_counters(path: Path | str, out: Path | str, wanted: dict[str, tuple[str, ...]] = COUNTERS) -> None:
    """Copy of a raw page only the columns that :func:`read_counters` reads: a few kilobytes instead of hundreds."""
    columns, units, kernels = raw_page(path)
    named = ("ID", "Kernel Name", "Block Size", "Grid Size", *(name for names in wanted.values() for name in names))
    kept = [name for name in columns if name in named or STALLS.fullmatch(name)]
    with Path(out).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, kept, extrasaction="ignore", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows([units, *kernels])
