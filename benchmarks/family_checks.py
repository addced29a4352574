"""What a model of any family is held against: its own maps, its teacher's own blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fastkd_kernels import AttentionState
from torch import Tensor
from transformers import AutoModel, Cache, PreTrainedModel

from fastkd.capture import AttentionTraits, Capture, capture, capture_keywords, find_blocks
from fastkd.capture.trial_inputs import trial_inputs as inputs_of

__all__ = [
    "blocks_in_a_row",
    "check_maps",
    "divergence_of_maps",
    "eager_maps",
    "inputs_of",
    "outputs_of",
]

# of what a block is given: the states of earlier blocks, not a setting
_STATES = frozenset({"hidden_states", "prev_topk_indices"})


def outputs_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Every tensor that a model gives, detached."""
    with torch.no_grad():
        output = model(**inputs, **capture_keywords(model))
    return [value for value in output.to_tuple() if isinstance(value, Tensor)]


def eager_maps(folder: Path, inputs: Mapping[str, Tensor]) -> list[Tensor] | None:
    """The attention maps that transformers itself gives, [batch, heads, tokens, tokens] a layer."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        output = model(**inputs, **capture_keywords(model), output_attentions=True)
    maps = getattr(output, "attentions", None)
    whole = maps and all(isinstance(m, Tensor) and m.ndim == 4 for m in maps)
    return list(maps) if whole else None


def check_maps(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    maps: Sequence[Tensor],
    traits: AttentionTraits,
) -> float:
    """Largest difference between the softmax of captured states and a model's own maps.

    Raises:
        AssertionError: it is more than fp32 rounds scores of this size.
    """
    layers = range(1, len(maps) + 1)
    with torch.no_grad(), capture(model, attention=layers) as states:
        model(**inputs, **capture_keywords(model))
    mask = inputs.get("attention_mask")
    worst, largest = 0.0, 1.0
    for layer, expected in zip(layers, maps, strict=True):
        found = outcomes(states.attention[layer], traits.causal, traits.windows.get(layer), mask)
        keys = expected.shape[-1]
        found = found[..., :keys]
        # some functions leave the share of the sink to the keys in the maps they return
        if states.attention[layer].sinks is not None:
            found = found / found.sum(-1, keepdim=True)
            expected = expected / expected.sum(-1, keepdim=True)
        difference = (found - expected.double()).abs()
        if mask is not None:
            difference = difference.masked_fill(mask[:, None, :, None] == 0, 0.0)
        worst = max(worst, float(difference.nan_to_num(nan=torch.inf).max()))
        query, key, _, scale, *_ = states.attention[layer]
        largest = max(largest, scale * float(query.norm(dim=-1).max() * key.norm(dim=-1).max()))
    bound = 32 * torch.finfo(torch.float32).eps * largest
    assert worst < bound, f"captured attention differs from the model's maps by {worst:.2g}"
    return worst


def outcomes(
    state: AttentionState, causal: bool, window: int | None, mask: Tensor | None
) -> Tensor:
    """Probabilities of the keys, and of the sink where there is one, fp64 [batch, heads, tokens,
    keys or keys + 1]."""
    repeat = state.query.shape[1] // state.key.shape[1]
    key = state.key.double().repeat_interleave(repeat, dim=1)
    scores = state.query.double() @ key.mT * state.scale
    if state.softcap is not None:
        scores = state.softcap * torch.tanh(scores / state.softcap)
    tokens = scores.shape[-1]
    ahead = torch.arange(tokens) - torch.arange(tokens)[:, None]
    seen = ahead.abs() < (window or tokens)
    if causal:
        seen = seen & (ahead <= 0)
    seen = seen.expand(len(scores), 1, -1, -1)
    if mask is not None:
        seen = seen & mask[:, None, None].bool()
    scores = scores.masked_fill(~seen, -torch.inf)
    if state.sinks is not None:
        sinks = state.sinks.double()[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return scores.softmax(dim=-1)


def divergence_of_maps(
    states: Sequence[Capture],
    sources: Sequence[int],
    traits: Sequence[AttentionTraits],
    mask: Tensor | None,
) -> Tensor:
    """KL of the teacher's whole maps from the student's, a mean over valid rows, fp32 [links]."""
    found = []
    for layer, source in enumerate(sources, start=1):
        pair = []
        for side, number in ((0, layer), (1, source)):
            kept = traits[side]
            state = states[side].attention[number]
            pair.append(outcomes(state, kept.causal, kept.windows.get(number), mask))
        student, teacher = pair
        rows = torch.where(teacher > 0, teacher * (teacher.log() - student.log()), 0.0).sum(-1)
        if mask is not None:
            rows = rows[mask[:, None].bool().expand_as(rows)]
        found.append(rows.mean())
    return torch.stack(found).detach().float()


def blocks_in_a_row(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sources: Sequence[int],
    inputs: Mapping[str, Tensor],
) -> None:
    """See that a student is some blocks of its teacher in a row: what its model gives each block,
    and what the block makes of it.

    Raises:
        AssertionError: naming the block.
    """
    given, expected = _calls(student, inputs), _calls(teacher, inputs)
    for number, source in enumerate(sources, start=1):
        arguments, keywords, output = given[number]
        wanted_arguments, wanted_keywords, _ = expected[source]
        for name in wanted_keywords.keys() - _STATES:
            same = _same(keywords.get(name), wanted_keywords[name])
            assert same, f"block {number} is given another {name} than teacher block {source}"
        for place in range(1, len(wanted_arguments)):
            wanted = wanted_arguments[place]
            if not _is_state(wanted, _first(output)):
                same = _same(arguments[place], wanted)
                assert same, f"block {number} is given another argument {place}"
        # heads that take no `use_cache` have built one, which holds these tokens already
        anew = {n: None if isinstance(v, Cache) else v for n, v in keywords.items()}
        with torch.no_grad():
            made = find_blocks(teacher)[source - 1](*arguments, **anew)
        error = (_first(made) - _first(output)).abs().max()
        scale = _first(output).abs().max()
        assert error <= 1e-5 * scale, f"block {number} is not teacher block {source}: {error:.2g}"


def _calls(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    handles = []
    for number, block in enumerate(find_blocks(model), start=1):

        def note(
            _module: Any, arguments: Any, keywords: Any, output: Any, number: int = number
        ) -> None:
            found[number] = arguments, dict(keywords), output

        handles.append(block.register_forward_hook(note, with_kwargs=True))
    with torch.no_grad():
        model(**inputs, **capture_keywords(model))
    for handle in handles:
        handle.remove()
    return found


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple | list) else output
    return first


def _is_state(given: Any, like: Tensor) -> bool:
    """Whether an argument is what an earlier block made: it has a vector for each token."""
    floats = isinstance(given, Tensor) and given.is_floating_point() and given.ndim == like.ndim
    return floats and given.shape[:-1] == like.shape[:-1]


def _same(given: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(given, Tensor) and torch.equal(given, expected)
    if isinstance(expected, tuple | list):
        return len(given) == len(expected) and all(map(_same, given, expected))
    plain = bool | int | float | str | None
    return given == expected if isinstance(expected, plain) else True
