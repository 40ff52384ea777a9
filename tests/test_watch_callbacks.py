"""The watcher in other people's training loops: Hugging Face's Trainer, and Lightning's."""

from __future__ import annotations

import copy
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import retainops as ro
from tests.small_model import ALL, D, Model, Steps, collect, oracle, requests_in
from tests.test_integrations import Poison

pytestmark = pytest.mark.filterwarnings("ignore")  # what these packages say of themselves and of this machine

BATCH = 4


class WithLoss(nn.Module):
    """The small model as a Trainer of transformers takes one: its inputs by name, its loss in a dict."""

    def __init__(self, bad_from: int = 10**9) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = Model()
        self.calls, self.bad_from = 0, bad_from

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        if self.training:
            self.calls += 1
        y = self.net(x)
        if self.calls > self.bad_from:
            y = Poison.apply(y, float("nan"))
        return {"loss": y.sum(), "y": y}


class Same(torch.utils.data.Dataset):
    """The same sample, over and over."""

    def __len__(self) -> int:
        return BATCH * 8

    def __getitem__(self, _: int) -> dict[str, torch.Tensor]:
        return {"x": torch.linspace(-1, 1, D), "labels": torch.zeros(1)}


def samples() -> torch.Tensor:
    return Same()[0]["x"].expand(BATCH, D)


def test_attached_to_what_accelerate_prepared() -> None:
    """A step is the optimizer's, with the micro-batches that it accumulates."""
    state = pytest.importorskip("accelerate.state")
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, (seen, sink) = Model(), collect()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-3))
    with ro.watch(prepared, every=1, to=sink).attach(optimizer) as watcher:
        for _ in range(4):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(samples()).sum())
                optimizer.step()
                optimizer.zero_grad()
    state.AcceleratorState._reset_state(
        reset_partial_state=True
    )  # one for the process, the Trainers of other tests too
    state.GradientState._reset_state()
    assert watcher.number == 2
    assert [step for step, _ in seen] == [0, 1]


def test_attached_to_no_optimizer() -> None:
    with pytest.raises(TypeError, match="watch: attach to a Linear; expected a torch.optim.Optimizer"):
        ro.watch(Model()).attach(nn.Linear(2, 2))


def huggingface(tmp_path: Path, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed: there is no Trainer")
        pytest.importorskip("accelerate", reason="accelerate is not installed: transformers' Trainer needs it")
        from retainops.integrations.transformers_trainer import WatchCallback
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2,
        max_steps=5,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
        logging_strategy="no",
        disable_tqdm=True,
        max_grad_norm=0.0,
        dataloader_pin_memory=False,
    )
    watching = WatchCallback(*args, **kwargs)
    data = Same()
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[watching])
    return trainer, watching


def assert_first_step(steps: Steps, model: Model, accumulated: int) -> None:
    """The first step read is of the weights that training began with."""
    expected = oracle(model, samples(), scale=1 / accumulated)
    (step, readings), *_ = steps
    assert step == 0
    assert len(readings) == len(ALL)
    for name, of in readings.items():
        l2 = expected[name.removeprefix("net.")].norm().item() * accumulated**0.5
        assert of["l2"] == pytest.approx(l2, rel=1e-5)


def test_transformers_trainer(tmp_path: Path) -> None:
    """Its steps are the optimizer's, of two backward calls each; its evaluations are in none."""
    model = WithLoss()
    before, asked = copy.deepcopy(model.net), []
    model.register_forward_hook(lambda m, *_: asked.append((m.training, bool(requests_in(m)))))
    steps, sink = collect()
    trainer, watching = huggingface(tmp_path, model, "net.*", every=2, to=sink)
    trainer.train()
    assert [step for step, _ in steps] == [0, 2, 4]
    assert_first_step(steps, before, accumulated=2)
    assert [on for training, on in asked if training] == [i % 2 == 0 for i in range(5) for _ in "12"]
    assert not any(on for training, on in asked if not training)
    assert len(asked) > 10
    assert watching.watcher is None


def test_transformers_trainer_stops_with_the_weights_as_they_were(tmp_path: Path) -> None:
    model = WithLoss(bad_from=5)
    weights = []
    steps, sink = collect()
    trainer, watching = huggingface(tmp_path, model, every=1, to=sink)
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(lambda *_: weights.append(copy.deepcopy(model.state_dict())))
    with pytest.raises(ro.NonFiniteGradient, match="step 2: the gradient of 'net.out'") as caught:
        trainer.train()
    assert (caught.value.step, len(steps), len(weights)) == (2, 3, 2)
    assert all(torch.equal(weights[-1][name], p) for name, p in model.state_dict().items())
    assert not requests_in(model)
    watching.close()


def test_transformers_trainer_goes_on_with_its_numbers(tmp_path: Path) -> None:
    model = WithLoss()
    _, watching = huggingface(tmp_path, model, every=3)
    state = type("State", (), {"global_step": 5})
    watching.on_train_begin(None, state, None, model=model)
    assert (watching.watcher.number, watching.watcher.asking) == (5, False)
    watching.on_step_begin(None, state, None)
    watching.on_pre_optimizer_step(None, state, None)
    watching.on_step_begin(None, state, None)
    assert (watching.watcher.number, watching.watcher.asking) == (6, True)
    watching.close()
    assert not requests_in(model)
    watching.on_step_begin(None, state, None)  # closed: nothing happens
    with pytest.raises(KeyError, match="watch: 'nope' matches no point"):
        huggingface(tmp_path, model, "nope")[1].on_train_begin(None, state, None, model=model)


def lightning(
    model: WithLoss, *args: Any, optimizer: Any = None, manual: bool = False, validates: int = 2, **kwargs: Any
) -> Any:
    """A trainer, the module, the callback, and what the trainer's logger was given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
        from lightning.pytorch.loggers import Logger

        from retainops.integrations.lightning import WatchCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, _: int) -> Any:
            loss = self.model(**batch)["loss"]
            if manual:
                for own in self.optimizers():
                    self.manual_backward(loss, retain_graph=True)
                    own.step()
            return loss

        def validation_step(self, batch: Any, _: int) -> None:
            assert not requests_in(self)
            self.model(**batch)

        def configure_optimizers(self) -> Any:
            if manual:
                return [torch.optim.SGD([p], lr=0.0) for p in list(self.parameters())[:2]]
            return (optimizer or torch.optim.AdamW)(self.parameters(), lr=0.01)

    class Kept(Logger):
        name, version = "kept", "0"
        rows: list[tuple[int, dict[str, float]]]

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append((step, metrics))

        def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    logger, watching, module = Kept(), WatchCallback(*args, **kwargs), Module()
    logger.rows = []
    trainer = pl.Trainer(
        max_steps=10 if manual else 5,
        accumulate_grad_batches=1 if manual else 2,
        val_check_interval=validates,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        logger=logger,
        log_every_n_steps=1000,
        callbacks=[watching],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer, module, watching, logger.rows


def loader() -> Any:
    return torch.utils.data.DataLoader(Same(), batch_size=BATCH)


def test_lightning() -> None:
    model = WithLoss()
    before, asked = copy.deepcopy(model.net), []
    model.register_forward_hook(lambda m, *_: asked.append(bool(requests_in(m))) if m.training else None)
    trainer, module, watching, rows = lightning(model, "model.net.*", every=2)
    trainer.fit(module, loader(), loader())
    rows = [(step, of) for step, of in rows if any(tag.startswith("gradients/") for tag in of)]
    assert [step for step, _ in rows] == [0, 2, 4]
    assert set(rows[0][1]) == {f"gradients/model.net.{name}/{what}" for name in ALL for what in ("l2", "nonfinite")}
    expected = oracle(before, samples(), scale=1 / 2)
    for name in ALL:
        l2 = rows[0][1][f"gradients/model.net.{name}/l2"]
        assert l2 == pytest.approx(expected[name].norm().item() * 2**0.5, rel=1e-5)
    assert asked == [i % 2 == 0 for i in range(5) for _ in "12"]
    assert watching.watcher is None
    assert not requests_in(model)
    watching.load_state_dict({"batches": 3})  # those by hand
    watching.on_train_start(trainer, module)  # goes on with its numbers
    assert watching.watcher.number == 5
    watching.on_validation_start(trainer, module)
    watching.close()
    watching.on_train_start(trainer, module)
    watching.watcher.number = 6
    watching.watcher.begin()
    assert watching.watcher.asking
    watching.close()
    assert not requests_in(model)


def test_lightning_stops_with_the_weights_as_they_were() -> None:
    model = WithLoss(bad_from=5)
    steps, sink = collect()
    trainer, module, watching, rows = lightning(model, every=1, to=sink)
    weights: list[dict[str, torch.Tensor]] = []
    module.on_train_batch_start = lambda *_: weights.append(copy.deepcopy(model.state_dict()))
    with pytest.raises(ro.NonFiniteGradient, match="step 2: the gradient of 'model.net.out'"):
        trainer.fit(module, loader(), loader())
    assert len(steps) == 3
    assert all(torch.equal(weights[-1][name], p) for name, p in model.state_dict().items())
    assert watching.watcher is None
    assert not requests_in(model)
    assert not any(tag.startswith("gradients/") for _, of in rows for tag in of)


def test_lightning_with_an_optimizer_that_calls_backward_several_times() -> None:
    steps, sink = collect()
    trainer, module, _, _ = lightning(WithLoss(), every=2, to=sink, optimizer=torch.optim.LBFGS)
    trainer.fit(module, loader(), loader())
    assert [step for step, _ in steps] == [0, 2, 4]


def test_lightning_with_two_optimizers_by_hand() -> None:
    """A step is then a batch; the gradients of both backward calls are in it."""
    model = WithLoss()
    steps, sink = collect()
    trainer, module, _, _ = lightning(model, every=2, to=sink, manual=True)
    trainer.fit(module, loader(), loader())
    assert [step for step, _ in steps] == [0, 2, 4]
    l2 = steps[0][1]["model.net.out"]["l2"]
    assert l2 == pytest.approx((2 * BATCH * D) ** 0.5)


def test_lightning_goes_on_with_its_numbers_by_hand() -> None:
    """The trainer counts the steps of both optimizers."""
    steps, sink = collect()
    trainer, module, watching, _ = lightning(WithLoss(), every=2, to=sink, manual=True)
    trainer.fit(module, loader(), loader())
    state = watching.state_dict()
    trainer.fit_loop.epoch_loop.max_steps = 16
    trainer.fit(module, loader(), loader())
    assert [step for step, _ in steps] == [0, 2, 4, 6]
    _, _, another, _ = lightning(WithLoss(), every=2, to=sink, manual=True)
    another.load_state_dict(state)
    another.on_train_start(trainer, module)
    assert another.watcher.number == 5
    another.close()


def test_lightning_with_two_callbacks() -> None:
    """A trainer refuses two that have a state and the same key."""
    trainer, module, first, _ = lightning(WithLoss(), "model.net.*.act", every=2)
    _, _, second, _ = lightning(WithLoss(), "model.net.out")
    trainer.callbacks.append(second)
    trainer.fit(module, loader(), loader())
    assert first.state_key != second.state_key


def test_lightning_validates_between_the_micro_batches_of_a_step() -> None:
    """`validation_step` looks that nothing is asked; the step has both micro-batches all the same."""
    model, (steps, sink) = WithLoss(), collect()
    before = copy.deepcopy(model.net)
    trainer, module, _, _ = lightning(model, "model.net.out", every=2, to=sink, validates=1)
    trainer.fit(module, loader(), loader())
    assert [step for step, _ in steps] == [0, 2, 4]
    l2 = oracle(before, samples(), scale=1 / 2)["out"].norm().item() * 2**0.5
    assert steps[0][1]["model.net.out"]["l2"] == pytest.approx(l2, rel=1e-5)


@pytest.mark.parametrize(
    ("missing", "module", "message"),
    [
        (["transformers"], "transformers_trainer", r'transformers and accelerate.*pip install "transformers\[torch\]"'),
        (["lightning.pytorch", "pytorch_lightning"], "lightning", "needs lightning.*; pip install lightning"),
    ],
)
def test_packages_that_are_missing_are_named(
    missing: list[str], module: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"retainops.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match=f"retainops.integrations.{module} needs .*{message.removeprefix('needs ')}"):
        importlib.import_module(f"retainops.integrations.{module}")
