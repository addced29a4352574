"""`torch.compile` of whole models: what is captured is what an eager pass leaves, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastkd_kernels import LogitsHead
from tiny_models import tiny_batch, tiny_config, tiny_model
from tiny_runs import assert_same_run, make_recipe, read_weights
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, PreTrainedModel

import fastkd
from fastkd.capture import (
    Capture,
    CompiledCapture,
    capture,
    capture_keywords,
    compiled,
    route_attention,
)
from fastkd.capture.compiled import check_compiler
from fastkd.errors import UserError
from fastkd.layer_map import Progress
from fastkd.layer_map.random_map import RandomMap

WANTED = {"attention": {1}, "hidden": {0, 1}}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BATCHES = [tiny_batch(lengths) for lengths in ((8, 5), (12, 7, 3), (6, 6, 2, 1))]


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """The graph runs as it was traced, which takes a tenth of the time of compiling it."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    counters.clear()
    yield lambda name: monkeypatch.setattr(compiled, "BACKEND", name)
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def student() -> PreTrainedModel:
    # a block more is traced for as long again
    made = tiny_model("bert", num_hidden_layers=1, **NO_DROPOUT)
    route_attention(made, "sdpa")
    return made.train()


def eager(model: PreTrainedModel, batch: dict[str, Tensor], wanted: dict[str, Any]) -> Capture:
    with capture(model, **wanted) as states:
        model(**batch, **capture_keywords(model))
    return states


def tensors(states: Capture) -> list[Tensor]:
    found = [part for s in states.attention.values() for part in (s.query, s.key, s.value)]
    found += [*states.hidden.values(), states.outputs, *states.modules.values()]
    head = states.logits
    found += [head.hidden, head.weight] if isinstance(head, LogitsHead) else [head]
    return [tensor for tensor in found if tensor is not None]


def gradients(model: nn.Module, states: Capture) -> list[Tensor | None]:
    model.zero_grad()
    torch.stack([tensor.square().sum() for tensor in tensors(states)]).sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(
    model: PreTrainedModel,
    recorded: CompiledCapture,
    wanted: dict[str, Any],
    batches: list[dict[str, Tensor]],
) -> None:
    for batch in batches:
        expected = eager(model, batch, wanted)
        found = recorded({**batch, **capture_keywords(model)})
        assert list(found.attention) == list(expected.attention)
        assert [s.scale for s in found.attention.values()] == [
            s.scale for s in expected.attention.values()
        ]
        torch.testing.assert_close(tensors(found), tensors(expected))
        torch.testing.assert_close(gradients(model, found), gradients(model, expected))


def test_states_and_gradients_are_those_of_an_eager_pass(backend: Callable[[str], None]) -> None:
    # what is recomputed is cut out of the graph here
    backend("aot_eager")
    model = student()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wanted = {**WANTED, "outputs": True, "modules": {"encoder.layer.0.intermediate"}}
    with CompiledCapture(model, wanted) as recorded:
        assert_same(model, recorded, wanted, BATCHES[:1])


def test_a_language_models_head_is_left_out_while_it_is_recorded() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=2))
    route_attention(model, "sdpa")
    wanted = {"attention": {1, 2}, "hidden": {0, 2}, "logits": True}
    recorded = CompiledCapture(model, wanted)
    for _ in range(2):
        with recorded:
            assert_same(model.train(), recorded, wanted, BATCHES)
            # outside of its passes the model makes its logits
            assert model(**BATCHES[0]).logits.shape[-1] == model.config.vocab_size
    head = recorded.open()({**BATCHES[0], **capture_keywords(model)}).logits
    recorded.close()
    assert isinstance(head, LogitsHead) and head.weight is model.lm_head.weight
    # one of the first shape, one of any
    assert graphs() <= 2


def test_no_hook_is_left_and_nothing_is_recorded_between_passes() -> None:
    model = student()
    before = [dict(module.__dict__) for module in model.modules()]
    with CompiledCapture(model, WANTED) as recorded:
        kept = recorded(BATCHES[0])
        model(**BATCHES[1])
        # a second listener takes the place of the first for a while
        eager(model, BATCHES[1], WANTED)
        again = recorded(BATCHES[0])
    torch.testing.assert_close(tensors(again), tensors(kept))
    assert graphs() == 1
    after = [dict(module.__dict__) for module in model.modules()]
    assert [list(d) for d in after] == [list(d) for d in before]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_a_model_does_not_leave_is_refused() -> None:
    model = student()
    run = torch.compile(model, backend="eager")
    run(**BATCHES[0])
    with (
        pytest.raises(UserError, match=r"of layers \[1\], hidden of layers \[0, 1\] can't be"),
        capture(model, **WANTED),
    ):
        run(**BATCHES[0])
    with CompiledCapture(model, WANTED) as recorded:
        recorded(BATCHES[0])
    # the hooks that were traced are gone, and the block is never called again
    model.encoder.layer[0].forward = lambda hidden, *_arguments, **_keywords: hidden
    with (
        CompiledCapture(model, WANTED) as recorded,
        pytest.raises(UserError, match=r"attention of layers \[1\] can't be captured of the comp"),
    ):
        recorded(BATCHES[0])


def test_a_map_that_moves_unannounced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one from outside may; that of fastkd says so, and all that it may draw is recorded."""
    monkeypatch.setattr(RandomMap, "moves", False)
    layer_map = {"kind": "random", "redraw": "step"}
    with fastkd.Distiller(*pair(), {"hidden": {}}, layer_map, compile=True) as distiller:
        drawn = [distiller.objective.maps["hidden"].links(Progress(step)) for step in range(9)]
        other = next(step for step, links in enumerate(drawn) if links != drawn[0])
        distiller.at(0, 9)
        distiller(BATCHES[0])
        distiller.at(other, 9)
        with pytest.raises(UserError, match=r"hidden of layers \[\d\] can't be captured of the c"):
            distiller(BATCHES[0])


def test_a_model_that_is_no_one_graph_is_refused() -> None:
    model = student()
    model.encoder.layer[0].register_forward_hook(lambda *_: print("hook"))
    with (
        CompiledCapture(model, WANTED) as recorded,
        pytest.raises(UserError, match=r"^BertModel can't be compiled as a whole \(.*; leave"),
    ):
        recorded(BATCHES[0])


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match=r"needs g\+\+, and there is no g\+\+; install it \(apt"):
        check_compiler(torch.device("cpu"))
    with pytest.raises(UserError, match="needs gcc, and there is no gcc or clang; install it"):
        check_compiler(torch.device("cuda"))
    with pytest.raises(UserError, match="there is no g"):
        CompiledCapture(student(), WANTED)


def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    small = tiny_model("bert", 1, num_hidden_layers=2, hidden_size=24, **NO_DROPOUT)
    return small, tiny_model("bert", num_hidden_layers=3).requires_grad_(False)


def test_a_distillers_losses_and_gradients() -> None:
    layer_map = {"kind": "random", "redraw": "step"}
    losses = {"attention": {}, "hidden": {"weight": 2}, "embedding": {}}
    plain, graph = (
        fastkd.Distiller(*pair(), losses, layer_map, compile=compiles) for compiles in (False, True)
    )
    with plain, graph:
        for step, batch in enumerate(BATCHES):
            for distiller in (plain, graph):
                distiller.zero_grad()
                distiller.at(step, len(BATCHES))
                distiller(batch)[0].backward()
            for (name, one), other in zip(
                plain.named_parameters(), graph.parameters(), strict=True
            ):
                torch.testing.assert_close(other.grad, one.grad, msg=name)
        # evaluated eagerly
        before = graphs()
        graph.eval()
        torch.testing.assert_close(graph(tiny_batch((5,)))[0], plain(tiny_batch((5,)))[0])
    assert graphs() == before <= 4
    assert list(graph.state_dict()) == list(plain.state_dict())


def test_models_that_are_compiled_already_are_refused() -> None:
    small, teacher = pair()
    with pytest.raises(UserError, match=r"the student is compiled, .* compile=True"):
        fastkd.Distiller(torch.compile(small), teacher, {"hidden": {}})
    teacher.encoder.layer[1].compile()
    with pytest.raises(UserError, match=r"BertModel is compiled \(encoder.layer.1\), and hooks"):
        fastkd.Distiller(small, teacher, {"hidden": {}})


@pytest.mark.slow
def test_a_run_is_the_eager_one_and_can_be_resumed(tmp_path: Path) -> None:
    # a block of each model is compiled three times over
    shallow = {"student.layers": 1, "layer_map": "first"}
    recipe = make_recipe(tmp_path, train={"steps": 3, "precision": "fp32"})
    plain, whole, cut = (tmp_path / name for name in ("plain", "whole", "cut"))
    fastkd.distill(recipe, {"run.output": plain, **shallow}, quiet=True)
    settings = {"train.compile": True, "train.checkpoint_every": 1, **shallow}
    fastkd.distill(recipe, {"run.output": whole, **settings}, quiet=True)
    assert_same_run(whole, plain, losses=1e-5, weights=1e-6)

    def stop(step: int, _record: object) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastkd.distill(recipe, {"run.output": cut, **settings}, quiet=True, on_step=stop)
    result = fastkd.distill(recipe, {"run.output": cut, **settings}, resume=True, quiet=True)
    assert_same_run(cut, whole, losses=0, weights=0)
    assert not [name for name in read_weights(cut) if "_orig_mod" in name]
    again = fastkd.evaluate(result, quiet=True)
    found = json.loads((cut / "summary.json").read_text())["after"]["losses"]
    assert again.losses == pytest.approx(found)


@pytest.mark.slow
def test_code_of_the_compiler(backend: Callable[[str], None]) -> None:
    """Machine code of a model of one block, forward and backward."""
    backend("inductor")
    model = tiny_model("bert", num_hidden_layers=1, hidden_size=8, num_attention_heads=2)
    route_attention(model, "sdpa")
    wanted = {"attention": {1}, "hidden": {1}}
    with CompiledCapture(model, wanted) as recorded:
        expected, found = eager(model, BATCHES[0], wanted), recorded(BATCHES[0])
        torch.testing.assert_close(tensors(found), tensors(expected))
        torch.testing.assert_close(
            gradients(model, found), gradients(model, expected), rtol=1e-4, atol=1e-4
        )
