"""How benchmarks time: on a made-up GPU, whose clock is exact. No test asserts a time that was measured."""

from functools import partial

import pytest

pytest.importorskip("pytest_benchmark", reason="the benchmarks are an extra: pip install retainops[bench]")
pytest.importorskip("rich", reason="the report needs rich: pip install retainops[bench]")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install retainops[bench]")

from bench.timing import Clock, DeviceStopwatch, HostStopwatch, Pace, plan, prepare, rotation


class MadeUpGpu:
    """A device with a clock of its own: it runs what is queued in order, while the host goes on."""

    def __init__(self, host: float, device: float) -> None:
        self.host, self.device = host, device
        self.now = self.free_at = 0.0

    def call(self) -> None:
        """One launch: `host` seconds to queue, `device` seconds to run."""
        self.now += self.host
        self._queue(self.device)

    def _queue(self, seconds: float) -> float:
        self.free_at = max(self.free_at, self.now) + seconds
        return self.free_at

    def _sleep(self, cycles: int) -> None:
        self._queue(cycles / 2e9)

    def synchronize(self) -> None:
        self.now = max(self.now, self.free_at)

    def Event(self, enable_timing: bool) -> "MadeUpEvent":
        assert enable_timing
        return MadeUpEvent(self)


class MadeUpEvent:
    def __init__(self, gpu: MadeUpGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = self.gpu._queue(0)

    def query(self) -> bool:
        return self.at <= self.gpu.now

    def elapsed_time(self, end: "MadeUpEvent") -> float:
        return (end.at - self.at) * 1e3


@pytest.mark.parametrize("guess", [50e-6, 1e-6], ids=["guessed_right", "guessed_too_low"])
def test_the_device_stopwatch_leaves_a_slow_host_out(guess: float) -> None:
    gpu = MadeUpGpu(host=50e-6, device=5e-6)
    stopwatch = DeviceStopwatch(gpu, host_seconds=guess)
    assert stopwatch.seconds(rotation([gpu.call]), 100) == pytest.approx(5e-6)
    assert not stopwatch.host_limited


def test_the_device_stopwatch_says_when_it_could_not_leave_the_host_out() -> None:
    gpu = MadeUpGpu(host=10e-3, device=5e-6)  # 100 calls take a second to queue: longer than the longest spin
    stopwatch = DeviceStopwatch(gpu, host_seconds=10e-3)
    assert stopwatch.seconds(rotation([gpu.call]), 100) > 5e-6
    assert stopwatch.host_limited


@pytest.mark.parametrize(("bandwidth", "expected"), [(True, 5e-6), (False, 50e-6)], ids=["bandwidth", "cost_of_a_call"])
def test_on_a_gpu_bandwidth_is_the_devices_time_and_the_cost_of_a_call_the_hosts(
    bandwidth: bool, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = MadeUpGpu(host=50e-6, device=5e-6)
    monkeypatch.setattr(HostStopwatch.__init__, "__defaults__", (lambda: None, lambda: gpu.now))
    stopwatch, calls, rounds = prepare(batch := rotation([gpu.call]), 2, gpu, bandwidth, quick=False)
    assert 15 <= calls <= 100
    assert rounds >= 5
    assert stopwatch.seconds(batch, calls) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("host", "device", "expected"), [(1e-6, 10e-6, 10e-6), (10e-6, 1e-6, 10e-6)])
def test_the_host_stopwatch_waits_for_the_device(host: float, device: float, expected: float) -> None:
    gpu = MadeUpGpu(host, device)
    gpu._queue(1.0)  # left over from before: none of this batch's
    stopwatch = HostStopwatch(gpu.synchronize, clock=lambda: gpu.now)
    assert stopwatch.seconds(rotation([gpu.call]), 1000) == pytest.approx(expected, rel=0.01)


def test_a_rotation_goes_on_from_batch_to_batch_and_holds_as_many_results_as_it_has_calls() -> None:
    freed: list[int] = []

    class Result:
        def __init__(self, n: int) -> None:
            self.n = n

        def __del__(self) -> None:
            freed.append(self.n)

    made: list[int] = []

    def call(n: int) -> Result:
        made.append(n)
        return Result(n)

    batch = rotation([partial(call, n) for n in range(3)])
    batch(2)
    batch(3)
    assert made == [0, 1, 2, 0, 1]
    assert freed == [0, 1]


def test_a_plan_fills_the_time_within_its_bounds() -> None:
    pace = Pace(batch=1.0, case=10.0, rounds=(3, 8), calls=50)
    assert plan(0.1, pace) == (10, 8)
    assert plan(0.25, pace) == (4, 8)
    assert plan(2.0, pace) == (1, 5)
    assert plan(100.0, pace) == (1, 3)
    assert plan(1e-6, pace) == (50, 8)


def test_the_clock_moves_only_as_told() -> None:
    clock = Clock()
    before = clock()
    assert clock() == before
    clock.advance(0.5)
    assert clock() - before == 0.5
