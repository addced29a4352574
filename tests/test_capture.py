"""What capture leaves is what the model's own attention saw, and nothing stays behind."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastkd_kernels import LogitsHead
from tiny_models import (
    ARCHITECTURES,
    HEADS,
    LAYERS,
    NAMES,
    VOCABULARY,
    WIDTH,
    WINDOW,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastkd.capture import (
    Capture,
    capture,
    capture_keywords,
    find_blocks,
    route_attention,
    try_model,
)
from fastkd.errors import UserError
from fastkd.models import dropout_rates

BLOCKS = range(1, LAYERS + 1)
BATCH = tiny_batch()
VALID = BATCH["attention_mask"].bool()
# in fp64, transformers' eager attention makes NaN of a padded query that no key is near enough to
SHORT_PADDING = tiny_batch((12, 11, 12 - WINDOW))


def routed(model: PreTrainedModel, implementation: str = "sdpa") -> PreTrainedModel:
    """A copy of a model that runs through the listener."""
    model = copy.deepcopy(model)
    route_attention(model, implementation)
    return model


def plain(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """A copy of a model that runs an implementation of transformers itself."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    return model


def visible(name: str, layer_type: str, valid: Tensor) -> Tensor:
    """The (query, key) pairs that a block may look at, [batch, 1, tokens, tokens]."""
    tokens = valid.shape[1]
    seen = valid[:, None, None, :].expand(-1, 1, tokens, -1)
    if ARCHITECTURES[name].causal:
        seen = seen & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if layer_type == "sliding_attention":
        position = torch.arange(tokens)
        seen = seen & ((position[:, None] - position).abs() <= WINDOW)
    return seen


def run(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    state: Tensor = model(**(inputs or BATCH), **capture_keywords(model)).last_hidden_state
    return state


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_captured_queries_and_keys_give_the_models_own_attention(
    name: str, implementation: str
) -> None:
    batch = SHORT_PADDING if name == "modernbert" else BATCH
    valid = batch["attention_mask"].bool()
    model = tiny_model(name).double()
    listening = routed(model, implementation)
    with torch.no_grad():
        with capture(listening, attention=BLOCKS) as states:
            run(listening, **batch)
        own = plain(model, "eager")(**batch, output_attentions=True).attentions
    layer_types = getattr(model.config, "layer_types", None) or ["full_attention"] * LAYERS
    if name == "modernbert":
        assert set(layer_types) == {"full_attention", "sliding_attention"}
    assert sorted(states.attention) == list(BLOCKS)
    for block, (expected, layer_type) in enumerate(zip(own, layer_types, strict=True), start=1):
        state = states.attention[block]
        key = state.key.repeat_interleave(HEADS // state.key.shape[1], dim=1)
        scores = state.scale * (state.query @ key.mT)
        unseen = ~visible(name, layer_type, valid)
        probabilities = scores.masked_fill(unseen, float("-inf")).softmax(-1).float()
        rows = valid[:, None, :].expand(-1, HEADS, -1)
        torch.testing.assert_close(probabilities[rows], expected[rows].float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_captured_shapes_are_those_before_grouped_heads_are_repeated(name: str) -> None:
    model = routed(tiny_model(name))
    with torch.no_grad(), capture(model, attention=[1], hidden=[0, 1]) as states:
        run(model)
    batch, tokens = VALID.shape
    kv_heads = getattr(model.config, "num_key_value_heads", None) or HEADS
    state = states.attention[1]
    assert state.query.shape == (batch, HEADS, tokens, WIDTH // HEADS)
    assert state.key.shape == (batch, kv_heads, tokens, WIDTH // HEADS)
    assert state.value is not None
    assert state.value.shape == state.key.shape
    assert {h.shape for h in states.hidden.values()} == {(batch, tokens, WIDTH)}


@pytest.mark.parametrize("scaled_by_layer", [False, True])
def test_scale_is_the_one_that_the_model_uses(scaled_by_layer: bool) -> None:
    model = routed(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=scaled_by_layer))
    with torch.no_grad(), capture(model, attention=BLOCKS) as states:
        run(model)
    head = (WIDTH // HEADS) ** -0.5
    expected = {block: head / (block if scaled_by_layer else 1) for block in BLOCKS}
    assert {block: state.scale for block, state in states.attention.items()} == pytest.approx(
        expected
    )


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_bit_for_bit_those_of_the_implementation(
    name: str, implementation: str, padded: bool
) -> None:
    model = tiny_model(name)
    inputs = BATCH if padded else {"input_ids": BATCH["input_ids"]}
    listening = routed(model, implementation)
    with torch.no_grad():
        expected = run(plain(model, implementation), **inputs)
        assert torch.equal(run(listening, **inputs), expected)
        with capture(listening, attention=BLOCKS, hidden=(0, *BLOCKS)):
            captured = run(listening, **inputs)
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_numbered_from_the_embeddings(name: str) -> None:
    model = routed(tiny_model(name))
    with torch.no_grad(), capture(model, hidden=(0, *BLOCKS)) as states:
        output = model(**BATCH, **capture_keywords(model), output_hidden_states=True)
    own = output.hidden_states
    # decoders and ModernBERT report their last state after the final norm
    comparable = LAYERS if own[-1] is output.last_hidden_state else LAYERS + 1
    if ARCHITECTURES[name].causal or name == "modernbert":
        comparable = LAYERS
    assert sorted(states.hidden) == list(range(LAYERS + 1))
    for layer in range(comparable):
        assert torch.equal(states.hidden[layer], own[layer])


@pytest.mark.parametrize("name", NAMES)
def test_each_hidden_state_is_what_its_block_makes_of_the_one_before(name: str) -> None:
    model = routed(tiny_model(name))
    entered: dict[int, Tensor] = {}
    returned: dict[int, Tensor] = {}

    def note(block: int) -> None:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            entered[block] = args[0]
            returned[block] = output[0] if isinstance(output, tuple) else output

        find_blocks(model)[block - 1].register_forward_hook(hook)

    for block in BLOCKS:
        note(block)
    with torch.no_grad(), capture(model, hidden=(0, *BLOCKS)) as states:
        run(model)
    for block in BLOCKS:
        assert torch.equal(states.hidden[block - 1], entered[block])
        assert torch.equal(states.hidden[block], returned[block])


@pytest.mark.parametrize(
    ("attention", "hidden"), [((2,), (0, 4)), ((), (3,)), ((1, 4), ()), ((), ())]
)
def test_only_what_is_asked_for_is_recorded(
    attention: tuple[int, ...], hidden: tuple[int, ...]
) -> None:
    model = routed(tiny_model("bert"))
    with torch.no_grad(), capture(model, attention=attention, hidden=hidden) as states:
        run(model)
    assert tuple(sorted(states.attention)) == attention
    assert tuple(sorted(states.hidden)) == hidden


def test_two_models_are_captured_apart_at_the_same_time() -> None:
    student, teacher = routed(tiny_model("bert", seed=1)), routed(tiny_model("bert", seed=2))
    with (
        torch.no_grad(),
        capture(student, attention=[1]) as mine,
        capture(teacher, attention=[1]) as theirs,
    ):
        run(student)
        run(teacher)
    assert not torch.equal(mine.attention[1].query, theirs.attention[1].query)


def traces(model: nn.Module) -> Iterator[str]:
    """Everything of capture that is still on a model."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            yield f"hook on {name}"
        yield from (f"{key} on {name}" for key in vars(module) if "fastkd" in key)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_on_the_model(name: str) -> None:
    model = routed(tiny_model(name))
    with torch.no_grad(), capture(model, attention=BLOCKS, hidden=(0, *BLOCKS)):
        assert list(traces(model))
        run(model)
    assert not list(traces(model))


def test_nothing_stays_on_a_model_that_raises() -> None:
    model = routed(tiny_model("bert"))
    with (
        pytest.raises((IndexError, RuntimeError)),
        capture(model, attention=BLOCKS, hidden=(0, *BLOCKS)),
    ):
        run(model, input_ids=torch.full((1, 4), VOCABULARY))
    assert not list(traces(model))
    with torch.no_grad(), capture(model, attention=BLOCKS) as states:
        run(model)
    assert sorted(states.attention) == list(BLOCKS)


def test_a_capture_within_a_capture_hears_alone_and_hands_back() -> None:
    model = routed(tiny_model("bert"))
    with torch.no_grad(), capture(model, attention=[1]) as outer:
        with capture(model, attention=[1]) as inner:
            run(model)
        assert not outer.attention
        run(model)
    assert torch.equal(inner.attention[1].query, outer.attention[1].query)
    assert not list(traces(model))


def test_a_pass_of_another_thread_is_refused_while_a_model_is_recorded() -> None:
    model = tiny_model("bert")
    with torch.no_grad(), ThreadPoolExecutor(1) as thread:
        with capture(model, hidden=[1]) as states:
            run(model)
            with pytest.raises(UserError, match="is being recorded in another thread"):
                thread.submit(run, model).result()
        thread.submit(run, model).result()
    assert list(states.hidden) == [1]


def test_heads_may_be_left_in_any_order() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=2))
    first, second = capture(model, logits=True), capture(model, logits=True)
    states = first.__enter__(), second.__enter__()
    model(**BATCH)
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert all(isinstance(found.logits, LogitsHead) for found in states)
    assert "forward" not in model.lm_head.__dict__


def test_a_module_that_stands_in_a_block_twice_is_left_clean() -> None:
    model = routed(tiny_model("bert"))
    block = find_blocks(model)[0]
    block.again = block.attention
    with torch.no_grad(), capture(model, attention=[1]) as outer:
        with capture(model, attention=[1], whole=False):
            pass
        run(model)
    assert sorted(outer.attention) == [1]
    assert not list(traces(model))


def test_tensors_go_with_the_capture() -> None:
    model = routed(tiny_model("bert"))
    with torch.no_grad(), capture(model, attention=[2], hidden=[0, 3]) as states:
        run(model)
    kept = [weakref.ref(states.attention[2].query), *map(weakref.ref, states.hidden.values())]
    assert all(reference() is not None for reference in kept)
    del states
    gc.collect()
    assert all(reference() is None for reference in kept)


def trained(model: PreTrainedModel) -> tuple[Capture, int, dict[str, Tensor]]:
    """Run a backward pass from captured tensors; count the tensors recorded meanwhile."""
    with capture(model, attention=BLOCKS, hidden=(0, *BLOCKS)) as states:
        output = run(model)
    before = {block: id(state.query) for block, state in states.attention.items()}
    loss = output.square().mean()
    for state in states.attention.values():
        loss = loss + (state.query * state.scale).square().mean() + state.key.square().mean()
    for hidden in states.hidden.values():
        loss = loss + hidden.square().mean()
    loss.backward()
    changed = sum(before[block] != id(state.query) for block, state in states.attention.items())
    return states, changed, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient_and_records_nothing_twice(name: str) -> None:
    model = routed(tiny_model(name)).train()
    assert name not in ("bert", "gpt2") or any(dropout_rates(model.config).values())
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    _, _, expected = trained(model)
    torch.manual_seed(0)
    states, changed, gradients = trained(checkpointed)
    assert sorted(states.attention) == list(BLOCKS)
    assert changed == 0
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-6, atol=1e-7)


def test_checkpointing_recomputes_blocks() -> None:
    model = routed(tiny_model("bert")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    find_blocks(model)[1].attention.register_forward_pre_hook(count)
    trained(model)
    assert calls == 2


@pytest.mark.parametrize("name", NAMES)
def test_flash_attention_finds_its_own_name_in_the_configuration(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It chooses its kernel by that name; what stands in for it here computes as sdpa does."""
    seen: list[str] = []

    def stand_in(module: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        seen.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *arguments, **keywords)

    model = _routed_to_flash(tiny_model(name), stand_in, monkeypatch)
    model(input_ids=tiny_batch()["input_ids"])
    assert seen == ["flash_attention_2"] * LAYERS
    assert model.config._attn_implementation == "fastkd-flash_attention_2"


def _routed_to_flash(
    model: PreTrainedModel, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> PreTrainedModel:
    """Let a model believe that flash attention is installed and is `function`."""
    mapping = type(ALL_ATTENTION_FUNCTIONS)._global_mapping
    monkeypatch.setitem(mapping, "flash_attention_2", function)
    monkeypatch.setattr(model, "_flash_attn_can_dispatch", lambda *_, **__: True)
    loaded: list[str] = []
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", loaded.append)
    route_attention(model, "flash_attention_2")
    assert loaded == ["flash_attention_2"]
    return model


def test_flash_attention_is_tried_as_sdpa_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is checked before it moves to its GPU; afterwards it is routed as before."""

    def on_gpu_only(*_: Any, **__: Any) -> Any:
        raise RuntimeError("FlashAttention only supports CUDA tensors")

    model = _routed_to_flash(tiny_model("bert"), on_gpu_only, monkeypatch)
    try_model(model)
    assert model.config._attn_implementation == "fastkd-flash_attention_2"
    with pytest.raises(RuntimeError, match="only supports CUDA"):
        model(**tiny_batch())
