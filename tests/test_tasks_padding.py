"""Padding changes no answer, whatever a model or its tokenizer calls the token that pads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_models import ARCHITECTURES, VOCABULARY, Architecture, tiny_config, tiny_tokenizer
from tiny_runs import make_recipe
from tiny_training import run_whole, summary_of, task_section, write_recipe, write_task
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fastkd.data.batching import BatchPlan
from fastkd.data.factory import make_datamodule
from fastkd.data.sampler import evaluation_parts
from fastkd.data.tasks.datamodule import TaskDataModule
from fastkd.data.tasks.padding import hand_on_padding, own_padding, padding_id
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.recipe import parse_finetune_recipe
from fastkd.training.padding import pad_alike

DECODERS = ("gpt2", "llama", "qwen2", "mistral")
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
PAD, UNKNOWN, SEP, MASK = 0, 1, 3, 4
RANKS = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def mistral(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = ARCHITECTURES["llama"].extra
    made = Architecture(MistralConfig, "intermediate_size", True, extra)
    monkeypatch.setitem(ARCHITECTURES, "mistral", made)


@dataclass(frozen=True)
class Case:
    """What a model's configuration and its tokenizer say pads, and what they are handed on with."""

    model: int | None
    tokenizer: int | None
    ends: bool
    """Whether every example ends with `[SEP]`."""
    eos: bool
    """Whether the tokenizer calls that its end."""
    pads: int
    handed_on: tuple[int | None, int | None]


CASES = {
    "no pad token in the tokenizer": Case(PAD, None, False, False, PAD, (PAD, PAD)),
    # [SEP] would be read, but the model reads the token before it
    "the model's is appended": Case(SEP, SEP, True, True, SEP, (SEP, SEP)),
    "the model's is appended, the tokenizer's is another": Case(
        SEP, 0, True, True, SEP, (SEP, SEP)
    ),
    "another in the tokenizer": Case(MASK, PAD, False, False, MASK, (MASK, MASK)),
    # w9 stands in examples: it can't become special
    "an ordinary word": Case(9, PAD, False, False, 9, (9, None)),
    "none in the model": Case(None, PAD, True, True, PAD, (PAD, PAD)),
    "none in both": Case(None, None, False, True, SEP, (SEP, SEP)),
    "none in both, and nothing is called the end": Case(None, None, True, False, PAD, (PAD, PAD)),
    "the tokenizer's is appended": Case(None, SEP, True, True, PAD, (PAD, PAD)),
    "an id that the model doesn't embed": Case(-1, SEP, True, True, PAD, (PAD, PAD)),
}


def tokenizer_of(case: Case) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    end = " [SEP]" if case.ends else ""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A" + end, special_tokens=[("[SEP]", SEP)] if end else []
    )
    for name in ("pad_token", "cls_token", "sep_token", "mask_token"):
        setattr(tokenizer, name, None)
    if case.eos:
        tokenizer.eos_token = "[SEP]"
    if case.tokenizer is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(case.tokenizer)
    return tokenizer


def classifier(name: str, pad: int | None, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    # drawn with a padding of its own, because that row of the embeddings would be zero
    config = tiny_config(name, num_hidden_layers=2)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    model.config.pad_token_id = pad
    with torch.no_grad():
        model.get_input_embeddings().weight[PAD] = 0.3
    return model.eval().requires_grad_(False)


def datamodule(
    folder: Path, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> TaskDataModule:
    tree = {"model": "x", "task": task_section(folder), "run": {"output": "x"}}
    recipe = parse_finetune_recipe(tree)
    made = make_datamodule(recipe, tokenizer, model.config, RANKS, progress=False)
    assert isinstance(made, TaskDataModule)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("padding")
    write_task(made / "task", 40)
    return made


@torch.no_grad()
def one_by_one(model: PreTrainedModel, data: TaskDataModule) -> Tensor:
    dev = data.evaluations["dev"]
    rows = [dev.tokens[a:b] for a, b in zip(dev.offsets, dev.offsets[1:], strict=False)]
    ids = [torch.from_numpy(row.astype(np.int64))[None] for row in rows]
    return torch.cat([model(input_ids=row).logits for row in ids])


@torch.no_grad()
def in_batches(model: PreTrainedModel, data: TaskDataModule, size: int) -> Tensor:
    dev = data.evaluations["dev"]
    found = torch.zeros(len(dev), 2)
    for rows, part, _ in evaluation_parts(dev.lengths, size):
        batch = dev.batch(part)
        del batch["labels"]
        found[rows] = model(**batch).logits
    return found


# GPT-2 looks for the last token with code of its own, and the others share theirs
PAIRS = [("gpt2", case) for case in CASES]
PAIRS += [(DECODERS[1 + number % 3], case) for number, case in enumerate(CASES)]


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_batches_of_any_size_say_what_the_model_says_without_padding(
    name: str, case: str, folder: Path
) -> None:
    given = CASES[case]
    model, student = classifier(name, given.model), classifier(name, given.model, 1)
    tokenizer = tokenizer_of(given)
    data = datamodule(folder, tokenizer, model)
    assert {examples.pad_id for examples in data.sets} == {given.pads}
    expected = one_by_one(model, data)
    handed_on = pad_alike(data, tokenizer, student, model)
    assert model.config.pad_token_id == student.config.pad_token_id == given.pads
    for size in (2, 7, 40):
        torch.testing.assert_close(in_batches(model, data, size), expected, atol=1e-5, rtol=1e-4)
    assert (handed_on["pad_token_id"], tokenizer.pad_token_id) == given.handed_on
    assert tokenizer.padding_side == "right"


def test_the_wrong_token_would_be_told_apart(folder: Path) -> None:
    """What was done before: the tokenizer's id, whatever the model's is."""
    given = CASES["another in the tokenizer"]
    model = classifier("gpt2", given.model)
    data = datamodule(folder, tokenizer_of(given), model)
    expected = one_by_one(model, data)
    for examples in data.sets:
        object.__setattr__(examples, "pad_id", given.tokenizer)
    assert (in_batches(model, data, 40) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_handed_on_as_they_came(name: str, folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = classifier(name, PAD)
    data = datamodule(folder, tokenizer, model)
    expected = one_by_one(model, data)
    assert pad_alike(data, tokenizer, model) == {"pad_token_id": PAD}
    torch.testing.assert_close(in_batches(model, data, 40), expected, atol=1e-5, rtol=1e-4)
    tokenizer.pad_token = "[MASK]"
    assert pad_alike(data, tokenizer, model) == {"pad_token_id": PAD}
    assert tokenizer.pad_token == "[MASK]"


@pytest.mark.parametrize(
    ("own", "pad", "expected"),
    [
        # not the model's, and no token of its own kind
        (None, 9, (None, MASK)),
        (-1, 9, (-1, MASK)),
        (None, UNKNOWN, (None, MASK)),
        (None, 70, (None, MASK)),
        (None, PAD, (PAD, PAD)),
        (UNKNOWN, UNKNOWN, (UNKNOWN, UNKNOWN)),
        # w5 is a part of w50, so its padding would cut that; w9 of no other
        (5, 5, (5, None)),
        (9, 9, (9, 9)),
    ],
)
def test_a_tokenizer_pads_as_its_model_or_not_at_all(
    own: int | None, pad: int, expected: tuple[int | None, int | None], tmp_path: Path
) -> None:
    config = tiny_config("gpt2")
    config.pad_token_id = own
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "[MASK]"
    before = tokenizer("w50 w9 [UNK] nothing")["input_ids"]
    assert hand_on_padding(config, tokenizer, pad, []) == expected[0]
    assert tokenizer.pad_token_id == expected[1]
    tokenizer.save_pretrained(tmp_path)
    stored = AutoTokenizer.from_pretrained(tmp_path)
    assert stored.pad_token_id == expected[1]
    assert stored("w50 w9 [UNK] nothing")["input_ids"] == before


def test_micro_batches_are_padded_with_the_same_id(folder: Path) -> None:
    given = CASES["another in the tokenizer"]
    data = datamodule(folder, tokenizer_of(given), classifier("gpt2", given.model))
    feed = data.micro_batches(8, 0, BatchPlan(2, 4, 1), 0)
    for part in feed.next_step(0):
        padding = part["input_ids"][part["attention_mask"] == 0]
        assert (padding == MASK).all()


def test_no_id_is_left_to_pad_with(folder: Path) -> None:
    model = classifier("gpt2", None)
    tokenizer = tokenizer_of(CASES["none in both"])
    data = datamodule(folder, tokenizer, model)
    everything = np.arange(VOCABULARY, dtype=np.uint16)
    object.__setattr__(data.train, "tokens", everything)
    with pytest.raises(UserError, match="names no pad_token_id, and examples hold each of its 64"):
        padding_id(model.config, tokenizer, data.sets)


def test_text_without_padding_is_read_by_decoders_that_know_of_none(tmp_path: Path) -> None:
    losses = {"hidden": {}, "logits": {}}
    recipe = make_recipe(tmp_path, "gpt2")
    tree = yaml.safe_load(recipe.read_text())
    tree["losses"], tree["student"]["head"] = losses, "sequence_classification"
    tree["train"]["steps"] = 2
    del tree["train"]["warmup_steps"]
    recipe.write_text(yaml.safe_dump(tree))
    torch.manual_seed(0)
    config = tiny_config("gpt2", pad_token_id=None)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "teacher")
    run_whole("distill", recipe)
    stored = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert stored.config.pad_token_id is None
    found = run_whole("evaluate", tmp_path / "run")
    assert f"{summary_of(tmp_path / 'run')['after']['total']:.4g}" in found


def test_a_student_that_is_handed_on_answers_in_batches_as_it_was_scored(tmp_path: Path) -> None:
    """The teacher's id is not the tokenizer's, which has none."""
    write_task(tmp_path / "task", 40)
    given = CASES["no pad token in the tokenizer"]
    torch.manual_seed(0)
    config = tiny_config("gpt2", pad_token_id=given.model)
    teacher = AutoModelForSequenceClassification.from_config(config)
    teacher.save_pretrained(tmp_path / "classifier")
    tokenizer_of(given).save_pretrained(tmp_path / "classifier")
    scores = []
    for size in (1, 8):
        train = {"micro_batch_size": size, "steps": 3}
        recipe = write_recipe(tmp_path, f"run-{size}", train=train)
        run_whole("distill", recipe)
        summary = summary_of(tmp_path / f"run-{size}")
        scores.append((summary["teacher"]["score"], summary["after"]["score"]))
    assert scores[0] == scores[1]
    folder = tmp_path / "run-8" / "student"
    student = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert student.config.pad_token_id == tokenizer.pad_token_id == PAD
    rows = (tmp_path / "task" / "dev.tsv").read_text().splitlines()[1:]
    texts, labels = zip(*(row.split("\t") for row in rows), strict=True)
    with torch.no_grad():
        said = student(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits
    right = said.argmax(dim=1) == torch.tensor([label == "yes" for label in labels])
    assert float(right.float().mean()) == pytest.approx(scores[1][1])
    run_whole("evaluate", tmp_path / "run-8")


@pytest.mark.parametrize(("pad", "expected"), [(-1, None), (0, 0), (4, 4), (5, None)])
def test_an_id_that_the_model_does_not_embed_pads_nothing(pad: int, expected: int | None) -> None:
    assert own_padding(LlamaConfig(vocab_size=5, pad_token_id=pad)) == expected
