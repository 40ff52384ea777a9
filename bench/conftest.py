"""The fixture that times a case, and what pytest-benchmark keeps of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch._functorch.config

from bench import record, timing
from bench.cases import Case
from retainops.registry import Op

DEVICE_TYPE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = timing.Clock()


# Inductor may put gradients where saved tensors were; a graph that is to run again must not.
torch._functorch.config.donated_buffer = False


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("retainops benchmarks")
    group.addoption("--bench-quick", action="store_true", help="tiny sizes, one round: whether it runs, not how fast")
    group.addoption("--bench-warm", action="store_true", help="call each case once and time nothing: fills caches")
    group.addoption("--bench-seconds", type=float, default=140.0, help="start no case after this many seconds")
    group.addoption("--bench-threads", type=int, default=0, help="of PyTorch on a CPU (default: its own choice)")
    group.addoption("--bench-note", default="", help="a remark to keep with the results")


def pytest_configure(config: pytest.Config) -> None:
    if threads := config.getoption("--bench-threads"):
        torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = list(metafunc.module.bench_cases(DEVICE_TYPE, metafunc.config.getoption("--bench-quick")))
        metafunc.parametrize("case", cases, ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_ops.py")  # what is special to an op comes last
    for item in items:
        if "measure" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
            case = item.callspec.params["case"]
            if isinstance(case, Case):  # a file may have none here; those of one graph warm up in one process
                item.add_marker(pytest.mark.xdist_group(f"{case.op.name} {case.dtype} {case.size.name} {case.label}"))


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Keep our own rows and metadata in place of every round's time and the machine's every detail."""
    run = record.Run(record.metadata(config.getoption("--bench-note")), record.rows(output_json["benchmarks"]))
    output_json.clear()
    output_json.update(run.as_dict())


@pytest.fixture(scope="session")
def deadline(request: pytest.FixtureRequest) -> float:
    """When to start no more cases. On a GPU, a second of work first brings its clocks up."""
    deadline = time.monotonic() + request.config.getoption("--bench-seconds")
    if DEVICE_TYPE == "cuda":
        x = torch.randn(4096, 4096, device="cuda")
        start = time.monotonic()
        while time.monotonic() - start < 1:
            x @ x
            torch.cuda.synchronize()
    return deadline


@pytest.fixture(scope="session")
def inputs_of() -> Callable[[Case], list[Any]]:
    """A case's inputs; the last ones are kept, since the cases of one size come one after the other."""
    last: dict[tuple[str, ...], list[Any]] = {}

    def inputs_of(case: Case) -> list[Any]:
        key = (case.op.name, case.label, case.dtype, case.size.name)
        if key not in last:
            last.clear()
            last[key] = case.inputs(DEVICE_TYPE)
        return last[key]

    return inputs_of


@pytest.fixture
def measure(
    benchmark: Any, deadline: float, inputs_of: Callable[[Case], list[Any]], request: pytest.FixtureRequest
) -> Iterator[Callable[[Case], None]]:
    """Times a case: `measure(case)`."""
    quick = request.config.getoption("--bench-quick")
    copied: set[int] = request.session.__dict__.setdefault("bench_copied", set())

    def measure(case: Case) -> None:
        if time.monotonic() > deadline:
            pytest.skip("the time that --bench-seconds gives is up")
        if request.config.getoption("--bench-warm") and case.variant in ("copy", "eager"):
            return  # there is nothing to compile
        inputs = inputs_of(case)
        if request.config.getoption("--bench-warm"):
            case.build()([_fresh(x, case.op, i) for i, x in enumerate(inputs)])()
            return
        job_bytes = case.job.fewest_bytes(case.op, inputs)
        if case.variant == "copy" and (job_bytes in copied or copied.add(job_bytes)):
            pytest.skip("a copy of so many bytes has been measured")
        sets = 1 if case.size.kind == "host" or quick else 1 + 4 * record.cache_bytes() // job_bytes
        _skip_without_memory(sets, job_bytes)
        benchmark.extra_info.update(_what(case, inputs, job_bytes, sets))
        _time(benchmark, case, inputs, sets, quick)

    yield measure
    if DEVICE_TYPE == "cuda":
        torch.cuda.empty_cache()


def _what(case: Case, inputs: Sequence[Any], job_bytes: int, sets: int) -> dict[str, Any]:
    return {
        "op": case.op.name,
        "label": case.label,
        "dtype": case.dtype,
        "size": case.size.name,
        "kind": case.size.kind,
        "elements": case.size.shape.numel(),
        "direction": case.job.direction,
        "point": case.job.point,
        "form": case.job.form,
        "variant": case.variant,
        "path": case.path(inputs),
        "bytes": job_bytes,
        "sets": sets,
    }


def _skip_without_memory(sets: int, job_bytes: int) -> None:
    if DEVICE_TYPE != "cuda":
        return
    needed = 3 * sets * job_bytes  # inputs and results, and interiors that eager keeps
    if needed > torch.cuda.mem_get_info()[0]:
        gc.collect()
        torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if needed > free:
        pytest.skip(f"it needs about {needed / 1e9:.0f} GB of GPU memory, and {free / 1e9:.0f} GB are free")


def _time(benchmark: Any, case: Case, inputs: Sequence[Any], sets: int, quick: bool) -> None:
    prepare = case.build()
    batch = timing.rotation([prepare([_fresh(x, case.op, i) for i, x in enumerate(inputs)]) for _ in range(sets)])
    gpu = torch.cuda if DEVICE_TYPE == "cuda" else None
    stopwatch, calls, rounds = timing.prepare(batch, sets + 1, gpu, case.size.kind == "bandwidth", quick)
    benchmark.pedantic(lambda: CLOCK.advance(stopwatch.seconds(batch, calls)), rounds=rounds)
    host_limited = isinstance(stopwatch, timing.DeviceStopwatch) and stopwatch.host_limited
    benchmark.extra_info.update(calls=calls, host_limited=host_limited)


def _fresh(x: Any, op: Op, place: int) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().clone().requires_grad_(x.is_floating_point() and place not in op.constants)
