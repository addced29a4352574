"""The mean over all rows against the mean over sequences, by a plain computation in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from divergence_cases import KINDS
from fastkd_kernels import attention_divergence, reference, relation_divergence
from fastkd_kernels.attention_divergence.op import item_weights
from kernel_cases import attention_states, errors, leaves_of, loss_and_gradients
from torch import Tensor

BACKENDS = ["torch", "triton"] if not torch.cuda.is_available() else ["torch"]
LENGTHS = (9, 5)


def lengths(*tokens: int) -> Tensor:
    return torch.arange(max(LENGTHS))[None, :] < torch.tensor(tokens)[:, None]


def row_values(states: Any, kind: str) -> list[list[Tensor]]:
    """KL or MSE of every valid row, `[heads, rows]`, of each pair and sequence alone."""
    found = []
    for student, teacher in zip(*states, strict=True):
        of_pair = []
        for item, length in enumerate(LENGTHS):
            maps = []
            for state in (student, teacher):
                query, key = state.query[item, :, :length], state.key[item, :, :length]
                key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
                maps.append((state.scale * query @ key.mT).softmax(-1))
            p, t = maps
            of_pair.append(
                (t * (t / p).log()).sum(-1) if kind == "kl" else (p - t).square().sum(-1)
            )
        found.append(of_pair)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_both_means_are_those_of_a_plain_computation(kind: Any, backend: Any) -> None:
    """Sequences of 9 and 5 tokens: one mean over 14 rows, or a mean of two means."""
    states = attention_states(2, 2, 4, 9, (5, 6), kv_heads=(2, 4))
    values = row_values(states, kind)
    expected = {
        "tokens": [torch.cat([rows.flatten() for rows in pair]).mean() for pair in values],
        "sequences": [torch.stack([rows.mean() for rows in pair]).mean() for pair in values],
    }
    leaves, mask = leaves_of(states[0]), lengths(*LENGTHS)
    for reduction, losses in expected.items():
        options = {"kind": kind, "key_mask": mask, "query_mask": mask, "reduction": reduction}
        given = attention_divergence(*states, **options, backend=backend)
        plain = torch.stack(losses)
        torch.testing.assert_close(given, plain, rtol=1e-9, atol=0.0)
        factor = torch.tensor([0.3, -1.7], dtype=torch.float64)
        made = torch.autograd.grad(given, leaves, factor)
        assert (
            max(errors(made, torch.autograd.grad(plain, leaves, factor, retain_graph=True))) < 1e-9
        )
    apart = [torch.stack(losses) for losses in expected.values()]
    assert ((apart[0] - apart[1]).abs() / apart[0] > 0.01).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sinks", [False, True])
def test_sequences_are_those_of_the_definition(sinks: bool, kind: Any, backend: Any) -> None:
    """Causal, with a window and a sequence without rows, which is not counted."""
    student, teacher = attention_states(2, 3, 2, 9, (5, 6))
    if sinks:
        student, teacher = (
            [state._replace(sinks=0.1 * torch.arange(2.0).double() + index) for state in side]
            for index, side in enumerate((student, teacher))
        )
        student = [state._replace(sinks=state.sinks.requires_grad_()) for state in student]
    mask = lengths(9, 0, 5)
    options: dict[str, Any] = {"kind": kind, "key_mask": mask, "query_mask": mask}
    options |= {"causal": True, "window": 4, "reduction": "sequences"}
    leaves = [*leaves_of(student), *(s.sinks for s in student if s.sinks is not None)]
    given = loss_and_gradients(
        attention_divergence, leaves, student, teacher, **options, backend=backend
    )
    expected = loss_and_gradients(
        reference.attention_divergence, leaves, student, teacher, **options
    )
    assert max(errors(given, expected)) < 1e-8
    # the sequences alone, each a mean of its own
    alone = []
    for item in (0, 2):
        sides = [
            [s._replace(query=s.query[item : item + 1], key=s.key[item : item + 1]) for s in side]
            for side in (student, teacher)
        ]
        of_item = {
            **options,
            "key_mask": mask[item : item + 1],
            "query_mask": mask[item : item + 1],
        }
        alone.append(attention_divergence(*sides, **of_item | {"reduction": "tokens"}))
    torch.testing.assert_close(given[0], torch.stack(alone).mean(0), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_relations_take_it_too(backend: Any) -> None:
    states = attention_states(1, 2, 4, 9, (6, 3))
    mask = lengths(*LENGTHS)
    options: dict[str, Any] = {"relation": "qq", "relation_heads": 3, "backend": backend}
    options |= {"key_mask": mask, "query_mask": mask}
    alone = [
        relation_divergence(
            *([s._replace(query=s.query[i : i + 1]) for s in side] for side in states),
            **{**options, "key_mask": mask[i : i + 1], "query_mask": mask[i : i + 1]},
        )
        for i in range(2)
    ]
    given = relation_divergence(*states, **options, reduction="sequences")
    torch.testing.assert_close(given, torch.stack(alone).mean(0), rtol=1e-9, atol=0.0)
    default = relation_divergence(*states, **options)
    assert torch.equal(default, relation_divergence(*states, **options, reduction="tokens"))
    assert (default - given).abs().item() > 1e-3 * given.item()


def test_weights_of_items() -> None:
    rows = lengths(4, 0, 1)
    tokens = item_weights(rows, 3, 9, "tokens", rows.device)
    assert tokens.tolist() == [1 / 5, 1 / 5, 1 / 5]
    assert item_weights(rows, 3, 9, "sequences", rows.device).tolist() == [1 / 8, 0, 1 / 2]
    assert item_weights(None, 2, 4, "sequences", rows.device).tolist() == [1 / 8, 1 / 8]
    assert item_weights(rows & False, 3, 9, "tokens", rows.device).tolist() == [0, 0, 0]
    assert item_weights(rows & False, 3, 9, "sequences", rows.device).tolist() == [0, 0, 0]


def test_another_word_is_refused() -> None:
    states = attention_states(1, 1, 2, 3, (4, 4))
    reduction: Any = "batchmean"
    with pytest.raises(
        ValueError, match="reduction='batchmean' is not known; choose one of tokens, s"
    ):
        attention_divergence(*states, reduction=reduction)
