"""What is special to mul_sin: one frequency for each column, so that the gradient of b is summed over the rows."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.cases import Case, cases
from retainops.registry import find


def _b_is_a_row(shape: torch.Size, dtype: torch.dtype, device: str, generator: torch.Generator) -> tuple[Any, ...]:
    a, b = find("mul_sin").sample(shape, dtype, device, generator)
    return a, b[0].clone()


def bench_cases(device: str, quick: bool) -> Iterator[Case]:
    yield from cases(find("mul_sin"), device, quick, label="b is a row", sample=_b_is_a_row)


def test_mul_sin(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
