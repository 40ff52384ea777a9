"""What the benchmarks time is right at every call, and complete."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the benchmarks are an extra: pip install retainops[bench]")
pytest.importorskip("rich", reason="the report needs rich: pip install retainops[bench]")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install retainops[bench]")

from bench import forecast, variants
from bench.cases import THOROUGHLY, Case, cases
from bench.figures import job as job_of
from bench.jobs import Job, Size, jobs
from bench.peers import PEERS
from retainops import Retained
from retainops.ops._plan import several
from retainops.registry import Op, find, ops

MUL_SIN = find("mul_sin")
SMALL = Size("tiny", "bandwidth", 3, 8)


def _leaves(case: Case, device: str = "cpu") -> list[torch.Tensor]:
    return [x.requires_grad_() for x in case.inputs(device)]


@pytest.fixture
def fixed_dy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "random_like", lambda t: torch.full_like(t, 0.5))


@pytest.mark.usefixtures("fixed_dy")
@pytest.mark.parametrize("job", jobs(MUL_SIN), ids=str)
@pytest.mark.parametrize("variant", ["retainops", "eager"])
def test_what_is_timed_is_right_at_every_call(job: Job, variant: str, path: Any) -> None:
    """A call that adds to the last one's gradient, or leaves one out, moves other bytes than it says."""
    if variant == "eager" and job.form == "Into":
        assert not any(c.job == job and c.variant == variant for c in cases(MUL_SIN, "cpu"))
        return
    case = Case(MUL_SIN, "fp32", SMALL, job, variant)
    a, b = inputs = _leaves(case, path.device)
    c = (a * b).detach()
    dc = 0.5 * c.cos()
    call = case.build()(inputs)
    for _ in range(3):
        got = call()
        if job.direction == "forward":
            torch.testing.assert_close(got, c.sin())
            assert got.requires_grad
            continue
        torch.testing.assert_close(got[:2], (dc * b, dc * a))
        if job.form == "Stats":
            l2, amax = got[-2:] if variant == "eager" else (got[-1].l2, got[-1].amax)
            torch.testing.assert_close((l2, amax), (dc.norm(), dc.abs().amax()))
        elif job.point:
            torch.testing.assert_close(got[-1], dc)
        else:
            assert len(got) == 2


@pytest.mark.parametrize("job", jobs(MUL_SIN, "host"), ids=str)
@pytest.mark.parametrize("variant", ["retainops", "eager"])
def test_a_step_is_right_at_every_call(job: Job, variant: str, path: Any) -> None:
    case = Case(MUL_SIN, "fp32", SMALL, job, variant)
    a, b = inputs = _leaves(case, path.device)
    dc = (a * b).detach().cos()
    call = case.build()(inputs)
    for _ in range(3):
        torch.testing.assert_close(call(), (dc * b, dc * a, *([dc] if job.point else [])))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, when the compiler is first imported
@pytest.mark.usefixtures("fixed_dy")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_compiled_variant_can_be_called_again_and_again(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and partitioned as for Inductor, without its C++ compiler."""
    variants._compile.cache_clear()
    monkeypatch.setattr(variants.torch, "compile", partial(torch.compile, backend="aot_eager"))
    case = Case(MUL_SIN, "fp32", SMALL, Job(direction), "torch.compile")
    a, b = inputs = _leaves(case)
    call = case.build()(inputs)
    first, second = call(), call()
    torch.testing.assert_close(first, second)
    expected = (a * b).sin() if direction == "forward" else (0.5 * (a * b).cos() * b, 0.5 * (a * b).cos() * a)
    torch.testing.assert_close(first, expected)


def test_a_copy_moves_the_jobs_fewest_bytes() -> None:
    for job, tensors in ((Job("forward"), 3), (Job("backward"), 5), (Job("backward", "c"), 6)):
        case = Case(MUL_SIN, "bf16", SMALL, job, "copy")
        inputs = case.inputs("cpu")
        copied = case.build()(inputs)()
        assert job.fewest_bytes(MUL_SIN, inputs) == tensors * 24 * 2
        assert 2 * copied.numel() * copied.element_size() == tensors * 24 * 2


@pytest.mark.parametrize("name", ["rope", "cross_entropy", "add_rms_norm"])  # whose points are of several sizes
def test_a_retained_point_moves_what_its_gradient_takes(name: str) -> None:
    op = find(name)
    inputs = Case(op, "bf16", SMALL, Job("backward"), "retainops").inputs("cpu")
    leaves = [x.requires_grad_() if i < 2 and x.is_floating_point() else x for i, x in enumerate(inputs)]
    kept = Retained(*(p.name for p in op.points))
    outputs = several(op.call(*leaves, retain=kept))
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    without = Job("backward").fewest_bytes(op, inputs)
    for point, slot in kept.items():
        assert Job("backward", point).fewest_bytes(op, inputs) == without + slot.grad.nbytes, point


def test_a_peer_in_the_table_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "mul_sin", {"Peer": lambda: lambda a, b: torch.sin(a * b), "Absent": lambda: None})
    assert "Absent" not in {c.variant for c in cases(MUL_SIN, "cuda")}
    found = [c for c in cases(MUL_SIN, "cuda") if c.variant == "Peer"]
    assert {str(c.job) for c in found} == {"forward", "backward", "step"}
    case = replace(found[0], size=SMALL)
    torch.testing.assert_close(case.build()(inputs := case.inputs("cpu"))(), (inputs[0] * inputs[1]).sin())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", list(ops()), ids=lambda op: op.name)
def test_every_op_is_measured_in_every_job(op: Op, device: str) -> None:
    found = {(c.dtype, c.size.kind, str(c.job)) for c in cases(op, device) if c.variant == "retainops"}
    for dtype in ("fp32", "bf16"):
        assert {job for d, kind, job in found if (d, kind) == (dtype, "bandwidth")} == set(map(str, jobs(op)))
    thorough = op.name in THOROUGHLY
    assert {job for _, kind, job in found if kind == "host"} == set(map(str, jobs(op, "host") if thorough else ()))
    names = [str(c) for c in cases(op, device)]
    assert len(set(names)) == len(names)


def test_the_path_that_ran_is_named(path: Any) -> None:
    case = Case(MUL_SIN, "fp32", SMALL, Job("forward"), "retainops")
    assert case.path(case.inputs(path.device)) == ("reference" if path.name == "reference" else "Triton kernels")


def test_the_roofline_model_is_asked_about_each_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="without triton there are no kernels to predict for")
    from retainops.testing import roofline

    asked: list[list[str]] = []

    def predict(*args: Any, **kwargs: Any) -> roofline.Prediction:
        found = real(*args, **kwargs)
        asked.append([launch.name for launch in found.launches])
        return found

    real = roofline.predict
    monkeypatch.setattr(roofline, "predict", predict)
    monkeypatch.setattr(forecast, "TENSOR_BYTES", 2**20)
    monkeypatch.delitem(forecast.DTYPES, "bf16")
    found = list(forecast.forecasts([MUL_SIN]))
    assert [job_of(f) for f in found] == ["forward", "backward", "backward + c", "backward + c Stats"]
    assert [kernels[0] for kernels in asked] == ["mul_sin_fwd_kernel", *3 * ["mul_sin_bwd_kernel"]]
    assert [len(kernels) for kernels in asked[:3]] == [1, 1, 1]
    assert [f.bytes for f in found] == [n * 2**20 for n in (3, 5, 6, 5)]
    assert found[0].seconds < found[1].seconds < found[2].seconds
    asked.clear()
    monkeypatch.setattr(forecast, "jobs", lambda op: [Job("backward")])
    assert len(list(forecast.forecasts([find("rope")]))) == 1  # whose tables have no gradient
    assert [kernels[0] for kernels in asked] == ["rope_kernel"]
