"""Trying a model changes the mode of none of its modules, whether it is taken or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model, PreTrainedModel

from benchmarks.family_models import family_model
from fastkd import Distiller
from fastkd.capture import evaluating, route_attention, try_model, try_packed
from fastkd.capture.facts import hands_on_last_block, sees_ahead
from fastkd.errors import UserError


def partly_frozen(model: PreTrainedModel) -> PreTrainedModel:
    """A model that trains, but for a part whose mode is another."""
    model.train()
    model.get_input_embeddings().eval()
    return model


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


RUNS = pytest.mark.parametrize(
    "run", [try_model, sees_ahead, hands_on_last_block, try_packed], ids=lambda run: run.__name__
)


@RUNS
def test_a_model_that_is_taken_keeps_its_modes(run: Callable[[PreTrainedModel], object]) -> None:
    model = partly_frozen(tiny_model("bert"))
    route_attention(model)
    before = modes(model)
    run(model)
    assert modes(model) == before and len(set(before.values())) == 2


@RUNS
def test_a_model_that_fails_keeps_its_modes(run: Callable[[PreTrainedModel], object]) -> None:
    model = partly_frozen(tiny_model("bert"))

    def fail(*_: object) -> None:
        assert not model.training
        raise UserError("no")

    model.embeddings.register_forward_pre_hook(fail)
    before = modes(model)
    with pytest.raises(UserError, match="no"):
        run(model)
    assert modes(model) == before


@pytest.mark.parametrize(("family", "run"), [("falcon", try_model), ("deberta-v2", try_packed)])
def test_a_model_that_is_refused_keeps_its_modes(
    family: str, run: Callable[[PreTrainedModel], object]
) -> None:
    model = partly_frozen(family_model(family))
    before = modes(model)
    with pytest.raises(UserError, match=r"does not go through|takes no packed"):
        run(model)
    assert modes(model) == before


def test_dropout_is_in_force_after_a_refused_distiller() -> None:
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.5,
    )
    student, teacher = DebertaV2Model(config).train(), DebertaV2Model(config)
    teacher.requires_grad_(False)
    teacher.embeddings.eval()
    before = modes(teacher)
    with pytest.raises(UserError, match="does not go through"):
        Distiller(student, teacher, {"attention": {}, "hidden": {}})
    ids = {"input_ids": torch.randint(1, VOCABULARY, (2, 8))}
    with Distiller(student, teacher, {"hidden": {}}) as distiller:
        assert not any(modes(teacher).values())
        first, second = (distiller(ids)[0] for _ in range(2))
    assert first != second
    assert modes(teacher) == before and any(before.values())


def test_modules_that_act_on_a_change_are_told() -> None:
    """As of adapters that are merged into a weight for as long as it is not trained."""

    class Merging(nn.Linear):
        merged = False

        def train(self, mode: bool = True) -> nn.Linear:
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(2, 2), nn.Dropout())
    model[1].eval()
    with evaluating(model):
        assert model[0].merged
    assert not model[0].merged and model[0].training and not model[1].training
