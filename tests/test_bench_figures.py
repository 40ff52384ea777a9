"""Figures that docs/performance.md takes from the results of the H200 are those of the file."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the report needs rich: pip install retainops[bench]")

from bench.figures import Figures
from bench.figures import job as job_of
from bench.record import Row, Run

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "performance.md").read_text()
ROWS = PAGE.split("\n## Rows\n")[1].split("**Slower than a peer**")[0]
SLOWER = PAGE.split("**Slower than a peer**")[1].split("**Below the aim**")[0]
RUN = Run.load(ROOT / "bench" / "results" / "nvidia-h200")
FIGURES = Figures(RUN.rows)
COLUMNS = [(dtype, direction) for dtype in ("fp32", "bf16") for direction in ("forward", "backward")]
OF_ROWS = {r.op for r in RUN.rows if r.size.startswith("rows of")} | {"softmax", "log_softmax", "add_layer_norm"}
CROSS_ENTROPY = ("cross_entropy", "4096")
OF_ROWS |= {"cross_entropy", "rope", "group_norm"}


def row(op: str, size: str, dtype: str, job: str, variant: str = "retainops") -> Row:
    (found,) = (
        r
        for r in RUN.rows
        if (r.op, r.size, r.dtype, job_of(r), r.variant, r.label) == (op, size, dtype, job, variant, "")
    )
    return found


def longer(op: str, size: str, dtype: str, job: str, peer: str = "torch.compile") -> str:
    """By how much our time is longer than a peer's."""
    ours, theirs = row(op, size, dtype, job).seconds, row(op, size, dtype, job, peer).seconds
    return f"{ours / theirs - 1:.0%}"


def cells() -> Iterator[tuple[str, str, str, str, str]]:
    """Of the tables of rows: op, width, dtype, direction and what the cell says, if it says something."""
    op = ""
    for line in re.findall(r"^\|(.*)\|$", ROWS, re.MULTILINE):
        first, width, *said = (cell.strip() for cell in line.split("|"))
        op = first or op
        if width.split() and width.split()[0].isdecimal():
            for (dtype, direction), cell in zip(COLUMNS, said, strict=True):
                if cell:
                    yield op, width.split()[0], dtype, direction, cell


def test_a_cell_is_in_one_table() -> None:
    places = [cell[:4] for cell in cells()]
    assert len(places) > 100
    assert [place for place in set(places) if places.count(place) > 1] == []


def test_times_beside_ours_are_those_of_the_run() -> None:
    checked = 0
    for op, width, dtype, direction, cell in cells():
        if (beside := re.search(r"\((.+), (.+)\)", cell)) is None:
            continue
        size = f"rows of {width}"
        ours = row(op, size, dtype, direction).seconds
        for said, peer in zip(beside.groups(), ("torch.compile", "Liger-Kernel"), strict=True):
            if said[0].isdecimal():  # a dash: not measured
                assert said == f"{row(op, size, dtype, direction, peer).seconds / ours:.2f}", (op, width, dtype, peer)
                checked += 1
    assert checked > 100


def test_cross_entropy_is_beside_the_faster_mode_of_the_run() -> None:
    said = {(dtype, direction): cell for op, width, dtype, direction, cell in cells() if (op, width) == CROSS_ENTROPY}
    for (dtype, direction), cell in said.items():
        variants = ("torch.compile", "torch.compile, max-autotune")
        modes = [row("cross_entropy", "64 MiB", dtype, direction, variant) for variant in variants]
        best = max(FIGURES.of_copy(mode) or 0 for mode in modes)
        ours = FIGURES.of_copy(row("cross_entropy", "64 MiB", dtype, direction))
        assert cell == f"{ours:.0%} ({best:.0%})"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_ranges_of_pointwise_ops_are_those_of_the_run(dtype: str) -> None:
    """In bf16 but for the exceptions that the page names, which are below these."""
    (said,) = re.findall(rf"^\| {dtype} \| (\d+)% to (\d+)%.* \| (\d+)% to (\d+)%.* \| (\d+)% to (\d+)%;", PAGE, re.M)
    ours = [
        r
        for r in RUN.rows
        if (r.dtype, r.size, r.variant, r.form, r.label) == (dtype, "64 MiB", "retainops", "", "")
        and r.op not in OF_ROWS
    ]
    exceptions = {("div_cos", "forward"), ("div_sigmoid", "forward"), ("div_sin", "backward")}
    for i, (direction, kept) in enumerate((("forward", False), ("backward", False), ("backward", True))):
        found = [
            FIGURES.of_copy(r) or 0
            for r in ours
            if (r.direction, bool(r.point)) == (direction, kept)
            and (dtype == "fp32" or kept or (r.op, direction) not in exceptions)
        ]
        assert tuple(said[2 * i : 2 * i + 2]) == (f"{min(found) * 100:.0f}", f"{max(found) * 100:.0f}")


def test_slower_is_by_time() -> None:
    for words in (
        f"layer_norm by {longer('layer_norm', 'rows of 32768', 'fp32', 'forward')} in fp32 and "
        f"{longer('layer_norm', 'rows of 32768', 'bf16', 'forward')} in bf16",
        f"in fp32, by {longer('add_rms_norm', 'rows of 16384', 'fp32', 'backward', 'Liger-Kernel')} beside Liger",
        f"by {longer('group_norm', '64 MiB', 'fp32', 'forward')} (fp32) and "
        f"{longer('group_norm', '64 MiB', 'bf16', 'forward')} (bf16)",
        f"sums by {longer('add_rms_norm', 'rows of 32768', 'fp32', 'forward', 'Liger-Kernel')} and "
        f"{longer('add_rms_norm', 'rows of 32768', 'fp32', 'forward')}",
    ):
        assert words in " ".join(SLOWER.split())
    assert f"`div_sigmoid` (ours is {longer('div_sigmoid', '64 MiB', 'bf16', 'forward')} slower)" in PAGE
    assert f"`div_exp` ({longer('div_exp', '64 MiB', 'bf16', 'forward')}) in bf16" in PAGE


def test_group_norm_is_as_measured() -> None:
    forward, backward = (row("group_norm", "64 MiB", "fp32", job) for job in ("forward", "backward"))
    times = f"{forward.seconds * 1e6:.1f} µs forward and {backward.seconds * 1e6:.0f} µs backward in fp32"
    assert times in PAGE
    assert f"{FIGURES.of_copy(forward):.0%} and {FIGURES.of_copy(backward):.0%} of a copy" in " ".join(PAGE.split())
