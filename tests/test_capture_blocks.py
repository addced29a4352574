"""Blocks are found, counted and cut as the model runs them, or the model is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny_models import LAYERS, tiny_batch, tiny_model
from torch import Tensor
from transformers import AlbertConfig, AlbertModel, OPTConfig, OPTModel, PreTrainedModel

from benchmarks.family_models import family_model
from fastkd import Distiller
from fastkd.capture import at_depth, capture, capture_keywords, find_blocks, try_model
from fastkd.capture.trial_inputs import trial_inputs
from fastkd.errors import UserError

BATCH = tiny_batch()


def looped() -> PreTrainedModel:
    """A BERT whose second block runs the first one again."""
    model = tiny_model("bert")
    first, second = find_blocks(model)[:2]
    forward = second.forward

    def again(state: Tensor, *arguments: Any, **keywords: Any) -> Any:
        return forward(first(state, *arguments, **keywords), *arguments, **keywords)

    second.forward = again
    return model


def tied() -> PreTrainedModel:
    """A BERT whose third block is its first one."""
    model = tiny_model("bert")
    model.encoder.layer[2] = model.encoder.layer[0]
    return model


def tied_attention() -> PreTrainedModel:
    """A BERT whose third block attends by the module of its first one."""
    model = tiny_model("bert")
    model.encoder.layer[2].attention = model.encoder.layer[0].attention
    return model


def albert(groups: int, inner: int, layers: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=16,
        num_hidden_layers=layers,
        num_hidden_groups=groups,
        inner_group_num=inner,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.2,
    )
    return AlbertModel(config).eval()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (looped, "block 1 is called more than once in a forward pass, so its states can't be"),
        (tied, "blocks 1 and 3 are one module, which is called more than once in a forward pass"),
        (lambda: albert(1, 3), "found 0 stacks of 3 blocks"),
        (lambda: albert(2, 3), "found 0 stacks of 3 blocks"),
    ],
    ids=["looped", "tied", "inner layers", "inner layers of two"],
)
@pytest.mark.parametrize("attention", [True, False])
def test_a_block_without_one_state_is_refused(model: Any, message: str, attention: bool) -> None:
    made = model()
    with pytest.raises(UserError, match=message):
        try_model(made, attention=attention)
    # what reads no states of blocks goes on
    try_model(made, attention=False, hidden=False)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_second_state_of_a_block_is_refused_in_every_pass(layer: int) -> None:
    model = looped()
    message = re.escape("block 1 is called more than once in a forward pass")
    with torch.no_grad(), pytest.raises(UserError, match=message), capture(model, hidden={layer}):
        model(**BATCH)
    with torch.no_grad(), capture(model, hidden={LAYERS}) as states:
        output = model(**BATCH)
    assert torch.equal(states.hidden[LAYERS], output.last_hidden_state)


def test_blocks_that_are_tied_later_are_refused() -> None:
    model = tiny_model("bert")
    assert len(find_blocks(model)) == LAYERS
    model.encoder.layer[2] = model.encoder.layer[0]
    with pytest.raises(UserError, match="blocks 1 and 3 are one module"):
        find_blocks(model)


def test_albert_with_a_group_for_each_layer_gives_its_own_states() -> None:
    model = albert(3, 1)
    try_model(model)
    with torch.no_grad(), capture(model, hidden=range(4)) as states:
        expected = model(**BATCH, output_hidden_states=True).hidden_states
    assert all(torch.equal(states.hidden[n], expected[n]) for n in range(4))


def test_attention_of_two_blocks_is_said_to_be_one_module() -> None:
    with pytest.raises(UserError, match=r"layers \[3\] attend more than once in a forward pass"):
        try_model(tied_attention())
    try_model(tied_attention(), attention=False)


@pytest.mark.parametrize("family", ["nemotron_h", "bert"])
def test_a_cut_model_has_its_first_blocks_whatever_its_configuration_counts(family: str) -> None:
    model = family_model(family)
    blocks = list(find_blocks(model))
    inputs = trial_inputs(model, 8)
    with torch.no_grad(), capture(model, hidden={1, 2}) as whole:
        model(**inputs, **capture_keywords(model))
    with torch.no_grad(), at_depth(model, 2), capture(model, hidden={1, 2}) as cut:
        assert list(find_blocks(model)) == blocks[:2]
        with at_depth(model, 1):
            assert list(find_blocks(model)) == blocks[:1]
        assert list(find_blocks(model)) == blocks[:2]
        model(**inputs, **capture_keywords(model))
    assert list(find_blocks(model)) == blocks
    assert all(torch.equal(cut.hidden[layer], whole.hidden[layer]) for layer in (1, 2))


def test_a_teacher_that_counts_kinds_of_blocks_teaches_its_lower_ones() -> None:
    student, teacher = (family_model("nemotron_h", seed=seed) for seed in (1, 2))
    with torch.no_grad():
        first, second = (
            m(**BATCH, use_cache=False, output_hidden_states=True).hidden_states
            for m in (student, teacher)
        )
    losses = {"hidden": {"layer_map": [1, 2, 0, 0]}}
    with Distiller(student, teacher.requires_grad_(False), losses) as distiller:
        parts = distiller(BATCH)[1]
    mask = BATCH["attention_mask"].bool()
    for layer in (1, 2):
        expected = (first[layer] - second[layer])[mask].square().mean()
        torch.testing.assert_close(parts[f"hidden/{layer}-{layer}"], expected)


def opt(layerdrop: float) -> PreTrainedModel:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        ffn_dim=32,
        num_attention_heads=2,
        max_position_embeddings=64,
        layerdrop=layerdrop,
    )
    return OPTModel(config)


@pytest.mark.parametrize("needs", [{"attention": False}, {"hidden": False}])
def test_a_student_that_skips_blocks_while_it_trains_is_refused(needs: dict[str, bool]) -> None:
    message = r"OPTModel skips blocks at random .*\(decoder.layerdrop is 0.5\).*set layerdrop to 0"
    with pytest.raises(UserError, match=message):
        try_model(opt(0.5), **needs)
    # a model that does not train skips none, and outputs have no gaps
    try_model(opt(0.5).requires_grad_(False), **needs)
    try_model(opt(0.5), attention=False, hidden=False, outputs=True)
    try_model(opt(0.0), **needs)


def test_a_rate_that_a_configuration_alone_holds_is_refused() -> None:
    model = tiny_model("bert")
    model.config.layerdrop = 0.1
    with pytest.raises(UserError, match=r"\(config.layerdrop is 0.1\)"):
        try_model(model)
