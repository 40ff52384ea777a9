"""What is common to all ops, over the registry."""

from collections.abc import Callable

import torch

from bench.cases import Case, cases
from bench.jobs import sizes
from retainops.registry import ops

OF_MATRICES = ("linear_cross_entropy", "attention")
"""Bound by products of matrices, with benchmarks of their own."""


def bench_cases(device: str, quick: bool) -> list[Case]:
    # One size of every op, then the next: a run that is cut short has compared every op at the telling size.
    turn = {size.name: n for n, size in enumerate(sizes(device, torch.float32, quick))}
    return sorted(
        (case for op in ops() if op.name not in OF_MATRICES for case in cases(op, device, quick)),
        key=lambda case: turn[case.size.name],
    )


def test_ops(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
