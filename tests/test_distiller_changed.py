"""A `Distiller` whose models are copied, exchanged or changed after it was made, or that is not
told where the run is."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_models import tiny_batch, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import fastkd
from fastkd.capture import compiled
from fastkd.errors import UserError

SMALL = {"num_hidden_layers": 2, "hidden_size": 24}
RAMP = {"kind": "linear", "first": 0.0, "last": 1.0}


def models(seed: int = 1) -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_model("bert", seed, **SMALL), tiny_model("bert", 0).requires_grad_(False)


def decoders() -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=2))
    student = AutoModelForCausalLM.from_config(tiny_config("llama", **SMALL)).eval()
    return student, teacher.eval().requires_grad_(False)


class Doubled(nn.Linear):
    """A last layer that does more than its weight says."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Packed(Tensor):
    """A weight in another form, as of a library that quantises."""


def test_a_copy_that_is_made_within_has_a_last_layer_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    student, teacher = decoders()
    batch = tiny_batch()
    distiller = fastkd.Distiller(student, teacher, {"logits": {}}, compile=True)
    with distiller, torch.no_grad():
        distiller(batch)
        kept = copy.deepcopy(student)
        expected = student(**batch).logits
        for parameter in student.parameters():
            parameter.mul_(1.3)
        assert torch.equal(kept(**batch).logits, expected)
    assert torch.equal(kept(**batch).logits, expected)
    assert not torch.allclose(student(**batch).logits, expected)


@pytest.fixture
def many_switches() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("many_switches")
@pytest.mark.parametrize("losses", [{"logits": {}}, {"hidden": {}}], ids=["logits", "hidden"])
def test_two_threads_may_distil_from_one_teacher(losses: dict[str, Any]) -> None:
    student, teacher = decoders()
    layers = {"layer_map": "first"} if "hidden" in losses else {}

    def step(own: fastkd.Distiller, batch: dict[str, Tensor]) -> float:
        with own, torch.no_grad():
            return float(own(batch)[0])

    owns = [fastkd.Distiller(copy.deepcopy(student), teacher, losses, **layers) for _ in range(2)]
    batches = [tiny_batch(seed=seed) for seed in (1, 2)]
    expected = list(map(step, owns, batches))
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(step, owns * 20, batches * 20))
    assert found == expected * 20
    assert teacher.config.num_hidden_layers == len(teacher.model.layers)


def test_a_copy_that_is_made_within_is_nobodys() -> None:
    student, teacher = models()
    distiller = fastkd.Distiller(student, teacher, {"attention": {}})
    with distiller:
        kept = copy.deepcopy(student), pickle.loads(pickle.dumps(student))
        for make in (copy.deepcopy, pickle.dumps):
            with pytest.raises(UserError, match="the distiller is listening, so it can't be copi"):
                make(distiller)
        # the student itself is still heard
        distiller(tiny_batch())
    assert [model.config._attn_implementation for model in kept] == ["sdpa", "sdpa"]
    copy.deepcopy(distiller)


def test_a_block_that_is_exchanged_within_is_the_one_that_runs() -> None:
    student, teacher = models()
    distiller = fastkd.Distiller(student, teacher, {"hidden": {}}, layer_map="first")
    with distiller:
        before = float(distiller(tiny_batch())[0].detach())
        block = copy.deepcopy(teacher.encoder.layer[0]).train()
        for parameter in block.parameters():
            parameter.mul_(2)
        teacher.encoder.layer[0] = block
        found = float(distiller(tiny_batch())[0].detach())
    with distiller:
        expected = float(distiller(tiny_batch())[0].detach())
    assert found == expected != before
    assert teacher.encoder.layer[0] is block and len(teacher.encoder.layer) == 4


def test_another_student_is_refused() -> None:
    distiller = fastkd.Distiller(*models(), {"hidden": {}})
    distiller.student = models(7)[0]
    with distiller, pytest.raises(UserError, match=r"distiller\.student is not the model"):
        distiller(tiny_batch())


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_a_last_layer_that_is_exchanged_is_refused(side: int) -> None:
    pair = decoders()
    distiller = fastkd.Distiller(*pair, {"logits": {}})
    with distiller:
        distiller(tiny_batch())
        held = pair[side].lm_head
        layer = Doubled(held.in_features, held.out_features, bias=False)
        pair[side].lm_head = layer.requires_grad_(side == 0)
        with pytest.raises(UserError, match="the last layer of LlamaForCausalLM was changed"):
            distiller(tiny_batch())
        # a layer of the same kind is read as it is
        pair[side].lm_head = copy.deepcopy(held)
        distiller(tiny_batch())


@pytest.mark.parametrize("field", ["disable_adapters", "merged", "active_adapters"])
def test_adapters_that_are_switched_are_refused(field: str) -> None:
    student, teacher = decoders()
    # what PEFT's layers say of themselves
    states: dict[str, Any] = {"disable_adapters": True, "merged": False, "active_adapters": ["a"]}
    teacher.lm_head.__dict__.update(states)
    with fastkd.Distiller(student, teacher, {"logits": {}}) as distiller:
        distiller(tiny_batch())
        other = {"disable_adapters": False, "merged": True, "active_adapters": ["b"]}
        teacher.lm_head.__dict__[field] = other[field]
        with pytest.raises(UserError, match="adapters"):
            distiller(tiny_batch())


def test_a_weight_in_another_form_is_refused() -> None:
    student, teacher = decoders()
    packed = teacher.lm_head.weight.detach().as_subclass(Packed)
    teacher.lm_head.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(UserError, match="the weight of its last layer is a Packed"):
        fastkd.Distiller(student, teacher, {"logits": {}})


@pytest.mark.parametrize(
    ("losses", "layers", "said"),
    [
        ({"hidden": {"schedule": RAMP}}, "uniform", r"losses\.hidden\.schedule changes over"),
        (
            {"attention": {"kind": "kl", "temperature_schedule": {**RAMP, "first": 0.5}}},
            "uniform",
            r"losses\.attention\.temperature_schedule changes over",
        ),
        ({"hidden": {}}, "random", "layer_map random changes over"),
        ({"hidden": {}}, {"kind": "random", "redraw": "step"}, "layer_map random changes over"),
    ],
)
def test_a_run_that_is_not_told_where_it_is_is_refused(
    losses: dict[str, Any], layers: Any, said: str
) -> None:
    distiller = fastkd.Distiller(*models(), losses, layers)
    with distiller:
        with pytest.raises(UserError, match=said):
            distiller(tiny_batch())
        with torch.no_grad():
            distiller(tiny_batch())
        distiller.at(1, 2, epoch=0)
        distiller(tiny_batch())[0].backward()


def test_a_mapping_that_follows_epochs_is_told_them() -> None:
    distiller = fastkd.Distiller(*models(), {"hidden": {}}, "random")
    with pytest.raises(UserError, match="at was told of none"):
        distiller.at(0, 10)
    found = set()
    for epoch in range(6):
        distiller.at(epoch, 10, epoch)
        found.add(distiller.objective.linked)
    assert len(found) > 1
    by_step = {"kind": "random", "redraw": "step"}
    fastkd.Distiller(*models(), {"hidden": {}}, by_step).at(0, 10)


def test_a_pass_of_inference_mode_leaves_nothing_to_a_step_that_trains() -> None:
    distiller = fastkd.Distiller(*models(), {"hidden": {}})
    batch = {"input_ids": tiny_batch()["input_ids"]}
    with distiller:
        with torch.inference_mode():
            judged, _ = distiller(batch)
        loss, _ = distiller(batch)
        loss.backward()
    assert loss.item() == judged.item()


def test_two_distillers_leave_one_teacher_in_any_order() -> None:
    student, teacher = models()
    teacher.train()
    first = fastkd.Distiller(student, teacher, {"attention": {}})
    second = fastkd.Distiller(models(2)[0], teacher, {"attention": {}})
    running = teacher.config._attn_implementation
    with second:
        expected = second(tiny_batch())[0].item()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert second(tiny_batch())[0].item() == expected and not teacher.training
    second.__exit__(None, None, None)
    assert teacher.config._attn_implementation == running
    assert all(module.training for module in teacher.modules())


def test_a_frozen_student_in_eval_mode_is_judged() -> None:
    student, teacher = models()
    distiller = fastkd.Distiller(student.requires_grad_(False), teacher, {"attention": {}}).eval()
    with distiller:
        loss, _ = distiller(tiny_batch())
    assert not loss.requires_grad
