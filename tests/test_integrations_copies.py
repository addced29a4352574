"""What is made of a student during and after a `DistillationTrainer`: students by themselves."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_integrations import classifier, collate, copies, examples, losses_of, student, trainer
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.integrations.beside import Beside, attached

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """Leave no precision to the next test: accelerate keeps its first for all."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    batch = collate(examples(8, labels=False))
    found: Tensor = model.eval()(**batch).logits.clone()
    return found


def emptied(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return model


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: PreTrainedModel = torch.load(file, weights_only=False)
    return found


def during(folder: Path, made_of: Callable[[Any], Any], **changes: Any) -> tuple[Any, Any]:
    """A trained trainer, and what a callback made of the model before the first step."""
    from transformers import TrainerCallback

    class Making(TrainerCallback):  # type: ignore[misc]
        found: Any = None

        def on_train_begin(self, *_given: Any, model: Any = None, **_others: Any) -> None:
            self.found = made_of(model)

    making = Making()
    made = trainer(folder, student(), beside={"callbacks": [making]}, **changes)
    made.train()
    return made, making.found


# accelerate lets no model be pickled that it wrapped for mixed precision
@pytest.mark.parametrize(
    ("make", "bf16"), [(copy.deepcopy, False), (copy.deepcopy, True), (pickled, False)]
)
def test_a_copy_from_a_callback_keeps_its_weights(
    tmp_path: Path, make: Callable[[Any], Any], bf16: bool
) -> None:
    expected = logits(student())
    made, found = during(tmp_path, make, max_steps=2, learning_rate=1e-2, bf16=bf16)
    torch.testing.assert_close(logits(found), expected, rtol=0, atol=1e-2 if bf16 else 0)
    assert not torch.allclose(logits(made.model), expected, rtol=0, atol=2e-2)
    assert not logits(emptied(found)).any()
    assert found.num_parameters() == made.model.num_parameters()


def test_what_a_callback_saves_is_the_student_alone(tmp_path: Path) -> None:
    def saved(model: Any) -> dict[str, Tensor]:
        model.save_pretrained(tmp_path / "saved")
        # a moving average puts its weights in and takes them out
        model.load_state_dict(model.state_dict())
        return load_file(tmp_path / "saved" / "model.safetensors")

    _, found = during(tmp_path, saved, max_steps=1)
    assert found.keys() == student().state_dict().keys()


def test_states_of_accelerate_hold_the_projections(tmp_path: Path) -> None:
    made = trainer(tmp_path, student(), max_steps=1)
    made.train()
    made.accelerator.save_state(str(tmp_path / "state"))
    own = list(made.distiller.objective.parameters())
    before = copies(own)
    for parameter in own:
        torch.nn.init.zeros_(parameter)
    made.accelerator.load_state(str(tmp_path / "state"))
    assert own and all(torch.equal(a, b) for a, b in zip(before, own, strict=True))


def test_after_mixed_precision_a_student_stands_alone(tmp_path: Path) -> None:
    teacher = classifier(0).requires_grad_(False)
    alive = weakref.ref(teacher)
    made = trainer(tmp_path, student(), beside={"teacher": teacher}, max_steps=2, bf16=True)
    made.train()
    model = made.model
    assert not logits(emptied(copy.deepcopy(model))).any()
    plain = student()
    plain.load_state_dict(model.state_dict())
    model = made.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert torch.equal(logits(model), logits(plain))
    torch.testing.assert_close(logits(pickled(model)), logits(plain), rtol=0, atol=0)
    del made, teacher
    gc.collect()
    assert alive() is None


def test_a_student_goes_on_in_mixed_precision(tmp_path: Path) -> None:
    first = trainer(tmp_path / "first", student(), max_steps=2, bf16=True)
    first.train()
    # the same trainer again, and others of its student and of a copy
    for number, model in enumerate((first.model, copy.deepcopy(first.model))):
        made = trainer(tmp_path / str(number), model, max_steps=2, bf16=True)
        before = copies(model.parameters())
        made.train()
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert losses_of(made)[-1] < losses_of(first)[0]
    first.args.max_steps = 4
    first.train()
    assert losses_of(first)[-1] < losses_of(first)[0]
    assert first.model.forward.__func__ is not first.model.__class__.forward


def test_a_forward_that_hides_another_one() -> None:
    """As of a library that puts its own around what mixed precision left."""
    model, given = torch.nn.Linear(2, 2), torch.ones(1, 2)
    expected, beside = model(given), Beside(torch.nn.Linear(1, 1))
    for _ in range(3):
        with attached(model, model, beside):
            inner = model.forward
            model.forward = lambda *found, inner=inner: inner(*found)
            assert torch.equal(model(given), expected)
            beside.asked = lambda: torch.zeros(())
            assert model(given).ndim == 0 and torch.equal(model(given), expected)
        assert torch.equal(model(given), expected) and not list(model.children())


def test_a_student_of_another_trainers_mixed_precision(tmp_path: Path) -> None:
    from transformers import Trainer

    made = trainer(tmp_path, student(), max_steps=1, bf16=True)
    plain = Trainer(
        model=made.model, args=made.args, train_dataset=examples(8), data_collator=collate
    )
    plain.train()
    seen: list[bool] = []
    teacher = made.distiller.teacher
    teacher.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    made.train()
    assert seen and all(seen)
