"""Sequences in one row: views of them, attention, and models that read them as padded batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import HEADS, NAMES, VOCABULARY, WIDTH, WINDOW, tiny_batch, tiny_config
from tiny_tasks import encoded
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    MobileBertConfig,
    NomicBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from fastkd.capture import (
    PaddedStates,
    capture,
    reading,
    route_attention,
    try_model,
    try_packed,
)
from fastkd.capture.packed_attention import packed_sdpa
from fastkd.errors import UserError
from fastkd.losses import count_divisors
from fastkd.packed_row import PackedRow
from fastkd.types import LENGTHS, STARTS, Inputs

# neighbours of equal length, and equal ones apart
LENGTHS_OF = [(5, 3, 3, 7, 5), (4, 4, 4), (6,), (1, 2)]
TOKENS = 20


def row_of(lengths: tuple[int, ...]) -> PackedRow:
    return PackedRow(lengths, torch.tensor([0, *np.cumsum(lengths)]).int())


def packed(batch: dict[str, Tensor]) -> Inputs:
    """A padded batch in one row, written with loops."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    rows = [ids[:n] for ids, n in zip(batch["input_ids"], lengths, strict=True)]
    positions = [torch.arange(n) for n in lengths]
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat(positions)[None],
        STARTS: torch.tensor([0, *np.cumsum(lengths)]).int(),
        LENGTHS: torch.tensor(lengths),
    }


@pytest.mark.parametrize("lengths", LENGTHS_OF)
@pytest.mark.parametrize("dim", [1, 2])
def test_padded_views_hold_each_sequence(lengths: tuple[int, ...], dim: int) -> None:
    row = row_of(lengths)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, sum(lengths), 2, 3, generator=generator, dtype=torch.float64)
    given = (states if dim == 1 else states.transpose(1, 2)).requires_grad_()
    view = row.padded(given, dim)
    assert view.shape[0] == len(lengths) and view.shape[dim] == max(lengths)
    mask = row.mask
    for number, (length, start) in enumerate(zip(lengths, row.starts.tolist(), strict=False)):
        tokens = view[number].transpose(0, dim - 1)
        assert torch.equal(tokens[:length], states[0, start : start + length])
        assert not tokens[length:].any()
        if mask is not None:
            assert mask[number].tolist() == [place < length for place in range(max(lengths))]
    assert (mask is None) == (len(set(lengths)) == 1)
    assert torch.autograd.gradcheck(lambda x: row.padded(x, dim), (given,))


def test_what_a_module_gives_is_padded_or_refused() -> None:
    row = row_of((5, 3, 3))
    states = torch.randn(1, 11, 2)
    assert torch.equal(row.padded_module(states), row.padded(states))
    pooled = torch.randn(3, 4)
    assert row.padded_module(pooled) is pooled
    for shape in ((1, 2, 11, 4), (11, 4), ()):
        with pytest.raises(UserError, match=r"of 3 packed sequences with 11 tokens, expected \[1,"):
            row.padded_module(torch.randn(shape))


class Attends(nn.Module):
    """What an attention function is told of its module."""

    def __init__(self, causal: bool, groups: int) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = causal, groups


@pytest.mark.parametrize("lengths", LENGTHS_OF)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("groups", "window"), [(1, None), (2, None), (1, 2), (2, 9)])
def test_attention_stays_within_a_sequence(
    lengths: tuple[int, ...], causal: bool, groups: int, window: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 4, generator=generator, dtype=torch.float64)
        for heads in (4, 4 // groups, 4 // groups)
    )
    row, module = row_of(lengths), Attends(causal, groups)
    found, _ = packed_sdpa(
        module, query, key, value, None, packed_row=row, sliding_window=window, scaling=0.3
    )
    starts = row.starts.tolist()
    for start, length in zip(starts, lengths, strict=False):
        part = slice(start, start + length)
        q, k, v = (t[:, :, part] for t in (query, key, value))
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        seen = torch.tensor(
            [
                [
                    (window is None or abs(i - j) < window) and (j <= i or not causal)
                    for j in range(length)
                ]
                for i in range(length)
            ]
        )
        expected = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3)
        torch.testing.assert_close(found[:, part], expected.transpose(1, 2))


def test_attention_of_rows_reads_nothing_else() -> None:
    model = model_of("bert", head=False)
    try_packed(model, TOKENS)
    with pytest.raises(UserError, match="reads packed rows alone, but was given no row"):
        model(**tiny_batch())


def test_examples_follow_each_other() -> None:
    examples = encoded([5, 3, 12, 7])
    row = examples.packed([2, 0, 1])
    assert row["input_ids"].tolist() == [[3] * 12 + [1] * 5 + [2] * 3]
    assert row["position_ids"].tolist() == [[*range(12), *range(5), *range(3)]]
    assert row[STARTS].tolist() == [0, 12, 17, 20] and row[STARTS].dtype == torch.int32
    assert row[LENGTHS].tolist() == [12, 5, 3]
    assert row["labels"].tolist() == [2, 0, 1]


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_counts_what_its_padded_batch_counts(causal: bool) -> None:
    batch, labels = tiny_batch((12, 7, 3)), torch.tensor([1, -100, 0])
    expected = count_divisors(batch, causal, "valid", labels)
    assert torch.equal(count_divisors(packed(batch), causal, "valid", labels), expected)


def model_of(name: str, head: bool, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(name, **changes)
    kind = AutoModelForSequenceClassification if head else AutoModel
    model: PreTrainedModel = kind.from_config(config)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_models_read_rows_as_padded_batches(name: str) -> None:
    model = model_of(name, head=False)
    try_model(model, TOKENS)
    batch = tiny_batch((TOKENS, 7, 7, 3, WINDOW))
    wanted = {"attention": {1, 2}, "hidden": {0, 1, 4}, "outputs": True}
    with capture(model, **wanted) as padded:
        model(**batch)
    try_packed(model, TOKENS)
    inputs = packed(batch)
    row = PackedRow.of(inputs)
    assert row is not None
    with reading(model, inputs) as read, capture(model, **wanted) as states:
        model(**read)
    assert states.hidden[1].shape[:2] == (1, int(batch["attention_mask"].sum()))
    found = PaddedStates(states, row, values=True).of(wanted)
    valid = batch["attention_mask"].bool()
    for layer, state in padded.hidden.items():
        torch.testing.assert_close(found.hidden[layer][valid], state[valid], rtol=1e-4, atol=1e-5)
    for layer, attention in padded.attention.items():
        for kind in ("query", "key", "value"):
            given, expected = (
                getattr(of, kind).transpose(1, 2)[valid]
                for of in (found.attention[layer], attention)
            )
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    assert found.outputs is not None and padded.outputs is not None
    torch.testing.assert_close(found.outputs[valid], padded.outputs[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, {}) for name in NAMES), ("modernbert", {"classifier_pooling": "mean"})],
)
def test_heads_read_each_sequence(name: str, changes: dict[str, Any]) -> None:
    """Its first token, its last one, or all of them."""
    model = model_of(name, head=True, **changes)
    batch = tiny_batch((TOKENS, 7, 7, 3))
    expected = model(**batch).logits
    try_packed(model, TOKENS)
    with reading(model, packed(batch)) as read:
        torch.testing.assert_close(model(**read).logits, expected, rtol=1e-4, atol=1e-5)


def flash_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What flash attention computes of a row, [total, heads, head_dim], with a loop."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    sizes = cu_seqlens_q.diff().tolist()
    assert max_seqlen_q == max_seqlen_k == max(sizes)
    outputs = []
    for parts in zip(*(tensor.split(sizes) for tensor in (q, k, v)), strict=True):
        query, key, value = (part.transpose(0, 1) for part in parts)
        key, value = (t.repeat_interleave(len(query) // len(t), dim=0) for t in (key, value))
        position = torch.arange(query.shape[1])
        distance = position - position[:, None]
        seen = distance <= 0 if causal else distance == distance
        if window_size != (-1, -1):
            seen &= (-distance <= window_size[0]) & (distance <= window_size[1])
        found = scaled_dot_product_attention(query, key, value, seen, scale=softmax_scale)
        outputs.append(found.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("name", ["roberta", "qwen2", "modernbert"])
def test_flash_attention_is_told_where_sequences_begin(
    name: str, routed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = None, flash_varlen, None, None, None
    flash = "transformers.modeling_flash_attention_utils"
    monkeypatch.setattr(f"{flash}._lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(f"{flash}._loaded_implementation", None)
    model = model_of(name, head=True)
    batch = tiny_batch((TOKENS, 7, 7, 3))
    expected = model(**batch).logits
    try_packed(model, TOKENS)
    model.config._attn_implementation = "flash_attention_2"
    if routed:
        route_attention(model)
    with reading(model, packed(batch)) as read:
        torch.testing.assert_close(model(**read).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (BertConfig, {"attn_implementation": "eager"}, "runs attention eager, which takes no"),
        # embeddings of a token and its neighbours
        (MobileBertConfig, {}, r"\(the state of layer 0 is off by 0\.\d+ of its norm\)"),
        # a pooler inside of the model that has the blocks
        (NomicBertConfig, {}, r"\(what the head gives is \[1, 2\], expected \[2, 2\]\)"),
    ],
)
def test_what_can_not_be_right_is_refused(
    kind: type[PreTrainedConfig], changes: dict[str, Any], said: str
) -> None:
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "hidden_size": WIDTH}
    sizes |= {"num_attention_heads": HEADS, "intermediate_size": 48, "initializer_range": 0.2}
    model = AutoModelForSequenceClassification.from_config(kind(**sizes, **changes)).eval()
    running = model.config._attn_implementation
    with pytest.raises(UserError, match=said + r".*task\.padding=buckets"):
        try_packed(model, TOKENS)
    assert model.config._attn_implementation == running


def test_attention_across_sequences_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model that takes the keywords and does not hand them on."""
    model = model_of("bert", head=False)
    monkeypatch.setattr("fastkd.capture.packed_trial.pack_attention", lambda model: None)
    with pytest.raises(UserError, match=r"\(the state of layer 1 is off by 0\.\d+ of its norm\)"):
        try_packed(model, TOKENS)


def test_positions_that_run_on_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("bert", head=False)
    forward = type(model.embeddings).forward

    def without(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = forward(self, *args, **{**kwargs, "position_ids": None})
        return found

    monkeypatch.setattr(type(model.embeddings), "forward", without)
    with pytest.raises(UserError, match=r"\(the state of layer 0 is off by 0\.\d+ of its norm\)"):
        try_packed(model, TOKENS)
