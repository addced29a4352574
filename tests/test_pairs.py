"""Sentence pairs: Spearman's correlation of what `SentenceTransformer.encode` gives, by SciPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as models
from tiny_exports import save_sentences
from tiny_models import INTERMEDIATE, WIDTH, tiny_config, tiny_model, tiny_tokenizer
from tiny_others import letter_tokenizer
from tiny_runs import make_recipe
from torch import nn

import fastkd
from fastkd.data.pairs import prepare_pairs
from fastkd.distributed import Ranks
from fastkd.recipe.evaluate import SentencePairs

PROMPT = "w9 w9 "


def write_pairs(folder: Path, count: int = 30, seed: int = 0) -> list[tuple[str, str, float]]:
    """Random pairs of which some texts have few words and some many, in every form."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        texts = [
            " ".join(f"w{i}" for i in draw.integers(5, 64, draw.integers(1, 22))) for _ in (0, 1)
        ]
        rows.append((texts[0], texts[1], float(draw.integers(0, 6))))
    folder.mkdir(exist_ok=True)
    for name, split, header in (("a.tsv", "\t", "s\tt\tgold"), ("a.csv", ",", "s,t,gold")):
        lines = [split.join((one, two, f"{score}")) for one, two, score in rows]
        (folder / name).write_text("\n".join([header, *lines]) + "\n")
    found = [{"sentence1": one, "sentence2": two, "score": score} for one, two, score in rows]
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return rows


COLUMNS = {"sentence1": "s", "sentence2": "t", "score": "gold"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "data")
    dense = models.Dense(WIDTH, 20, activation_function=nn.Tanh())
    save_sentences(folder / "teacher", models.Pooling(WIDTH, "mean"), dense, models.Normalize())
    pairs = {
        "prompted": {"path": "data/a.tsv", "prompt": PROMPT, **COLUMNS},
        "csv": {"path": "data/a.csv", **COLUMNS},
        "json": "data/b.jsonl",
    }
    make_recipe(
        folder,
        teacher={"model": str(folder / "teacher" / "sentences")},
        # the student begins as the teacher without two of its layers
        student={"layers": 2, "hidden_size": WIDTH, "intermediate_size": INTERMEDIATE},
        losses={"attention": None, "embedding": None},
        data={"block_size": 14},
        evaluate={"pairs": pairs},
        train={"steps": 4, "evaluate_every": 2, "warmup_steps": 0, "micro_batch_size": 4},
    )
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> fastkd.RunResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return fastkd.distill("recipe.yaml", quiet=True)


def correlations(model: SentenceTransformer, folder: Path) -> dict[str, float]:
    """By the library, of texts that are cut as a run cuts them."""
    model.max_seq_length = 14
    rows = write_pairs(folder / "data")
    found = {}
    for name, prompt in (("prompted", PROMPT), ("csv", ""), ("json", "")):
        sides = [model.encode([prompt + row[side] for row in rows]) for side in (0, 1)]
        lengths = [np.linalg.norm(side, axis=1) for side in sides]
        cosines = (sides[0] * sides[1]).sum(axis=1) / (lengths[0] * lengths[1])
        found[name] = float(scipy.stats.spearmanr(cosines, [row[2] for row in rows])[0])
    return found


def test_pairs_correlate_as_scipy_and_sentence_transformers_say(
    result: fastkd.RunResult, folder: Path
) -> None:
    summary = result.summary
    teacher = SentenceTransformer(str(folder / "teacher" / "sentences"), device="cpu")
    expected = correlations(teacher, folder)
    assert summary["teacher"]["pairs"] == pytest.approx(expected, abs=1e-9)
    # before the first step: the plain truncated teacher
    blocks = teacher[0].auto_model.encoder.layer
    teacher[0].auto_model.encoder.layer = nn.ModuleList([blocks[1], blocks[3]])
    truncated = correlations(teacher, folder)
    assert summary["before"]["pairs"] == pytest.approx(truncated, abs=1e-9)
    student = SentenceTransformer(str(result.folder / "student"), device="cpu")
    assert summary["after"]["pairs"] == pytest.approx(correlations(student, folder), abs=1e-9)
    assert len({json.dumps(summary[key]["pairs"]) for key in ("teacher", "before", "after")}) == 3
    assert summary["after"]["pairs"]["prompted"] != summary["after"]["pairs"]["csv"]
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").open()]
    heldout = [line for line in lines if line["kind"] == "heldout"]
    columns = {f"heldout/pairs/{name}" for name in expected}
    judged = [line["step"] for line in heldout if line.keys() >= columns]
    assert judged == [0, 2, 4]
    page = (result.folder / "report.html").read_text()
    assert "<th scope='row'>json, Spearman</th>" in page
    assert "<figcaption>prompted</figcaption>" in page


def test_a_run_is_scored_on_other_pairs_from_elsewhere(
    result: fastkd.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "data", seed=1)
    found = fastkd.evaluate(result)
    assert found.judged["pairs"] == pytest.approx(result.summary["after"]["pairs"], abs=1e-9)
    assert f"{found.judged['pairs']['json']:.4f}" in capsys.readouterr().out
    other = fastkd.evaluate(result, {"evaluate.pairs": {"new": "data/b.jsonl"}}, quiet=True)
    assert other.judged["pairs"].keys() == {"new"}
    assert other.judged["pairs"]["new"] != found.judged["pairs"]["json"]
    given = {"evaluate.pairs.json.path": "data/b.jsonl"}
    here = fastkd.evaluate(result, given, quiet=True).judged["pairs"]
    assert here["json"] == other.judged["pairs"]["new"]
    assert here["csv"] == pytest.approx(found.judged["pairs"]["csv"], abs=1e-9)


def test_a_digest_of_pairs_is_of_all_that_models_read(folder: Path, ranks: Ranks) -> None:
    def digest(teacher: Any = None, vocabulary: int = 64, prompt: str = "") -> str:
        config = tiny_config("bert")
        found = prepare_pairs(
            {"x": SentencePairs(path=str(folder / "data" / "b.jsonl"))},
            ranks,
            tokenizer=tiny_tokenizer(vocabulary),
            config=config,
            teacher_tokenizer=teacher,
            teacher_config=config,
            cache=str(folder / "cache"),
            max_length=14,
            prompt=prompt,
        )
        return found["x"].fingerprint

    # words that a smaller vocabulary lacks are as many tokens
    digests = [digest(), digest(vocabulary=32), digest(prompt=PROMPT)]
    digests += [digest(tiny_tokenizer()), digest(letter_tokenizer())]
    assert len(set(digests)) == len(digests) and digest() == digests[0]


def test_pairs_choose_a_student(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    rates = {"train.learning_rate": 2e-2, "train.evaluate_every": 1, "run.output": "chosen"}
    found = fastkd.distill("recipe.yaml", {**rates, "run.keep_best": "json"}, quiet=True)
    lines = [json.loads(line) for line in (found.folder / "metrics.jsonl").open()]
    over = {
        x["step"]: x["heldout/pairs/json"] for x in lines if x["kind"] == "heldout" and x["step"]
    }
    best = max(over, key=lambda step: over[step])
    assert found.summary["exported_step"] == best
    again = fastkd.evaluate(found, quiet=True).judged["pairs"]["json"]
    assert again == pytest.approx(over[best], abs=1e-9)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"pairs": {"x": "none.tsv"}}, "evaluate.pairs.x: data: no file or folder 'none.tsv'"),
        ({"pairs": {"x": "data/a.csv"}}, "no column 'sentence1'; .* set evaluate.pairs.x.sent"),
        ({"pairs": {"x": "corpus.txt"}}, "evaluate.pairs.x: corpus.txt is text without columns"),
        ({"pairs": {"x": "data/one.jsonl"}}, "2 pairs and no two scores that differ"),
        ({"pairs": {"x": "data/bad.jsonl"}}, "bad.jsonl, line 2: column 'score' holds 'high'"),
        ({"pairs": {"score": "data/b.jsonl"}}, "pairs can't be called 'score'"),
        ({"pairs": {"a.b": "data/b.jsonl"}}, "pairs can't be called 'a.b'"),
        ({"pairs": {"hidden": "data/b.jsonl"}}, "called 'hidden', as is losses.hidden"),
        (
            {"pairs": {"x": {"path": "y", "text1": "z"}}},
            "evaluate.pairs.x.text1: unknown key; .*expected one of path",
        ),
        ({"pairs": {"x": 3}}, "evaluate.pairs.x: expected a section with keys path"),
        ({}, "neither pairs nor mteb is given"),
        ({"mteb": ["X"], "mteb_prompts": {"passage": "p"}}, "mteb_prompts has 'passage'"),
    ],
)
def test_pairs_that_judge_nothing_are_refused(
    section: dict[str, Any], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    row = {"sentence1": "w5", "sentence2": "w6", "score": 1.0}
    for name, score in (("one", 1.0), ("bad", "high")):
        lines = [json.dumps(row), json.dumps({**row, "score": score})]
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(fastkd.UserError, match=said):
        fastkd.distill("recipe.yaml", {"evaluate": section, "run.output": "refused"}, quiet=True)
    assert not (folder / "refused").exists()


def test_a_classifier_has_no_embeddings_to_judge(folder: Path) -> None:
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    tree["student"]["head"] = "sequence_classification"
    with pytest.raises(fastkd.UserError, match="evaluate scores embeddings, but student"):
        fastkd.distill(tree, quiet=True)


def test_a_teacher_of_unknown_modules_can_not_be_judged(folder: Path) -> None:
    tiny_model("bert").save_pretrained(folder / "odd")
    source = folder / "teacher" / "sentences"
    for path in source.rglob("*"):
        if path.is_file() and "safetensors" not in path.name:
            target = folder / "odd" / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    listed = json.loads((folder / "odd" / "modules.json").read_text())
    listed[1]["type"] = "somewhere.Else"
    (folder / "odd" / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(fastkd.UserError, match=r"^evaluate compares embeddings, but teacher"):
        fastkd.distill(
            folder / "recipe.yaml",
            {"teacher.model": str(folder / "odd"), "run.output": folder / "refused"},
            quiet=True,
        )
