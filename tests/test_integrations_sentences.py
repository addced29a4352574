"""A `SentenceTransformer` under a distilling trainer: what its modules make is what is compared."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    models,
)
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from test_integrations import classifier
from tiny_exports import save_sentences
from tiny_models import WIDTH, tiny_batch, tiny_tokenizer
from transformers import TrainerCallback

import fastkd
from fastkd.integrations.sentences import check_padded

pytestmark = pytest.mark.usefixtures("own_accelerator")

datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

ROWS = [f"w{i} w{i + 3} " * (1 + i % 4) for i in range(5, 37)]
DATA = datasets.Dataset.from_dict({"one": ROWS, "two": ROWS[::-1]})
MEAN = {"embedding_output": {"pooling": "mean"}}


def sentences(folder: Path, *modules: Any, seed: int = 0, **changes: Any) -> Any:
    pooling = models.Pooling(changes.get("hidden_size", WIDTH))
    torch.manual_seed(seed)
    found = save_sentences(folder, *(modules or [pooling]), **changes)
    return SentenceTransformer(str(found), device="cpu")


def trainer(
    folder: Path,
    student: Any,
    teacher: Any,
    losses: Any,
    beside: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    from fastkd.integrations import DistillationMixin

    class SentenceDistillation(DistillationMixin, SentenceTransformerTrainer): ...

    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": len(ROWS),
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        **changes,
    }
    return SentenceDistillation(
        model=student,
        args=SentenceTransformerTrainingArguments(str(folder), **settings),
        train_dataset=DATA,
        teacher=teacher.requires_grad_(False),
        losses=losses,
        **(beside or {}),
    )


def test_a_sentence_transformers_model_is_distilled(tmp_path: Path) -> None:
    small = sentences(tmp_path / "small", num_hidden_layers=2, hidden_size=24)
    large = sentences(tmp_path / "large")
    made = trainer(tmp_path / "run", small, large, {"attention": {}, "hidden": {}})
    before, first = small.encode("w7 w8"), made.evaluate(DATA)["eval_loss"]
    made.train()
    assert made.evaluate(DATA)["eval_loss"] < first
    made.save_model(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert (again.encode("w7 w8") == small.encode("w7 w8")).all()
    assert (again.encode("w7 w8") != before).any()


def test_the_loss_of_embeddings_is_of_what_encode_gives(tmp_path: Path) -> None:
    small = sentences(tmp_path / "small", models.Pooling(WIDTH, "cls"), num_hidden_layers=2, seed=1)
    large = sentences(tmp_path / "large", models.Pooling(WIDTH, "cls"), models.Normalize())
    losses = {"embedding_output": {"pooling": "cls"}}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*through a projection")
        made = trainer(tmp_path / "run", small, large, losses)
    vectors = [torch.tensor(model.encode(ROWS)) for model in (small, large)]
    expected = (1 - torch.nn.functional.cosine_similarity(*vectors)).mean().item()
    assert made.evaluate(DATA)["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", ["model", "teacher"])
@pytest.mark.parametrize(
    ("modules", "losses", "said"),
    [
        (
            [models.Pooling(WIDTH), models.Dense(WIDTH, WIDTH)],
            MEAN,
            r"losses\.embedding_output compares mean pooling .* but of {} Dense stands behind",
        ),
        ([models.Pooling(WIDTH, "cls")], MEAN, "of {} the Pooling is cls; use fastkd.distill"),
        ([models.Pooling(WIDTH, ("cls", "mean"))], MEAN, "of {} the Pooling is cls and mean;"),
        ([models.Pooling(WIDTH, include_prompt=False)], MEAN, "of {} its Pooling leaves prompts"),
        (
            [models.Pooling(WIDTH), models.Normalize()],
            {"embedding_output": {"pooling": "mean", "kind": "vector_mse"}},
            "of {} Normalize stands behind the Pooling",
        ),
        (
            [models.Pooling(WIDTH), torch.nn.Identity()],
            {"similarity": {"pooling": "mean"}},
            r"losses\.similarity .* of {} torch\..*Identity stands behind",
        ),
    ],
)
def test_modules_that_the_loss_would_leave_out_are_refused(
    tmp_path: Path, side: str, modules: Any, losses: Any, said: str
) -> None:
    plain, other = (sentences(tmp_path / name) for name in ("plain", "other"))
    other = SentenceTransformer(modules=[other[0], *modules], device="cpu")
    pair = (other, plain) if side == "model" else (plain, other)
    with pytest.raises(fastkd.UserError, match=said.format(side)):
        trainer(tmp_path / "run", *pair, losses)
    # what looks at no embeddings looks at no modules
    trainer(tmp_path / "run", *pair, {"hidden": {}})


def test_embeddings_behind_a_projection_are_told_of(tmp_path: Path) -> None:
    small = sentences(tmp_path / "small", num_hidden_layers=2, hidden_size=24)
    large = sentences(tmp_path / "large")
    with pytest.warns(UserWarning, match="through a projection, which `encode` leaves out"):
        trainer(tmp_path / "run", small, large, MEAN)


def test_rerankers_are_refused(tmp_path: Path) -> None:
    from fastkd.integrations import DistillationMixin

    class RerankerDistillation(DistillationMixin, CrossEncoderTrainer): ...

    pair = []
    for seed, layers in enumerate((4, 2)):
        folder = str(tmp_path / str(seed))
        classifier(seed, num_labels=1, num_hidden_layers=layers).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        pair.append(CrossEncoder(folder, device="cpu"))
    with pytest.raises(fastkd.UserError, match=r"model is a CrossEncoder.*Distiller\(student\.mo"):
        RerankerDistillation(
            model=pair[1],
            args=CrossEncoderTrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
            train_dataset=DATA,
            teacher=pair[0].requires_grad_(False),
            losses={"logits": {"kind": "mse"}},
        )


def test_texts_in_one_row_are_refused() -> None:
    padded, flat = (
        dict(tiny_batch()),
        {"input_ids": torch.ones(1, 9), "cu_seq_lens_q": torch.ones(3)},
    )
    check_padded([padded])
    with pytest.raises(fastkd.UserError, match=r"set model\[0\]\.unpad_inputs = False"):
        check_padded([padded, flat])


def pair(tmp_path: Path) -> tuple[Any, Any]:
    small = sentences(tmp_path / "small", num_hidden_layers=2, hidden_size=24)
    return small, sentences(tmp_path / "large")


def test_learning_rates_by_names_are_the_librarys(tmp_path: Path) -> None:
    mapping = {r"embeddings\.": 1e-6, r"layer\.1\..*bias": 1e-2}
    small, large = pair(tmp_path)
    losses = {"attention": {}, "hidden": {}, "projection_learning_rate": 0.5}
    made = trainer(
        tmp_path / "run", small, large, losses, learning_rate_mapping=mapping, weight_decay=0.1
    )
    found = made.create_optimizer().param_groups
    given = {
        id(p): (group["lr"], group["weight_decay"]) for group in found for p in group["params"]
    }
    for name, parameter in small.named_parameters():
        rate = 1e-6 if "embeddings." in name else 1e-3
        rate = 1e-2 if "layer.1." in name and "bias" in name else rate
        decays = "bias" not in name and "LayerNorm" not in name
        assert given[id(parameter)] == (rate, 0.1 if decays else 0.0), name
    own = made.distiller.objective.parameters()
    assert {given[id(parameter)][0] for parameter in own} == {0.5}
    assert len(given) == len([*made.distiller.parameters()])


def test_learning_rates_of_no_name_are_refused(tmp_path: Path) -> None:
    mapping = {"nothing": 1e-6}
    made = trainer(tmp_path / "run", *pair(tmp_path), {"hidden": {}}, learning_rate_mapping=mapping)
    with pytest.raises(fastkd.UserError, match="has 'nothing', which is in no name of a param"):
        made.create_optimizer()


def test_the_card_says_what_was_learned(tmp_path: Path) -> None:
    losses = {"attention": {}, "hidden": {"weight": 7}}
    made = trainer(tmp_path / "run", *pair(tmp_path), losses, max_steps=1)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "- loss:DistillationLoss\n" in card and "CoSENT" not in card
    assert "fastkd.integrations.sentences.DistillationLoss" in card
    assert '"weight": 7' in card and '"layer_map": "uniform"' in card
    assert "@software{fastkd," in card
    with pytest.raises(fastkd.UserError, match="made by its compute_loss"):
        made.loss([], None)


def test_a_loss_of_the_library_is_refused(tmp_path: Path) -> None:
    small, large = pair(tmp_path)
    with pytest.raises(fastkd.UserError, match="loss is given, which would never be called"):
        trainer(tmp_path, small, large, {"hidden": {}}, {"loss": CoSENTLoss(small)})


@pytest.mark.parametrize("damaged", [False, True])
def test_the_best_student_is_read_or_refused(tmp_path: Path, damaged: bool) -> None:
    class Best(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
            if state.global_step == 2:
                kept.update(copy.deepcopy(made.model.state_dict()))
                file = tmp_path / "run" / "checkpoint-1" / "model.safetensors"
                if damaged:
                    file.write_bytes(file.read_bytes()[:100])

    kept: dict[str, Any] = {}
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2}
    # a loss that rises: the first step is the best
    best = {"load_best_model_at_end": True, "learning_rate": 10.0, "warmup_steps": 0}
    made = trainer(
        tmp_path / "run",
        *pair(tmp_path),
        {"hidden": {}},
        {"eval_dataset": DATA, "callbacks": [Best()]},
        **settings,
        **best,
    )
    if damaged:
        with pytest.raises(fastkd.UserError, match=r"student of .*checkpoint-1 can't be read"):
            made.train()
        return
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-1")
    first = SentenceTransformer(str(tmp_path / "run" / "checkpoint-1"), device="cpu").state_dict()
    assert all(torch.equal(first[name], value) for name, value in made.model.state_dict().items())
    assert any(not torch.equal(first[name], value) for name, value in kept.items())
