"""What a model or a data set calls a class decides which class it is, not where it stands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_models import NAMES, save_teacher, tiny_batch, tiny_config, tiny_tokenizer
from tiny_tasks import PAIRS
from tiny_training import (
    fastkd,
    run_whole,
    save_classifier,
    summary_of,
    task_section,
    write_recipe,
    write_task,
)
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fastkd.data.factory import make_datamodule
from fastkd.data.tasks import (
    GLUE,
    Task,
    is_generic,
    order_of,
    read_examples,
)
from fastkd.data.tasks.metrics import constant_scores, task_score
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.models.classifier import (
    fit_classifier,
    load_tuned,
    name_outputs,
)
from fastkd.recipe import parse_finetune_recipe
from fastkd.types import ModelSource

MNLI, SST2, QNLI = GLUE["MNLI"], GLUE["SST-2"], GLUE["QNLI"]
SWAPPED = {"id2label": {0: "POSITIVE", 1: "NEGATIVE"}}


def own(*labels: str, meanings: tuple[str, ...] = ()) -> Task:
    return replace(PAIRS, labels=labels, meanings=tuple((word,) for word in meanings))


ORDERS: list[tuple[Task, list[str], tuple[int, ...] | None]] = [
    (MNLI, ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], (2, 1, 0)),
    (MNLI, ["contradiction", "entailment", "neutral"], (1, 2, 0)),
    (MNLI, ["Entailment", "Neutral", "Contradiction"], (0, 1, 2)),
    (MNLI, ["entailment", "neutral", "other"], None),
    (MNLI, ["entailment", "neutral"], None),
    (MNLI, ["entailment", "Entailment", "neutral"], None),
    (QNLI, ["NOT ENTAILMENT", "entailment"], (1, 0)),
    (QNLI, ["not-entailment", "Entailment"], (1, 0)),
    (SST2, ["POSITIVE", "NEGATIVE"], (1, 0)),
    (SST2, ["neg", "pos"], (0, 1)),
    (SST2, ["1", "0"], (1, 0)),
    (SST2, ["bad", "good"], None),
    (SST2, ["negative", "neg"], None),
    (GLUE["CoLA"], ["acceptable", "unacceptable"], (1, 0)),
    (GLUE["MRPC"], ["equivalent", "not_equivalent"], (1, 0)),
    (GLUE["QQP"], ["Not Duplicate", "Duplicate"], (0, 1)),
    (GLUE["WNLI"], ["ENTAILMENT", "NOT_ENTAILMENT"], (1, 0)),
    (own("negative", "positive"), ["POSITIVE", "NEGATIVE"], (1, 0)),
    (own("0", "1", meanings=("bad", "good")), ["Good", "Bad"], (1, 0)),
    (own("0", "1"), ["Good", "Bad"], None),
    # alike without case or sign, but not the same
    (own("a", "A"), ["A", "a"], (1, 0)),
    (own("a", "A"), ["a", "b"], None),
    (own("-1", "1"), ["1", "-1"], (1, 0)),
    (own("-1", "0"), ["0", "1"], None),
    (own("1-2", "3"), ["12", "3"], None),
]


@pytest.mark.parametrize(
    ("task", "names", "order"),
    ORDERS,
    ids=lambda value: value.name if isinstance(value, Task) else str(value),
)
def test_where_each_class_stands(
    task: Task, names: list[str], order: tuple[int, ...] | None
) -> None:
    assert order_of(names, task) == order


def test_names_that_are_but_numbers() -> None:
    for names in (["LABEL_0", "LABEL_1"], ["0", "1"], ["label 0", "Label-1"]):
        assert is_generic(names)
    for names in (["LABEL_1", "LABEL_0"], ["1", "2"], ["LABEL_0", "yes"]):
        assert not is_generic(names)


def classifier(name: str = "bert", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(name, **changes)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_take_the_order_of_the_task(name: str) -> None:
    names = {0: "CONTRADICTION", 1: "ENTAILMENT", 2: "NEUTRAL"}
    model = classifier(name, id2label=names)
    inputs = tiny_batch()
    before = model(**inputs).logits
    fit_classifier(model, MNLI, "teacher")
    assert torch.equal(model(**inputs).logits, before[:, [1, 2, 0]])
    assert model.config.id2label == {0: "ENTAILMENT", 1: "NEUTRAL", 2: "CONTRADICTION"}
    assert model.config.label2id == {"ENTAILMENT": 0, "NEUTRAL": 1, "CONTRADICTION": 2}
    # and stay there
    fit_classifier(model, MNLI, "teacher")
    name_outputs(model.config, MNLI)
    assert torch.equal(model(**inputs).logits, before[:, [1, 2, 0]])
    assert model.config.id2label[2] == "CONTRADICTION"


@pytest.mark.parametrize(
    ("task", "names", "expected"),
    [
        (SST2, ["LABEL_0", "LABEL_1"], ["0", "1"]),
        (SST2, ["0", "1"], ["0", "1"]),
        (SST2, ["NEGATIVE", "POSITIVE"], ["NEGATIVE", "POSITIVE"]),
        (SST2, ["bad", "good"], ["0", "1"]),
        (PAIRS, ["0", "1"], ["no", "yes"]),
        (PAIRS, ["No", "Yes"], ["No", "Yes"]),
    ],
)
def test_generic_names_alone_are_overwritten(
    task: Task, names: list[str], expected: list[str]
) -> None:
    config = tiny_config("bert", id2label=dict(enumerate(names)))
    name_outputs(config, task)
    assert list(config.id2label.values()) == expected
    assert config.label2id == {label: number for number, label in enumerate(expected)}


@pytest.mark.parametrize(
    ("task", "changes", "expected"),
    [
        (
            SST2,
            {"id2label": {0: "bad", 1: "good"}},
            r"gives bad, good, but task SST-2 counts 0 \(n",
        ),
        (own("0", "1"), {"id2label": {0: "b", 1: "g"}}, "by the names in .* by task.meanings"),
        (PAIRS, {"id2label": {0: "LABEL_1", 1: "LABEL_0"}}, "gives LABEL_1, LABEL_0"),
        (PAIRS, {"problem_type": "multi_label_classification"}, "problem_type is multi_label_cla"),
        (PAIRS, {"id2label": {0: "yes", 1: "no"}, "hidden_size": 2}, "2 layers that could be its"),
    ],
    ids=str,
)
def test_outputs_that_say_something_else(
    task: Task, changes: dict[str, Any], expected: str
) -> None:
    # RoBERTa's head has a layer as wide as the model before its last
    heads = {"num_attention_heads": 1} if "hidden_size" in changes else {}
    model = classifier("roberta", **changes, **heads)
    with pytest.raises(UserError, match=expected):
        fit_classifier(model, task, "teacher")


def test_a_head_to_tune_on_keeps_its_meaning(tmp_path: Path) -> None:
    save_classifier(tmp_path / "swapped", id2label={0: "YES", 1: "NO"})
    tuned = load_tuned(ModelSource(str(tmp_path / "swapped")), PAIRS)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "swapped").eval()
    with torch.no_grad():
        mine, theirs = (model(**tiny_batch()).logits for model in (tuned.model.eval(), plain))
    assert not tuned.new_head
    torch.testing.assert_close(mine, theirs[:, [1, 0]])
    assert tuned.model.config.id2label == {0: "NO", 1: "YES"}


def table(folder: Path, names: list[str], labels: list[int]) -> Path:
    features = datasets.Features(
        {**dict.fromkeys("ab", datasets.Value("string")), "y": datasets.ClassLabel(names=names)}
    )
    rows = {"a": ["x"] * len(labels), "b": ["z"] * len(labels), "y": labels}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize(
    ("task", "names", "expected"),
    [
        (PAIRS, ["YES", "NO"], [1, 0]),
        (PAIRS, ["0", "1"], [0, 1]),
        (PAIRS, ["LABEL_0", "LABEL_1"], [0, 1]),
        (PAIRS, ["good", "bad"], None),
        (PAIRS, ["1", "0"], None),
        (own("not_x", "x"), ["X", "Not X"], [1, 0]),
        # the numbers that are stored
        (own("0", "1"), ["good", "bad"], [0, 1]),
        (own("1", "0"), ["good", "bad"], [1, 0]),
        (own("0", "1", meanings=("bad", "good")), ["Good", "Bad"], [1, 0]),
        (own("0", "1", meanings=("bad", "good")), ["fine", "poor"], None),
        (replace(SST2, columns=PAIRS.columns), ["positive", "negative"], [1, 0]),
        (replace(SST2, columns=PAIRS.columns), ["good", "bad"], None),
    ],
    ids=lambda value: value.name if isinstance(value, Task) else str(value),
)
def test_classes_of_a_table(
    task: Task, names: list[str], expected: list[int] | None, tmp_path: Path
) -> None:
    folder = table(tmp_path / "saved", names, [0, 1])
    if expected is None:
        with pytest.raises(UserError, match=f"has the classes {', '.join(names)}, expected "):
            read_examples(task, folder, "train", tmp_path)
    else:
        assert read_examples(task, folder, "train", tmp_path).labels.tolist() == expected


def test_examples_that_tell_nothing_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header, *rows = (write_task(tmp_path / "task") / "dev.tsv").read_text().splitlines()
    for name, kept in (("yes", [r for r in rows if r.endswith("yes")]), ("one", rows[:1])):
        (tmp_path / "task" / f"{name}.tsv").write_text("\n".join([header, *kept]) + "\n")
    (tmp_path / "task" / "copy.tsv").write_text((tmp_path / "task" / "yes.tsv").read_text())
    section = {**task_section(tmp_path), "train": "yes", "evaluate": ["dev", "one", "copy", "yes"]}
    recipe = parse_finetune_recipe({"model": "x", "task": section, "run": {"output": "x"}})
    ranks = Ranks(0, 1, torch.device("cpu"))
    make_datamodule(recipe, tiny_tokenizer(), tiny_config("bert"), ranks, progress=False)
    said = [record.getMessage() for record in caplog.records]
    little = "one label for all {} examples, so its scores say little"
    assert sorted(said) == sorted(
        [
            "tiny yes has no example of no",
            "tiny copy holds the same examples as tiny yes",
            *(f"tiny {n}: {little.format(k)}" for n, k in (("one", 1), ("copy", 20), ("yes", 20))),
        ]
    )


def test_meanings_must_fit_the_labels() -> None:
    with pytest.raises(UserError, match="1 meanings given for 2 labels, expected one for each"):
        own("0", "1", meanings=("bad",))


@pytest.mark.parametrize(
    ("metrics", "labels", "expected"),
    [
        (("accuracy",), {"dev": [0, 0, 1]}, 2 / 3),
        # one answer to both sets
        (("accuracy",), {"a": [0, 0, 1], "b": [1, 1, 1]}, 2 / 3),
        (("f1", "accuracy"), {"dev": [1, 1, 0]}, (0.8 + 2 / 3) / 2),
        (("f1", "accuracy"), {"dev": [0] * 9 + [1]}, 0.45),
        (("matthews",), {"dev": [1, 1, 0]}, 0.0),
    ],
)
def test_what_knowing_nothing_is_worth(
    metrics: Any, labels: dict[str, list[int]], expected: float
) -> None:
    assert task_score(constant_scores(metrics, labels, 2)) == pytest.approx(expected)
    numbers = constant_scores(("pearson", "spearman"), {"dev": np.arange(4.0)}, 1)
    assert numbers == {"dev": {"pearson": 0, "spearman": 0}}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned teacher and its task."""
    folder = tmp_path_factory.mktemp("taught")
    write_task(folder / "task")
    save_classifier(folder / "classifier")
    train = {"steps": 60, "learning_rate": 3e-3}
    recipe = write_recipe(folder, "tuned", model=str(folder / "classifier"), train=train)
    run_whole("finetune", recipe)
    return folder


def renamed(folder: Path, target: str, names: dict[int, str], *, swap: bool) -> str:
    """The teacher under other names; with its outputs swapped for good."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "tuned" / "student")
    if swap:
        with torch.no_grad():
            for weight in model.classifier.parameters():
                weight.copy_(weight.flip(0).clone())
    model.config.id2label = names
    model.config.label2id = {name: number for number, name in names.items()}
    save_teacher(folder / target)
    model.save_pretrained(folder / target)
    return str(folder / target)


def test_a_teacher_of_another_order_teaches_the_task(taught: Path) -> None:
    teacher = {"model": renamed(taught, "swapped", {0: "YES", 1: "No"}, swap=True)}
    train = {"steps": 40, "learning_rate": 5e-3}
    losses = {"logits": {"kind": "cross_entropy"}}
    recipe = write_recipe(taught, "student", teacher=teacher, train=train, losses=losses)
    said = run_whole("distill", recipe)
    summary = summary_of(taught / "student")
    # without labels the student knows the classes from its teacher alone
    assert summary["teacher"]["score"] == summary_of(taught / "tuned")["after"]["score"] > 0.9
    assert summary["after"]["score"] > 0.9
    assert "warning" not in said
    student = AutoModelForSequenceClassification.from_pretrained(taught / "student" / "student")
    assert student.config.id2label == {0: "No", 1: "YES"}
    assert f"{summary['after']['score']:.4f}" in run_whole("evaluate", taught / "student")


def test_a_teacher_that_answers_the_opposite_is_said(taught: Path) -> None:
    teacher = {"model": renamed(taught, "opposite", {0: "LABEL_0", 1: "LABEL_1"}, swap=True)}
    recipe = write_recipe(taught, "misled", teacher=teacher, train={"steps": 1})
    said = " ".join(run_whole("distill", recipe).split())
    score = summary_of(taught / "misled")["teacher"]["score"]
    assert score < 0.1
    assert f"the teacher scores {score:.4f}, and one answer to everything 0.5000; see" in said


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            "teacher.model classifier: its head gives POSITIVE, NEGATIVE, but task tiny counts no",
        ),
        (
            {"teacher": {"model": "plain"}, "student": {"layers": 4, "init": "yes_no"}},
            "student.init yes_no: its head gives yes, no, but task tiny counts no, yes",
        ),
        ({"task": {"meanings": ["negative"]}}, "1 meanings given for 2 labels"),
    ],
    ids=["names", "start", "meanings"],
)
def test_refused_before_anything_is_written(
    changes: dict[str, Any],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_task(tmp_path / "task")
    save_classifier(tmp_path / "classifier", **SWAPPED)
    save_classifier(tmp_path / "plain")
    save_classifier(tmp_path / "yes_no", id2label={0: "yes", 1: "no"})
    monkeypatch.chdir(tmp_path)
    teacher = {"teacher": {"model": "classifier"}}
    recipe = write_recipe(tmp_path, "run", **{**teacher, **changes})
    capfd.readouterr()
    assert fastkd("distill", str(recipe), monkeypatch=monkeypatch) == 2
    assert expected in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()
