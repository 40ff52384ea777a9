"""What the roofline model of `retainops.testing` says of the kernels on a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from bench.cases import Case
from bench.jobs import DTYPES, MIB, WIDTH, Size, jobs
from bench.record import Forecast
from retainops.registry import Op

GPU = "H200"
TENSOR_BYTES = 64 * MIB


def forecasts(ops: Iterable[Op], gpu: str = GPU) -> Iterator[Forecast]:
    """Every job of every op at one size: its kernels are compiled for the GPU, and launched on none."""
    from retainops.testing import roofline  # imports triton, which need not be there
    from retainops.testing.driver import driver

    for op in ops:
        for name, dtype in DTYPES.items():
            size = Size("64 MiB", "bandwidth", TENSOR_BYTES // dtype.itemsize // WIDTH)
            inputs = Case(op, name, size, jobs(op)[0], "retainops").inputs("cpu")
            leaves = [
                x.requires_grad_(x.is_floating_point() and i not in op.constants) if isinstance(x, torch.Tensor) else x
                for i, x in enumerate(inputs)
            ]
            for job in jobs(op):
                if job.form == "Into":  # the same kernels and bytes as without
                    continue
                with driver():  # a backward is of the graph that the kernels' forward left
                    call = Case(op, name, size, job, "retainops").build()(leaves)
                moved, elements = job.fewest_bytes(op, inputs), size.shape.numel()
                found = roofline.predict(call, moved, elements, gpu=gpu)
                what = op.name, name, elements, job.direction, job.point, job.form
                yield Forecast(*what, gpu, moved, found.seconds, found.bound)
