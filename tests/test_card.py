"""The model card of a student: what it says, and what it must not."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_cards import tiny_summary
from tiny_exports import exported, save_sentences
from tiny_models import save_teacher
from tiny_training import save_classifier

from fastkd.data.text import readers
from fastkd.head_spec import HEADS
from fastkd.recipe import parse_any_recipe
from fastkd.reporting.html import fenced
from fastkd.training.card import write_card
from fastkd.training.card.licence import Licence, licence_of
from fastkd.training.card.names import PublicText, public_name, public_tree
from fastkd.training.run_folder import RunFolder
from fastkd.types import ModelSource

HOSTILE = "<script>alert(1)</script>|[x](javascript:1)```\n---\nlicense: mit"
TREE: dict[str, Any] = {
    "teacher": {"model": "org/large"},
    "student": {"layers": 2},
    "losses": {"hidden": {}},
    "data": {"train": ["org/text:part", "python-docs"]},
    "run": {"output": "runs/small"},
}
TASK: dict[str, Any] = {
    "model": "org/large",
    "task": {
        **{"name": "tiny", "source": "org/examples", "labels": ["no", "yes"]},
        "columns": {"texts": ["a", "b"], "label": "y"},
    },
    "run": {"output": "runs/tuned"},
}
SCORED = {
    **{"losses": {"labels": 0.5}, "total": 0.5, "score": 0.75, "examples": 4},
    "scores": {"dev": {"accuracy": 0.75}},
}


def card(folder: Path, tree: dict[str, Any], summary: dict[str, Any] | None = None) -> ModelCard:
    """The card of a run's folder, which holds a configuration and no weights if it is new."""
    run = RunFolder(folder)
    if not run.student.is_dir():
        run.student.mkdir(parents=True)
        (run.student / "config.json").write_text("{}")
    digests = {"teacher.model": {"model.safetensors": "0" * 64, "config.json": "1"}}
    write_card(run, parse_any_recipe(tree), summary or tiny_summary(), digests)
    return ModelCard.load(run.student / "README.md")


def test_it_says_what_the_hub_reads(tmp_path: Path) -> None:
    found = card(tmp_path / "small", TREE)
    assert found.data.to_dict() == {
        "base_model": ["org/large"],
        "datasets": ["org/text"],
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["fastkd", "knowledge-distillation"],
    }
    assert "\n# small\n" in found.content
    assert "distilled from org/large by fastkd " in found.text
    assert "licence unknown" in found.text and "0" * 64 in found.text
    assert "| parameters | 2,000 | 1,000 |" in found.text
    assert "| forward of 1 x 8 tokens | - | 1.5 ms |" in found.text
    assert "What is not as in its teacher" not in found.text


def test_every_teacher_is_named(tmp_path: Path) -> None:
    teacher = {"model": "org/large", "others": [{"model": "org/other"}]}
    losses = {"embedding_output": {}}
    found = card(tmp_path / "small", {**TREE, "teacher": teacher, "losses": losses})
    assert found.data.base_model == ["org/large", "org/other"]
    assert "- teacher.others.1: org/other; licence unknown\n" in found.text


def test_the_recipe_in_it_is_the_one_in_force(tmp_path: Path) -> None:
    text = card(tmp_path / "small", TREE).text
    (block,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    recipe = parse_any_recipe(TREE)
    assert parse_any_recipe(yaml.safe_load(block)).losses == recipe.losses
    assert yaml.safe_load(block)["data"]["block_size"] == 128
    assert yaml.safe_load(block)["run"]["output"] == "runs/small"


def test_scores_of_a_task_stand_where_the_hub_looks(tmp_path: Path) -> None:
    summary = tiny_summary(after=SCORED, before=SCORED, parameters={"student": 1})
    found = card(tmp_path / "tuned", TASK, summary)
    (result,) = found.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        *("tiny", "accuracy"),
        0.75,
    )
    assert found.data.pipeline_tag == "text-classification"
    assert '{"text": "a text", "text_pair": "another"}' in found.text
    assert (
        "fine-tuned on tiny" in found.text and "| dev, accuracy | 0.7500 | 0.7500 |" in found.text
    )


def test_paths_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "jane" / "tuned"
    (run / "student").mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    (tmp_path / "jane" / "a.txt").write_text("text")
    tree = {
        **TREE,
        "teacher": {"model": str(run / "student")},
        "data": {"train": ["jane/*.txt", "jane/a.txt", "~/jane/b.txt"], "cache": "/srv/jane"},
        "run": {"output": "../jane/small"},
        "deepspeed": {"nested": [{"path": "/nvme/jane/swap"}]},
    }
    notes = [f"teacher.model {run}/student: goes without x", f"{tmp_path}/other is read"]
    found = card(tmp_path / "small", tree, tiny_summary(notes=notes, worse=[f"in {tmp_path}"]))
    assert not re.search(r"jane/|/jane|~jane", found.content)
    assert str(tmp_path) not in found.content
    assert "distilled from tuned by" in found.text
    assert "- teacher.model tuned: goes without x\n" in found.text
    assert "base_model" not in found.data.to_dict()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/name", "org/name"),
        ("package:gt/minilm", "package:gt/minilm"),
        ("python-docs", "python-docs"),
        ("/home/jane/model", "model"),
        ("/", "folder"),
        ("..", ".."),
        ("../..", "folder"),
        ("~/x/y.txt", "y.txt"),
        ("text/**/*.txt.gz", "*.txt.gz"),
        ("two\n/lines", "two\n/lines"),
    ],
)
def test_only_what_is_a_path_loses_its_folders(given: str, expected: str) -> None:
    assert public_name(given) == expected
    assert public_tree({"a": [given, 1, None]}) == {"a": [expected, 1, None]}


@pytest.fixture
def mail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader called mail."""
    monkeypatch.setattr(readers, "_readers", {})
    readers.register_reader("mail")(write_licence)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("mail:/home/jane/mbox", "mail:mbox"),
        ("mail:~/mbox", "mail:mbox"),
        ("mail:jane/m.db?mail.body", "mail:m.db?mail.body"),
        ("mail:m.db?mail.body", "mail:m.db?mail.body"),
        ("mail:/", "mail:folder"),
        # without a reader of that name
        ("post:inbox", "post:inbox"),
    ],
)
def test_a_path_behind_a_readers_name_loses_its_folders(
    mail: None, given: str, expected: str
) -> None:
    assert public_name(given) == expected


def test_what_a_reader_reads_is_no_data_set_of_the_hub(tmp_path: Path, mail: None) -> None:
    train = ["mail:/home/jane/mbox", "mail:jane/box", "s3://org/jane", "org/text:part"]
    notes = ["data: mail:/home/jane/mbox is long", "/home/jane/mbox is read twice"]
    tree = {**TREE, "data": {"train": train[:2] + train[3:]}}
    found = card(tmp_path / "small", tree, tiny_summary(notes=notes))
    assert found.data.to_dict()["datasets"] == ["org/text"]
    assert "jane" not in found.content
    assert "- trained on: mail:mbox, mail:box, org/text:part\n" in found.text
    assert "- data: mail:mbox is long\n- mbox is read twice\n" in found.text
    tree = {**TREE, "data": {"train": train[2:]}}
    assert card(tmp_path / "small", tree).data.to_dict()["datasets"] == ["org/text"]


def test_a_path_that_begins_another_is_replaced_after_it() -> None:
    said = PublicText({"a": "/home/jane", "b": ["/home/jane/x/model"]})
    assert said("/home/jane/x/model and /home/jane/y") == "model and jane/y"


def write_licence(folder: Path, metadata: str) -> Licence:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")
    return licence_of(ModelSource(str(folder)))


def test_a_licence_is_the_one_of_the_teachers_card(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    other = "license: other\nlicense_name: llama3\nlicense_link: https://x.org/LICENSE"
    assert write_licence(teacher, other) == Licence("other", "llama3", "https://x.org/LICENSE")
    assert write_licence(teacher, "license: apache-2.0") == Licence("apache-2.0")
    found = card(tmp_path / "small", {**TREE, "teacher": {"model": str(teacher)}})
    assert found.data.license == "apache-2.0"
    assert "- teacher.model: teacher; licence apache-2.0, as its own card says\n" in found.text
    assert "unknown" not in found.text
    # a student that starts from another model has two
    start = tmp_path / "start"
    write_licence(start, "license: mit")
    tree = {**TREE, "teacher": {"model": str(teacher)}}
    tree["student"] = {"layers": 2, "init": str(start)}
    assert "license" not in card(tmp_path / "small", tree).data.to_dict()


@pytest.mark.parametrize(
    "metadata",
    [
        "language: en",
        "license: [mit, apache-2.0]",
        "license: <b>",
        f"license: {'x' * 100}",
        "license: {a: *b}",
        "- license",
        "1: 2",
        "[" * 1200,
        "license: mit\n...\n\x00",
        "license: mit\nlicense: apache-2.0",
        "license: !!python/name:os.system",
        "\n" * (1 << 19),
    ],
)
def test_a_licence_that_is_none_is_unknown(tmp_path: Path, metadata: str) -> None:
    assert write_licence(tmp_path / "teacher", metadata) == Licence()


def test_metadata_that_grows_as_it_is_read_is_not_read(tmp_path: Path) -> None:
    """A few hundred bytes of merge keys stand for 10^9 values."""
    lines = ["a0: &a0 {k: v}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 10)]
    began = time.process_time()
    assert write_licence(tmp_path / "teacher", "\n".join([*lines, "license: mit"])) == Licence()
    assert time.process_time() - began < 5


def test_only_what_stands_between_the_first_fences_is_metadata(tmp_path: Path) -> None:
    for text, expected in (
        ("---\r\nlicense: mit\r\n---\r\nlicense: gpl\r\n", "mit"),
        ("\n---\nlicense: mit\ndate: 2024-01-31\n---\n---\nlicense: gpl\n---\n", "mit"),
        ("# Title\n---\nlicense: mit\n---\n", ""),
        ("---\nlicense: mit\n", ""),
        ("", ""),
    ):
        (tmp_path / "README.md").write_text(text, newline="")
        assert licence_of(ModelSource(str(tmp_path))).identifier == expected


def test_text_of_others_is_text(tmp_path: Path) -> None:
    task = {**TASK["task"], "name": HOSTILE, "labels": [HOSTILE, "b"], "evaluate": [HOSTILE]}
    tree = {**TASK, "model": HOSTILE, "task": {**task, "source": HOSTILE}}
    judged = {**SCORED, "losses": {HOSTILE: 1.0}, "scores": {HOSTILE: {"accuracy": 0.75}}}
    changes: dict[str, Any] = {"parameters": {"student": 1}, "data_digests": {HOSTILE: HOSTILE}}
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    labels = json.dumps({"id2label": {"0": HOSTILE, "1": "b"}})
    (run / "student" / "config.json").write_text(labels)
    found = card(run, tree, tiny_summary(before=judged, after=judged, notes=[HOSTILE], **changes))
    assert "license" not in found.data.to_dict()
    assert found.data.eval_results[0].dataset_name == HOSTILE.replace("\n", "\\n")
    outside, fences = "", 0
    for part in re.split(r"^(`{3,})\w*$", found.text, flags=re.MULTILINE):
        if re.fullmatch("`{3,}", part):
            fences += 1
        elif fences % 2 == 0:
            outside += part
    # a fence opens and closes, and what stands in the last one is the recipe
    assert fences == 6 and "<script" not in outside and "](javascript" not in outside
    assert "\n---" not in outside


def test_losses_of_stages_are_told_apart(tmp_path: Path) -> None:
    ends = [({"hidden/1-2": 8.0}, {"hidden/1-2": 2.0}), ({"logits": 0.5}, {"logits": 0.75})]
    stages = [
        tiny_summary(
            **{"before": {"losses": before, "total": 1.0}, "after": {"losses": after, "total": 2.0}}
        )
        for before, after in ends
    ]
    whole = {**stages[1], "before": stages[0]["before"], "stages": stages}
    said = card(tmp_path / "run", TREE, whole).content
    assert "| stage 1: hidden/1-2 | 8 | 2 |\n| stage 1: total, weighted | 1 | 2 |\n" in said
    assert "| stage 2: logits | 0.5 | 0.75 |" in said


def test_code_stays_in_its_fence() -> None:
    assert fenced("a\n```\nb\x1b\n", "sh") == ["````sh", "a", "```", "b\\x1b", "````"]
    assert fenced("a") == ["```", "a", "```"]


def test_it_is_bounded(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    labels = {str(n): "y" * 1000 for n in range(3000)}
    (run / "student" / "config.json").write_text(json.dumps({"id2label": labels}))
    losses = {"losses": {f"hidden/{n}-{n}": 1.0 for n in range(5000)}, "total": 1.0}
    judged = {**SCORED, **losses}
    summary = tiny_summary(before=judged, after=judged, notes=["x" * 10_000])
    tree = {**TASK, "deepspeed": {f"key{n}": "z" * 500 for n in range(600)}}
    del summary["parameters"]["teacher"]
    found = card(run, tree, summary)
    assert len(found.content) < 200_000
    assert "2920 more" in found.text and "more lines are left out" in found.text


@pytest.mark.parametrize("kind", ["encoder", "reranker", "sentences"])
def test_what_it_says_of_loading_is_what_the_folder_is(tmp_path: Path, kind: str) -> None:
    from sentence_transformers import CrossEncoder, models

    if kind == "encoder":
        folder = exported(tmp_path / "run", save_teacher(tmp_path / "t"))
    elif kind == "sentences":
        teacher = save_sentences(tmp_path, models.Pooling(32))
        folder = exported(tmp_path / "run", teacher)
    else:
        CrossEncoder(str(save_classifier(tmp_path / "t", num_labels=1)), device="cpu").save(
            str(tmp_path / "reranker")
        )
        folder = exported(tmp_path / "run", tmp_path / "reranker", "sequence_classification")
    found = ModelCard.load(folder / "README.md")
    (code,) = re.findall(r"```python\n(.*?)```", found.text, flags=re.DOTALL)
    words = code.replace("MODEL", str(folder)).replace("a text", "w7 w8").replace("another", "w9")
    exec(words, {})
    expected = {
        "encoder": ("transformers", "feature-extraction"),
        "reranker": ("sentence-transformers", "text-ranking"),
        "sentences": ("sentence-transformers", "sentence-similarity"),
    }
    assert (found.data.library_name, found.data.pipeline_tag) == expected[kind]


def test_heads_say_whether_transformers_has_a_pipeline_for_them() -> None:
    from transformers.pipelines import SUPPORTED_TASKS

    for spec in HEADS.values():
        assert (spec.hub_task in SUPPORTED_TASKS) == spec.has_pipeline
