"""The benchmark of the host's cost of a call: what it times is what it says, and launches do nothing while it does."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import GPU, HAS_TRITON

if not HAS_TRITON:
    pytest.skip("triton is not installed: nothing is launched", allow_module_level=True)

from bench import host_time


def test_parts_are_the_ops() -> None:
    x, w, b = (torch.randn(*size, dtype=torch.float64) for size in ((3, 8), (8,), (8,)))
    target = torch.tensor([1, 7, 0])
    f = torch.nn.functional
    for ours, theirs in (
        (host_time.rms_in_parts(x, w), f.rms_norm(x, (8,), w, 1e-6)),
        (host_time.layer_norm_in_parts(x, w, b), f.layer_norm(x, (8,), w, b)),
        (host_time.softmax_in_parts(x), torch.softmax(x, -1)),
        (host_time.loss_in_parts(x, target), f.cross_entropy(x, target)),
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(GPU, reason="launches are real there")
def test_every_call_is_a_replay_by_the_time_that_it_is_timed() -> None:
    from retainops.ops import _replay

    with host_time.launches_that_do_nothing():
        for op, ways in host_time.calls().items():
            _replay._known.clear()
            for _ in range(5):
                ways["ours"]()
            assert [known for known in _replay._known.values() if not callable(known)] == [], op
            assert len(_replay._known) == 2, op
    assert not _replay._known


@pytest.mark.skipif(GPU, reason="launches are real there")
def test_eager_and_ours_are_asked_for_the_same_gradients() -> None:
    """New ones each time: none is added to that of the call before."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    ways = host_time.calls()["mul_sin, c retained"]
    ways["eager"]()
    with Seen():
        ways["eager"]()
    assert sorted(names) == ["cos.default", *["mul.Tensor"] * 4, "sin.default"]


def test_what_two_rows_are_compared_with_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = iter(range(100))
    monkeypatch.setattr(host_time, "seconds_of", lambda *_: next(timed))
    found = host_time.measure()
    assert found["mul_sin, c retained"]["eager"] == found["mul_sin, in a new Retained"]["eager"]
    assert found["mul_sin, c retained"]["eager"] != found["mul_sin"]["eager"]


def test_figures_become_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_time, "measure", lambda number: {"mul_sin": {"eager": 30.0, "ours": 60.0}})
    assert host_time.main([]) == 0
    assert "2.00" in capsys.readouterr().out
    assert host_time.main(["--json"]) == 0
    assert '"eager": 30.0' in capsys.readouterr().out
