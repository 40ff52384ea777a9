"""What tests/test_distributed.py runs under torchrun: each case on every rank, its results saved to be judged there."""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import on_ranks_dtensors, on_ranks_parallel, on_ranks_statistics

MODULES = (on_ranks_parallel, on_ranks_dtensors, on_ranks_statistics)


def main(out: Path) -> None:
    """Run the cases, those that compile on two ranks alone; save what each gives, or the traceback."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    cases = {
        name.removeprefix("case_"): case
        for module in MODULES
        for name, case in vars(module).items()
        if name.startswith("case_")
    }
    for name, case in cases.items():
        if name.endswith("compiled") and dist.get_world_size() > 2:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = case()
        except Exception:
            found[name] = traceback.format_exc()
            print(name, found[name], file=sys.stderr, flush=True)
            break  # the other ranks may wait for this one
    torch.save(found, out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
