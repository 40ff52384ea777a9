"""Row ops at widths from 1k to 64k, 64 MiB each: where rows no longer fit in registers."""

from collections.abc import Callable, Iterator

from bench.cases import Case, peers_of
from bench.jobs import DTYPES, MIB, Job, Size
from bench.variants import AUTOTUNED, VARIANTS
from retainops.registry import find

OPS = ("rms_norm", "layer_norm", "add_rms_norm", "softmax", "cross_entropy")
WIDTHS = (1024, 2048, 8192, 16384, 32768, 65536)  # 4096 is among the others' sizes


def bench_cases(device: str, quick: bool) -> Iterator[Case]:
    if device != "cuda" and not quick:
        return  # it is about registers
    for op in map(find, OPS):
        for name, dtype in DTYPES.items():
            for width in WIDTHS[:1] if quick else WIDTHS:
                rows = 2 if quick else 64 * MIB // dtype.itemsize // width
                size = Size(f"rows of {width}", "bandwidth", rows, width)
                for job in (Job("forward"), Job("backward")):
                    for variant in (*VARIANTS, *peers_of(op)):
                        if variant not in ("eager", AUTOTUNED):
                            yield Case(op, name, size, job, variant)


def test_rows(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
