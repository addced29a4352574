"""Layer similarity against its definitions with full matrices, in fp64."""

from __future__ import annotations

import csv
import itertools
import math
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from fastkd_kernels import AttentionDivergenceKind
from tiny_models import LAYERS, POSITIONS, save_teacher, tiny_batch, tiny_model, write_text
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.capture import route_attention, try_model
from fastkd.cli import inspect, main
from fastkd.errors import UserError
from fastkd.layer_similarity import (
    LinearCKA,
    Similarity,
    inspect_layers,
    measure,
    notes,
    print_similarity,
    write_similarity,
)
from fastkd.reporting.console import Reporter


def _grams(x: Tensor, y: Tensor) -> float:
    """CKA by its definition, from centred [tokens, tokens] Grams (arXiv 1905.00414, eqs. 3, 4)."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return float((k * m).sum() / (k.square().sum().sqrt() * m.square().sum().sqrt()))


def _features(seed: int, *widths: int, tokens: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 5, generator=generator, dtype=torch.float64)
    found = []
    for width in widths:
        mix = torch.randn(5, width, generator=generator, dtype=torch.float64)
        own = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
        found.append(shared @ mix + own + 3)
    return found


def _cka(student: list[Tensor], teacher: list[Tensor], cuts: tuple[int, ...] = ()) -> np.ndarray:
    total = LinearCKA()
    bounds = [0, *cuts, len(student[0])]
    for start, stop in itertools.pairwise(bounds):
        total.add([x[start:stop] for x in student], [y[start:stop] for y in teacher])
    return total.result()


def test_cka_is_its_definition_however_the_tokens_are_cut() -> None:
    student, teacher = _features(0, 6, 9), _features(0, 12, 7, 4)
    expected = np.array([[_grams(x, y) for y in teacher] for x in student])
    assert expected.min() > 0.05 and expected.max() < 0.95
    for cuts in ((), (1,), (13, 14, 30)):
        assert _cka(student, teacher, cuts) == pytest.approx(expected, rel=1e-10)


def test_cka_is_one_for_rotation_scale_and_shift_and_not_for_other_maps() -> None:
    (x,) = _features(1, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert _cka([x], [x]) == pytest.approx(1.0, abs=1e-12)
    assert _cka([x], [x @ rotation * -4 + 100]) == pytest.approx(1.0, abs=1e-12)
    stretched = x * torch.tensor([30.0, *[1.0] * 7])
    assert _cka([x], [stretched]) < 0.9


def test_cka_keeps_its_digits_far_from_zero_and_in_half_precision() -> None:
    student, teacher = _features(2, 6), _features(2, 9)
    far = [[x + 1e6 for x in features] for features in (student, teacher)]
    assert _cka(*far) == pytest.approx(_cka(student, teacher), rel=1e-8)
    half = [x.bfloat16() for x in student]
    assert _cka(half, teacher) == pytest.approx(_cka([x.double() for x in half], teacher))


def test_cka_of_constant_features_is_not_a_number() -> None:
    (x,) = _features(3, 6)
    assert np.isnan(_cka([x], [torch.full((40, 4), 0.1)])).all()


def _model(name: str, seed: int, **changes: int) -> PreTrainedModel:
    model = tiny_model(name, seed, **changes)
    route_attention(model, "sdpa")
    return model


def measured(student: PreTrainedModel, teacher: PreTrainedModel, batches: Any) -> Similarity:
    traits = try_model(student, 12), try_model(teacher, 12)
    return measure(student, teacher, batches, traits)


SMALL = {"num_hidden_layers": 2, "hidden_size": 24}


def _outputs(
    model: PreTrainedModel, inputs: dict[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and attention probabilities by transformers' own eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    route_attention(model, "sdpa")
    return list(out.hidden_states), list(out.attentions)


def _js(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of probabilities [..., keys]."""
    middle = (p + q) / 2
    return (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).nansum(-1) / 2


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_models_of_other_widths_with_padding(name: str) -> None:
    teacher, student = _model(name, 0), _model(name, 1, **SMALL)
    batches = [tiny_batch((12, 7, 3)), tiny_batch((9, 9), seed=1)]
    found = measured(student, teacher, batches)
    hidden: list[list[list[Tensor]]] = [[], []]
    rows: dict[tuple[int, int], list[Tensor]] = {}
    for inputs in batches:
        valid = inputs["attention_mask"].bool()
        maps = []
        for side, model in enumerate((student, teacher)):
            states, attentions = _outputs(model, inputs)
            if name == "llama":
                # transformers normalises the last one, fastkd takes what the block gave
                states = states[:-1]
            hidden[side].append([state[valid].double() for state in states])
            maps.append([a.double() for a in attentions])
        for i, own in enumerate(maps[0]):
            for j, target in enumerate(maps[1]):
                row = _js(own, target).transpose(1, 2)[valid]
                rows.setdefault((i, j), []).append(row)
    for (i, j), parts in rows.items():
        assert found.divergence[i, j] == pytest.approx(float(torch.cat(parts).mean()), abs=1e-5)
    own, target = ([torch.cat(layer) for layer in zip(*side, strict=True)] for side in hidden)
    for i, x in enumerate(own):
        for j, y in enumerate(target):
            assert found.cka[i, j] == pytest.approx(_grams(x, y), abs=1e-5)
    assert found.tokens == 12 + 7 + 3 + 9 + 9
    assert found.cka.shape == (3, LAYERS + 1) and found.divergence.shape == (2, LAYERS)
    assert found.relation_heads is None


def test_a_model_is_like_itself() -> None:
    model = _model("bert", 0)
    found = measured(model, model, [tiny_batch((12, 7))])
    assert np.diag(found.cka) == pytest.approx(1.0)
    assert np.diag(found.divergence) == pytest.approx(0.0, abs=1e-6)
    off = ~np.eye(LAYERS, dtype=bool)
    assert (found.divergence[off] > 0.01).all() and (found.cka[1:, 1:][off] < 0.999).all()
    # and the measures are symmetric
    assert found.cka == pytest.approx(found.cka.T)
    assert found.divergence == pytest.approx(found.divergence.T, abs=1e-6)


@pytest.mark.parametrize(("heads", "width", "cut"), [(2, 24, 4), (3, 30, 1)])
def test_other_head_counts_are_cut_again_and_it_is_said(heads: int, width: int, cut: int) -> None:
    teacher = _model("bert", 0)
    student = _model("bert", 1, num_hidden_layers=2, hidden_size=width, num_attention_heads=heads)
    inputs = tiny_batch((8, 8))
    found = measured(student, teacher, [inputs])
    assert found.relation_heads == cut
    assert f"are cut into {cut} relation heads" in " ".join(notes(found))
    probabilities = []
    for model in (student, teacher):
        layer = model.encoder.layer[0].attention.self
        with torch.no_grad():
            state = model.embeddings(input_ids=inputs["input_ids"])
            parts = [linear(state).double() for linear in (layer.query, layer.key)]
        query, key = (part.view(2, 8, cut, -1).transpose(1, 2) for part in parts)
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        probabilities.append(scores.softmax(-1))
    assert found.divergence[0, 0] == pytest.approx(float(_js(*probabilities).mean()), abs=1e-6)


def test_layers_that_see_less_far_are_not_compared() -> None:
    model = _model("modernbert", 0)
    found = measured(model, model, [tiny_batch((12, 12))])
    local = [kind == "sliding_attention" for kind in model.config.layer_types]
    assert any(local) and not all(local)
    expected = np.not_equal.outer(local, local)
    assert (np.isnan(found.divergence) == expected).all()
    assert np.diag(found.divergence) == pytest.approx(0.0, abs=1e-6)
    assert "only where both layers see equally far" in " ".join(notes(found))


def test_an_encoder_is_not_compared_with_a_decoder() -> None:
    with pytest.raises(UserError, match="the student is causal and the teacher is not"):
        measured(_model("llama", 0), _model("bert", 0), [tiny_batch()])


def test_nothing_but_padding_is_refused() -> None:
    model = _model("bert", 0)
    inputs = {name: torch.zeros_like(value) for name, value in tiny_batch().items()}
    with pytest.raises(UserError, match="no tokens to compare"):
        measured(model, model, [inputs])


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str, str]:
    save_teacher(tmp_path / "teacher")
    save_teacher(tmp_path / "student", seed=1, **SMALL)
    text = write_text(tmp_path / "text.txt", documents=30, words=40)
    return str(tmp_path / "teacher"), str(tmp_path / "student"), str(text)


def test_inspect_writes_a_table_and_pictures(
    folders: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student, text = folders
    found = inspect_layers(teacher, student, [text], blocks=6, block_size=16)
    assert found.tokens == 6 * 16
    write_similarity(found, tmp_path / "out")
    with (tmp_path / "out" / "similarity.csv").open() as file:
        rows = {(int(r["student_layer"]), int(r["teacher_layer"])): r for r in csv.DictReader(file)}
    assert len(rows) == 3 * (LAYERS + 1)
    assert float(rows[2, 3]["linear_cka"]) == found.cka[2, 3]
    assert float(rows[2, 3]["js_divergence"]) == found.divergence[1, 2]
    assert rows[0, 3]["js_divergence"] == rows[2, 0]["js_divergence"] == ""
    marked = {
        name: [pair for pair, row in rows.items() if row[name] == "1"]
        for name in ("uniform", "last", "first")
    }
    assert marked == {
        "uniform": [(0, 0), (1, 2), (2, 4)],
        "last": [(0, 0), (1, 3), (2, 4)],
        "first": [(0, 0), (1, 1), (2, 2)],
    }
    for name in ("cka.png", "attention.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "similarity.html").read_text()
    assert page.count('role="img"') == 2 and "few tokens for 32 features" in page
    # every field of both maps has its value
    values = [*found.cka.ravel(), *found.divergence.ravel()]
    assert all(f">{value:.3f}</text>" in page for value in values)
    print_similarity(found, Reporter())
    said = capsys.readouterr().out
    best = int(found.cka[2].argmax())
    lines = [line for line in said.splitlines() if line.startswith("│ 2 ")]
    assert (
        f"{best}: {found.cka[2, best]:.3f}" in lines[0] and f"4: {found.cka[2, 4]:.3f}" in lines[0]
    )
    nearest = int(found.divergence[1].argmin()) + 1
    assert f"{nearest}: {found.divergence[1, nearest - 1]:.3f}" in lines[1]
    assert "few tokens for 32 features" in said


def test_the_command(
    folders: tuple[str, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher, student, text = folders
    options = ["--data", text, "--kind", "kl", "--blocks", "2", "--block-size", "16"]
    output = ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["fastkd", "inspect", teacher, student, *options, *output])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "kl divergence of attention" in said and "measured on 32 tokens" in said
    assert (tmp_path / "out" / "similarity.csv").read_text().split(",")[3] == "kl_divergence"


def test_the_command_offers_every_kind_of_divergence() -> None:
    """It spells them out, since the kernels would load torch before a line is said."""
    kind, _ = get_args(get_type_hints(inspect, include_extras=True)["kind"])
    assert get_args(kind) == get_args(AttentionDivergenceKind)


def test_a_deeper_student_has_no_maps(tmp_path: Path) -> None:
    values = np.full((4, 3), 0.5)
    found = Similarity(values, values[1:, 1:], "js", None, (4, 4), 9999, (8, 8))
    assert found.maps() == {}
    write_similarity(found, tmp_path)
    print_similarity(found, Reporter(silent=True))


def test_bad_input(folders: tuple[str, str, str], tmp_path: Path) -> None:
    teacher, student, text = folders
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        inspect_layers(teacher, student, ["nowhere.txt"], block_size=16)
    with pytest.raises(UserError, match="student nothing"):
        inspect_layers(teacher, "nothing", [text], block_size=16)
    with pytest.raises(UserError, match=f"has {POSITIONS} positions"):
        inspect_layers(teacher, student, [text], block_size=POSITIONS + 1)
    other = save_teacher(tmp_path / "other", vocab_size=80, tokens=80)
    with pytest.raises(UserError, match=r"student .*: its tokenizer is not the teacher's"):
        inspect_layers(teacher, str(other), [text], block_size=16)
    found = inspect_layers(teacher, student, [text], blocks=2, block_size=16)
    with pytest.raises(UserError, match="--output"):
        write_similarity(found, Path(text))


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300, "~nobody-of-that-name/m"])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_name_that_nothing_can_have_is_one_line(
    folders: tuple[str, str, str], side: str, name: str
) -> None:
    teacher, student, text = folders
    given = {"teacher": teacher, "student": student, side: name}
    with pytest.raises(UserError, match=rf"^{side}: .*\(given ") as refused:
        inspect_layers(given["teacher"], given["student"], [text], block_size=16)
    assert "\n" not in str(refused.value)
