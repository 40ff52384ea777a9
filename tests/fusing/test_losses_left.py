"""Which cross entropies of a forward are fused, and which are left: those that may be called several times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import CrossEntropyLoss
from torch.nn import functional as F
from transformers import BertConfig, BertForPreTraining, BertForQuestionAnswering, BertForSequenceClassification

import retainops as ro
from tests.fusing import losses
from tests.fusing.losses import Model, N, V

x = losses.x


class Twice(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(x)
        loss_fct = CrossEntropyLoss()
        return loss_fct(logits, target) + loss_fct(-logits, target)


class InALoop(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(x)
        loss_fct = CrossEntropyLoss()
        return sum(loss_fct(logits[i], target[i]) for i in range(N))


class AlsoElsewhere(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(x)
        loss_fct = CrossEntropyLoss()
        loss = loss_fct(logits, target)
        if len(logits) == 1:
            loss_fct = nn.MSELoss()
        return loss + loss_fct(2 * logits, target)


class ReadBelow(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(x)
        loss_fct = CrossEntropyLoss()
        loss = loss_fct(logits, target)
        loss_fct = loss_fct.to(logits.device)
        return loss


class AfterTheBranch(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(x)
        loss_fct = nn.MSELoss()
        loss = 0
        if target.dim() == 1:
            loss_fct = CrossEntropyLoss()
            loss = loss_fct(logits, target)
        return loss + loss_fct(logits, target)


class InAFunction(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(x)
        loss_fct = CrossEntropyLoss()

        def part(z: torch.Tensor) -> torch.Tensor:
            return loss_fct(z, target)

        return part(logits) + part(2 * logits)


class FunctionInAFunction(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(x)

        def part(z: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(z, target)

        return part(logits) + part(2 * logits)


class Global(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        global last_loss
        logits = self.head(x)
        last_loss = CrossEntropyLoss()
        return last_loss(logits, target)


class OneOfTwo(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(x)
        if logits.shape[-1] == 1:
            loss_fct = nn.MSELoss()
            loss = loss_fct(logits, target)
        else:
            loss_fct = CrossEntropyLoss()
            if target.dim() == 2:
                loss = loss_fct(logits.flatten(0, 1), target.flatten())
            else:
                loss = loss_fct(logits, target)
        return loss


class LaterAnother(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(x)
        if logits.shape[-1] == V:
            loss_fct = CrossEntropyLoss()
        else:
            loss_fct = nn.MSELoss()
        return loss_fct(logits, target)


class Read(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(x)
        loss_fct = CrossEntropyLoss()
        return loss_fct(logits, target) if loss_fct.reduction == "mean" else logits


class Moved(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(x)
        return CrossEntropyLoss().to(logits.device)(logits, target)


class Unpacked(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self.head(x)
        loss_fct, more = CrossEntropyLoss(), 2
        return loss_fct(logits, target) * more


LEFT: dict[type[Model], str] = {
    Twice: "may be called several times, and its points would be of several calls",
    InALoop: "called several times",
    AlsoElsewhere: "its loss_fct may be another one later",
    ReadBelow: "its loss_fct may be another one later",
    AfterTheBranch: "may be another one where it is called",
    InAFunction: "its loss_fct is used in a function inside",
    FunctionInAFunction: "it is in a loop",
    Global: "no variable of its own",
    LaterAnother: "may be another one where it is called",
    Read: "not only called",
    Moved: "what becomes of the loss",
    Unpacked: "what becomes of the loss",
}


@pytest.mark.parametrize("kind", LEFT)
def test_left_where_points_would_be_of_several_calls(kind: type[Model], x: torch.Tensor) -> None:
    model, target = kind(), torch.ones(N, dtype=torch.long)
    theirs = model(x, target)
    (row,) = ro.fuse(model)
    assert row.op is None
    assert LEFT[kind] in row.why
    assert torch.equal(model(x, target), theirs)


def test_one_call_of_two_branches(x: torch.Tensor) -> None:
    model, target = OneOfTwo(), torch.ones(N, dtype=torch.long)
    theirs = model(x, target)
    ro.fuse(model)
    with ro.retain(model, "logits") as kept:
        ours = model(x, target)
        ours.backward()
    torch.testing.assert_close(ours, theirs)
    assert kept["logits"].grad is not None


class InInit(Model):
    """What `__init__` makes has been made, and is another module."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = CrossEntropyLoss()

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.criterion(self.head(x), target)


def test_nothing_is_put_into_init() -> None:
    model = InInit()
    assert [(row.name, row.op) for row in ro.fuse(model)] == [("criterion", "cross_entropy")]
    assert type(model) is InInit


def test_an_overridden_one_is_left(x: torch.Tensor) -> None:
    class Own(nn.CrossEntropyLoss):
        def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return super().forward(-input, target)

    assert [row.why for row in ro.fuse(nn.Sequential(Own()))] == [
        "it overrides the forward of torch.nn.CrossEntropyLoss"
    ]


SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForQuestionAnswering, BertForPreTraining])
def test_heads_of_transformers(kind: Any) -> None:
    torch.manual_seed(0)
    model = kind(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    tokens, two = torch.randint(50, (2, 8)), torch.tensor([0, 1])
    inputs = {
        BertForSequenceClassification: {"labels": two},
        BertForQuestionAnswering: {"start_positions": two, "end_positions": two},
        BertForPreTraining: {"labels": tokens, "next_sentence_label": two},
    }[kind]
    theirs = model(tokens, **inputs).loss
    table = ro.fuse(model)
    torch.testing.assert_close(model(tokens, **inputs).loss, theirs)
    if kind is BertForSequenceClassification:
        with ro.retain(model, "logits") as kept:
            model(tokens, **inputs).loss.backward()
        assert kept["logits"].grad.shape == (2, 2)
    else:
        (why,) = [row.why for row in table.left if row.why.startswith("loss")]
        assert why == f"loss(CrossEntropyLoss): the loss that it makes {LEFT[Twice]}"
