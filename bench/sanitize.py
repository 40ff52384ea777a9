"""Every op's kernels under NVIDIA's compute-sanitizer: memcheck finds accesses out of bounds, racecheck races.

    python -m bench.sanitize                                        # memcheck of every op, then racecheck: a table
    python -m bench.sanitize --tool racecheck --ops swiglu_packed glu_packed
    python -m bench.sanitize --jobs 8                               # so many processes; each op is in one of them

Forward, backward, backward with every point retained and with statistics of each kind, in three dtypes, of small
tensors of odd sizes; of row ops also of rows that registers do not hold. PyTorch's caching of memory is off,
so that an access past the end of one tensor is not inside of another.
Status: 0, 1 where something was reported or an op was not reached, 2 where there is no GPU or no compute-sanitizer.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

import retainops as ro
from retainops import registry
from retainops.registry import Op

TOOLS = ("memcheck", "racecheck")
SHAPES = {"elementwise": [(7, 38), (130,)], "row": [(5, 38), (2, 70_002)], "attention": [(5, 38)]}
"""By kind of op: ragged but even, for packed halves; of rows also one that is worked through in pieces."""
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
WANTS: list[Callable[[], ro.Stats] | None] = [
    None,
    lambda: ro.Stats("l2", "amax", "nonfinite", "act_grad", "hist"),
    lambda: ro.Stats("l2", "sum", over="rows"),
    lambda: ro.Stats("l2", "amax", over="channels"),
]
DONE = "sanitize: ran"
"""What a process prints when an op ran to its end."""


def exercise(op: Op, device: str) -> Iterator[str]:
    """Run an op in all its ways; gives a line for each call that the kernels took."""
    for shape in SHAPES[op.kind]:
        for dtype in DTYPES:
            drawn = op.sample(torch.Size(shape), dtype, device, torch.Generator(device).manual_seed(0))
            for retained in (False, True):
                for want in WANTS if retained else WANTS[:1]:
                    inputs = [x if i in op.constants else _leaf(x) for i, x in enumerate(drawn)]
                    names = [p.name for p in op.points]
                    asked = ro.Retained(*names) if want is None else ro.Retained(**{n: want() for n in names})
                    kept = asked if retained else None
                    taken = str(ro.explain(op.call, *inputs))
                    y = op.call(*inputs, retain=kept)
                    outputs = [t for t in (y if isinstance(y, tuple) else (y,)) if t.requires_grad]
                    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
                    if "reference path" not in taken:
                        yield f"{op.name} {shape} {dtype} {kept}"


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def run(names: Sequence[str], device: str) -> int:
    """What happens under the sanitizer: an op after the other, each announced."""
    for name in names:
        print(f"sanitize: {name}", flush=True)
        calls = sum(1 for _ in exercise(registry.find(name), device))
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{DONE} {name}, {calls} calls", flush=True)
    return 0


def watched(tool: str, names: Sequence[str], seconds: float) -> dict[str, str]:
    """Run ops under a tool, in one process; from each to "clean", or what was said."""
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "3", sys.executable, "-m", "bench.sanitize"]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, "--run", "--ops", *names], capture_output=True, text=True, env=env, timeout=seconds, check=False
        )
        said = done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        said = late.stdout or ""
        said = said.decode() if isinstance(said, bytes) else said  # bytes, whatever text=True says
    return verdicts(said, names)


def verdicts(said: str, names: Sequence[str]) -> dict[str, str]:
    """From each op to "clean" or the first error that came while it ran, in what a sanitizer printed."""
    found = dict.fromkeys(names, "not reached")
    for name, body in re.findall(
        r"^sanitize: (?!ran)(\S+)\n(.*?)(?=^sanitize: (?!ran)|\Z)", said, re.DOTALL | re.MULTILINE
    ):
        error = re.search(
            r"^=+ *((?:Invalid|Error|Warning|Program hit|Race|Uninit|Target|Internal).*)$", body, re.MULTILINE
        )
        calls = re.search(rf"^{DONE} {name}, (\d+) calls", body, re.MULTILINE)
        ran = f"stopped: {body.strip()[-200:]}" if calls is None else "clean" if int(calls[1]) else "no kernel ran"
        found[name] = error[1] if error else ran
    if summary := re.search(r"(?:ERROR|RACECHECK) SUMMARY: ([1-9]\d*) (?:error|hazard)", said):
        unsaid = [name for name, verdict in found.items() if verdict == "clean"]
        if len(unsaid) == len(names):  # reported at the end, and not where it happened
            found = dict.fromkeys(names, f"{summary[0]} among these")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sanitize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=TOOLS, help="which (default: both)")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="which ops (default: all)")
    parser.add_argument("--jobs", type=int, default=4, help="processes at once (default 4)")
    parser.add_argument("--seconds", type=float, default=600, help="for each process (default 600)")
    parser.add_argument("--run", action="store_true", help="only run the ops, without a sanitizer")
    options = parser.parse_args(argv)
    try:
        names = [registry.find(name).name for name in options.ops or (op.name for op in registry.ops())]
    except KeyError as error:
        parser.error(error.args[0])
    if options.run:
        return run(names, "cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None:
        missing = "compute-sanitizer is not on the PATH" if torch.cuda.is_available() else "PyTorch sees no GPU here"
        print(f"sanitize: {missing}; --run runs the ops without it", file=sys.stderr)
        return 2
    return _report(options.tool, names, options.jobs, options.seconds)


def _report(tools: Sequence[str], names: Sequence[str], jobs: int, seconds: float) -> int:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    found: dict[str, dict[str, str]] = {tool: {} for tool in tools}
    shares = [share for i in range(jobs * 4) if (share := names[i :: jobs * 4])]  # a slow one holds nobody up
    with Progress() as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("ops under a tool", total=len(names) * len(tools))
        asked = {pool.submit(watched, tool, share, seconds): (tool, share) for tool in tools for share in shares}
        for future in as_completed(asked):
            tool, share = asked[future]
            found[tool] |= future.result()
            for name in share:  # at once: an interrupt would lose the table
                progress.console.print(f"{tool} {name}: {found[tool][name]}", markup=False)
            progress.advance(task, len(share))
    table = Table("op", *tools, title="compute-sanitizer")
    for name in names:
        table.add_row(name, *(found[tool][name] for tool in tools))
    Console().print(table)
    clean = sum(verdict == "clean" for of in found.values() for verdict in of.values())
    print(f"{clean} of {len(names) * len(tools)} clean")
    return 0 if clean == len(names) * len(tools) else 1


if __name__ == "__main__":
    sys.exit(main())
