"""Several ranks, by gloo on the CPU: losses and what is retained equal those of one process.

One run of torchrun for each number of ranks does all the cases, by tests/run_on_ranks.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import retainops as ro
from retainops.ranks import _device
from tests import on_ranks
from tests.small_model import Model

ROOT = Path(__file__).parent.parent
DATA_PARALLEL = ["ddp", "ddp_channels", "ddp_compiled", "fsdp", "fsdp_compiled"]
SCALED = ("l2", "sum", "abs_sum", "amax", "mean", "act_grad")  # by what the gradient is


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """For each rank, what each case gave."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    done = subprocess.run(
        [*command, "tests/run_on_ranks.py", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def results(ranks: list[dict[str, Any]], case: str) -> list[Any]:
    if case.endswith("compiled") and len(ranks) > 2:
        pytest.skip("what compiles is run on two ranks: seconds a rank")
    found = [of.get(case, "not run") for of in ranks]
    assert not any(isinstance(of, str) for of in found), found
    return found


def assert_same(got: dict[str, Any], expected: dict[str, Any], divide: float = 1.0) -> None:
    """Statistics of some points, once divided by what their gradients are multiplied with."""
    for name, of in got.items():
        for what, value in of.items():
            if value is not None:
                scaled = value / divide if what in SCALED else value
                want = expected[name][what]
                if what == "hist" and divide != 1:
                    want = torch.roll(want, int(divide).bit_length() - 1)  # a power of two moves each by so many bins
                torch.testing.assert_close(
                    scaled, want, rtol=1e-9, atol=1e-12, msg=lambda m, at=(name, what): f"{at}: {m}"
                )


@pytest.mark.parametrize("case", DATA_PARALLEL)
def test_data_parallel(ranks: list[dict[str, Any]], case: str) -> None:
    """Statistics put together are those of one process, once divided by the number of ranks."""
    single = on_ranks.single(Model, on_ranks.CHANNELS if case.endswith("channels") else on_ranks.EVERY)
    for got in results(ranks, case):
        torch.testing.assert_close(got["loss"], single["loss"])
        torch.testing.assert_close(got["grads"], single["grads"])
        assert list(got["stats"]) == list(single["stats"])
        assert_same(got["stats"], single["stats"], divide=len(ranks))


def test_before_they_are_put_together_statistics_are_the_ranks_own(ranks: list[dict[str, Any]]) -> None:
    got = results(ranks, "ddp")
    for name, of in got[0]["stats"].items():
        local = torch.stack([rank["local"][name]["act_grad"] for rank in got])
        torch.testing.assert_close(local.sum(), of["act_grad"])
        assert local.unique().numel() == len(ranks)


def test_full_gradients_are_the_ranks_own(ranks: list[dict[str, Any]]) -> None:
    single = on_ranks.single(Model, None)["stats"]
    got = results(ranks, "ddp_gradients")
    for name, of in single.items():
        together = torch.cat([rank["stats"][name]["grad"] for rank in got])
        torch.testing.assert_close(together / len(ranks), of["grad"])


def test_fully_sharded_by_wrappers(ranks: list[dict[str, Any]]) -> None:
    single = on_ranks.single(Model)
    for got in results(ranks, "fsdp_of_wrappers"):
        assert list(got["stats"]) == list(single["stats"])
        assert_same(got["stats"], single["stats"], divide=len(ranks))
        assert got["points"] == "MulSin in Block"


def test_pipeline_parallel(ranks: list[dict[str, Any]]) -> None:
    """Each rank has its stages' points, of all micro-batches; where no leaf gets a gradient, its statistics."""
    found = results(ranks, "pipeline")
    for which, many in enumerate((1, 2)):
        torch.manual_seed(3)
        layers = Model(len(ranks) * many).double()
        with ro.retain(layers, "layers.*", on_ranks.EVERY_AND_GRAD) as kept:
            for x in on_ranks.batch().chunk(4):
                layers(x).square().sum().backward()
        got = {name: of for rank in found for name, of in rank[which].items()}
        assert got.keys() == kept.keys()
        without = [name for name, of in got.items() if of["grad"] is None]
        assert without == [name for name in got if many == 2 and not name.startswith("layers.0.")]
        assert_same(got, kept.to_dict())


def test_tensor_parallel_with_plain_tensors(ranks: list[dict[str, Any]]) -> None:
    single = on_ranks.single(on_ranks.MLP)
    for got in results(ranks, "tensor_parallel_local"):
        torch.testing.assert_close(got["loss"], single["loss"])
        torch.testing.assert_close(got["grads"], single["grads"])
        assert got["shape"] == (on_ranks.BATCH, on_ranks.WIDTH // len(ranks))
        assert_same(got["stats"], single["stats"])


def test_kernels_take_what_a_row_wise_layer_gives(ranks: list[dict[str, Any]]) -> None:
    for (_, *want), (kind, *got) in results(ranks, "kernels_after_a_row_wise_layer"):
        assert kind == "AsyncCollectiveTensor"
        torch.testing.assert_close(got, want)


def test_tensor_parallel_with_dtensors(ranks: list[dict[str, Any]]) -> None:
    """Statistics are those of the whole tensor at once, and being put together does not count a shard twice."""
    single = on_ranks.single(on_ranks.MLP)
    for got in results(ranks, "tensor_parallel_dtensor"):
        torch.testing.assert_close(got["loss"], single["loss"])
        torch.testing.assert_close(got["grads"], single["grads"])
        assert_same(got["stats"], single["stats"])
        assert_same(got["after"], single["stats"])


def test_full_gradients_of_dtensors_are_dtensors(ranks: list[dict[str, Any]]) -> None:
    single = on_ranks.single(on_ranks.MLP, None)
    for got in results(ranks, "tensor_parallel_gradients"):
        assert got["placements"] == {
            "act.c": "(Shard(dim=1),)",
            "hidden": "(Shard(dim=1),)",
            "out": "(Replicate(),)",
        }
        assert_same(got["stats"], single["stats"])


def test_data_and_tensor_parallel(ranks: list[dict[str, Any]]) -> None:
    """Whether the group is all ranks, or those along the dim of the mesh that splits the batch."""
    single = on_ranks.single(on_ranks.MLP)
    for got in results(ranks, "two_dims"):
        for which in ("stats", "over_dp", "over_both"):
            assert_same(got[which], single["stats"], divide=2)
        assert "was reduced over this group already, or over several of its ranks" in got["again"]


def test_dtensors_however_they_are_placed(ranks: list[dict[str, Any]]) -> None:
    x = on_ranks.uneven().requires_grad_()
    for got in results(ranks, "dtensor_placements"):
        assert len(got) == 12
        for (over, placement), stats in got.items():
            names = on_ranks.EVERY.names if over == "tensor" else on_ranks.EVERY.names[:-1]
            kept = ro.Retained(c=ro.Stats(*names, over=over))
            for scale in (1.0, -3.0):
                (ro.mul_sin(x, 2.0, retain=kept) * scale).sum().backward()
            for what in names:
                want = getattr(kept.c, what)
                torch.testing.assert_close(
                    stats[what], want, rtol=1e-5, atol=1e-5, msg=lambda m, at=(over, placement, what): f"{at}: {m}"
                )


def test_a_dtensor_whose_shards_are_still_to_be_added_up(ranks: list[dict[str, Any]]) -> None:
    whole = sum(range(1, len(ranks) + 1))
    for got in results(ranks, "dtensor_partial"):
        assert got["amax"].item() == whole
        assert got["l2"].item() == pytest.approx(whole * 6**0.5)
        assert torch.equal(got["grad"], torch.full((2, 3), float(whole)))


def test_into_a_buffer_that_is_a_dtensor(ranks: list[dict[str, Any]]) -> None:
    for got in results(ranks, "dtensor_into"):
        torch.testing.assert_close(got["buffer"], torch.cos(2 * on_ranks.uneven()))
        assert got["same"]
        assert got["plain"].startswith(
            "ValueError: mul_sin: the gradient of point 'c' is a DTensor, and its Into buffer"
        )
        # Before backward, where a kernel would write to an address that is none.
        assert got["other"].startswith("ValueError: mul_sin: the gradient of point 'c' is no DTensor, and its")


def test_dtensors_in_compiled_code(ranks: list[dict[str, Any]]) -> None:
    x, kept = on_ranks.uneven().requires_grad_(), ro.Retained(c=ro.Stats("l2", "amax", "nonfinite", "hist"))
    ro.mul_sin(x, 2.0, retain=kept).sum().backward()
    for got in results(ranks, "dtensor_compiled"):
        for what in ("l2", "amax", "nonfinite", "hist"):
            torch.testing.assert_close(got[what], getattr(kept.c, what))


def test_cross_entropy_of_dtensors(ranks: list[dict[str, Any]]) -> None:
    want = on_ranks.losses(lambda t, _dim: t.clone(), on_ranks.TARGET)
    for got in results(ranks, "cross_entropy"):
        for of in got:
            for how, tensors in of.items():
                torch.testing.assert_close(
                    tensors, want[how], rtol=1e-5, atol=1e-6, msg=lambda m, how=how: f"{how}: {m}"
                )


def test_attention_of_dtensors(ranks: list[dict[str, Any]]) -> None:
    for got in results(ranks, "attention"):
        assert len(got) == 18
        for (where, point, causal), tensors in got.items():
            want = on_ranks.attended(torch.clone, on_ranks.ATTENDED[point], point, causal)
            if tensors or torch.__version__ >= "2.13":
                torch.testing.assert_close(tensors, want, msg=lambda m, at=(where, point, causal): f"{at}: {m}")
        assert sum(map(bool, got.values())) >= 12


def test_causal_softmax_of_dtensors(ranks: list[dict[str, Any]]) -> None:
    x = torch.arange(50.0).view(2, 5, 5).sin()
    want = [f(x, causal=True) for f in (ro.softmax, ro.log_softmax) for _ in range(3)]
    for got in results(ranks, "softmax_causal"):
        torch.testing.assert_close(got, want)


def test_nan_wins_on_whatever_rank(ranks: list[dict[str, Any]]) -> None:
    for got in results(ranks, "nan_wins_on_whatever_rank"):
        assert len(got) == 9 * len(ranks)
        assert all(amax != amax and nonfinite == 1 for amax, nonfinite in got), got


def test_points_that_some_ranks_have_no_gradient_for(ranks: list[dict[str, Any]]) -> None:
    for rank, got in enumerate(results(ranks, "points_that_some_ranks_have_no_gradient_for")):
        read = got["read"]
        assert read["nowhere"] == {"grad": None, "l2": None}
        assert {what: read["somewhere"][what].item() for what in ("sum", "amax", "mean")} == {
            "sum": -3.0,
            "amax": 4.0,
            "mean": -1.5,
        }
        assert read["somewhere"]["hist"].nonzero().flatten().tolist() == [127, 129]
        assert read["channels"]["sum"].tolist() == [4.0, 6.0]
        assert read["everywhere"]["nonfinite"].item() == 1
        assert read["everywhere"]["nonfinite"].dtype == torch.int64
        assert read["in_float64"]["amax"].item() == pytest.approx(1e150)
        assert read["in_float64"]["l2"].dtype == torch.float64
        assert read["gradient"]["sum"].item() == sum(range(len(ranks)))
        assert got["gradient"].tolist() == [rank]
        assert got["first"] == "everywhere"


def test_what_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank, got in enumerate(results(ranks, "what_is_refused")):
        assert "ValueError: all_reduce: there are no statistics" in got["no statistics"]
        assert "ValueError: all_reduce: 'c' has statistics over rows, and each rank's rows are its own" in got["rows"]
        for what in ("others", "rows on one", "nothing on one", "reset on one"):
            assert "RuntimeError: all_reduce: the ranks ask for different statistics" in got[what]
        assert "RuntimeError: all_reduce: the ranks' gradients differ in their channels at some of c" in got["channels"]
        assert "RuntimeError: all_reduce: 'c' was reduced over this group already" in got["twice"]
        assert got["after reset"] == "no error"
        if rank < 2 < len(ranks):
            assert "ValueError: all_reduce: the group, of the ranks [0, 1], has some of those" in got["some of a mesh"]
        assert got["not in the group"] == (
            "ValueError: watch: this rank is not in the group that is given; watch on the ranks of the group"
            if rank
            else "no error"
        )


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"torch.distributed is not set up; call init_process_group\(\)"):
        ro.Retained(c=ro.Stats("l2")).all_reduce()


def test_what_is_sent_from_a_gpu_is_sent_from_one_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one that no gradient came to, too; here as init_process_group() without a backend is where there are GPUs."""
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    monkeypatch.setattr(dist, "get_backend", lambda _: "undefined")
    monkeypatch.setattr(dist, "get_backend_config", lambda _: "cuda:nccl")
    assert _device(None) == torch.device("cuda:1")


def test_watch(ranks: list[dict[str, Any]]) -> None:
    single = on_ranks.single(Model)["stats"]
    got = results(ranks, "watch")
    assert [[step for step, _ in of["steps"]] for of in got] == [[0, 2], *[[]] * (len(ranks) - 1)]
    for of in got:
        assert of["latest"] == got[0]["latest"]
        assert of["latest"] == got[0]["steps"][1]
        assert of["stopped"].startswith("watch: step 0: the gradient of 'p2' has 1 element that is inf or nan; that of")
    # All stop. Only the first rank ran the later layer: where the others have it in the order, nobody knows.
    assert [of["order"] for of in got] == ["late", *["early"] * (len(ranks) - 1)]
    for name, readings in got[0]["latest"][1].items():
        assert readings["l2"] / len(ranks) == pytest.approx(single[name]["l2"].item())
