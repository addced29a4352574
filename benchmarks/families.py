"""Every family of transformers through fastkd: it works exactly, or is refused in one line.

    python -m benchmarks.families --output benchmarks/results/families.md

A tiny random model of each family is saved and loaded, tried, captured and held against its own
eager attention maps, and its attention is made again from the hidden states below it; a student is
cut from it, which must equal the teacher's own blocks in a row; one step of every loss that the two
allow is made; and the student is written and read again.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.family_checks import (
    blocks_in_a_row,
    check_maps,
    divergence_of_maps,
    eager_maps,
    inputs_of,
    outputs_of,
)
from benchmarks.family_models import LAYERS, all_families, family_model, heads_of
from fastkd.capture import AttentionTraits, capture, capture_keywords, try_model, try_recomputing
from fastkd.errors import UserError, one_line
from fastkd.head_spec import HEADS
from fastkd.layer_map import make_layer_map
from fastkd.losses import DIVISORS
from fastkd.losses.factory import make_objective
from fastkd.models import build_student, load_student, load_teacher
from fastkd.recipe import Recipe, Student, parse_recipe
from fastkd.types import IGNORE_INDEX, Head, ModelSource

TOKENS, CLASSES = 20, 3
SOURCES = (2, 4)
_ATTENTION = ("score_mse", "kl", "reverse_kl", "js", "mse", "cosine", "cross_entropy")
_HIDDEN = ("mse", "normalized_mse", "cosine")
_LOGITS = ("kl", "reverse_kl", "js", "skew_kl", "mse", "cross_entropy")


class Broken(AssertionError):
    """Something that is neither exact nor refused."""


@dataclass
class Row:
    """What is said of a family."""

    family: str
    model: str = ""
    attention: str = ""
    """Bidirectional or causal, with its windows."""
    maps: str = ""
    """Largest difference of captured attention from the model's own maps."""
    losses: list[str] = field(default_factory=list)
    """Sections of a recipe whose losses made a step."""
    refused: list[str] = field(default_factory=list)
    """What is refused, with fastkd's own words."""
    broken: str | None = None
    """What is wrong, in words; nothing, one hopes."""
    unmade: str | None = None
    """Why there is no tiny model of it."""


def sweep(family: str) -> Row | None:
    """Take one family through everything; `None` where it reads neither tokens nor images."""
    row = Row(family)
    try:
        model = family_model(family)
    # transformers says in many ways that numbers don't go together
    except Exception as error:
        row.unmade = _short(error)
        return row
    if model.main_input_name not in ("input_ids", "pixel_values"):
        return None
    row.model = type(model).__name__
    heads: list[Head] = ["none", *heads_of(family)]
    for head in heads:
        try:
            with tempfile.TemporaryDirectory() as folder:
                _take_through(row, family, head, Path(folder))
        except UserError as error:
            assert "\n" not in str(error)
            row.refused.append(f"{'' if head == 'none' else f'{head}: '}{error}")
        # a traceback is what the sweep is looking for
        except Exception as error:
            row.broken = f"{head}: {_short(error)}"
    return row


def _take_through(row: Row, family: str, head: Head, folder: Path) -> None:
    changes = {"num_labels": CLASSES} if HEADS[head].labels in ("example", "token") else {}
    family_model(family, head, **changes).save_pretrained(folder / "teacher")
    attention = "sdpa"
    try:
        teacher = load_teacher(ModelSource(str(folder / "teacher")), head=head)
    except UserError as error:
        if "try attention: eager" not in str(error):
            raise
        attention = "eager"
        teacher = load_teacher(ModelSource(str(folder / "teacher")), attention=attention, head=head)
    inputs = inputs_of(teacher, TOKENS)
    # what a run without losses of attention needs is tried by itself
    needs = _needs(row, teacher, head)
    if needs["attention"]:
        with _noted(row, head):
            try_recomputing(teacher, inputs, range(1, LAYERS + 1))
    if head == "none" and needs["attention"]:
        maps = eager_maps(folder / "teacher", inputs)
        traits = try_model(teacher, TOKENS)
        row.attention = _in_words(traits)
        if traits.unknown or traits.differs:
            row.refused.append(str(traits.unknown or traits.differs))
        elif maps is None:
            row.maps = "gives none"
        else:
            row.maps = f"{check_maps(teacher, inputs, maps, traits):.0e}"
    layers = make_layer_map(SOURCES, len(SOURCES), LAYERS)
    section = Student(layers=len(SOURCES), head=head, attention=attention)
    student, started = build_student(teacher, section, layers)
    student.eval()
    if not started.missing and (needs["hidden"] or needs["attention"]):
        blocks_in_a_row(student, teacher, SOURCES, inputs)
    _move(student)
    _steps(row, student, teacher, head, needs, inputs)
    if head == "none" and not any(needs.values()):
        return
    student.save_pretrained(folder / "student")
    again = load_student(folder / "student", head=head, attention=attention)
    for given, expected in zip(outputs_of(again, inputs), outputs_of(student, inputs), strict=True):
        if not torch.equal(given, expected):
            raise Broken("a student that is written and read again gives other numbers")


@torch.no_grad()
def _move(student: PreTrainedModel) -> None:
    """Take a student away from its teacher, so that no loss is 0."""
    for parameter in student.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    embeddings = getattr(student.base_model, "get_input_embeddings", lambda: None)
    table = embeddings() if student.main_input_name == "input_ids" else None
    if isinstance(table, torch.nn.Embedding) and table.padding_idx is not None:
        # some models clear it again when they are read
        table.weight[table.padding_idx] = 0.0


def _needs(row: Row, model: PreTrainedModel, head: Head) -> dict[str, bool]:
    """What can be captured of a model; what can't be is noted."""
    with _noted(row, head):
        try_model(model, TOKENS)
        return {"attention": True, "hidden": True}
    with _noted(row, head):
        try_model(model, TOKENS, attention=False)
        return {"attention": False, "hidden": True}
    try_model(model, TOKENS, attention=False, hidden=False)
    return {"attention": False, "hidden": False}


@contextlib.contextmanager
def _noted(row: Row, head: Head) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if head == "none":
            row.refused.append(str(error))


def _steps(
    row: Row,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    head: Head,
    needs: Mapping[str, bool],
    inputs: Mapping[str, torch.Tensor],
) -> None:
    traits = AttentionTraits(), AttentionTraits()
    if needs["attention"]:
        traits = try_model(student, TOKENS), try_model(teacher, TOKENS)
    losses: list[dict[str, Any]] = []
    if head != "none":
        losses = [{"logits": {"kind": kind}} for kind in _LOGITS]
    elif needs["attention"]:
        losses = [{"attention": {"kind": kind}} for kind in _ATTENTION]
        losses += [{"relations": {"relation_heads": 2}}]
    if head == "none" and needs["hidden"]:
        losses += [{"hidden": {"kind": kind}} for kind in _HIDDEN] + [{"embedding": {}}]
    for section in losses:
        name = next(iter(section))
        try:
            _step(student, teacher, _recipe(section, head), traits, inputs)
        except UserError as error:
            reason = f"{name}: {error}"
            if str(error) not in " ".join(row.refused) and not any(
                r and r in str(error) for r in row.refused
            ):
                row.refused.append(reason)
            continue
        kind = section[name].get("kind", "")
        row.losses.append(f"{name} {kind}".strip())


def _recipe(section: dict[str, Any], head: Head) -> Recipe:
    tree = {
        "teacher": {"model": "none"},
        "student": {"layers": len(SOURCES), "head": head},
        "layer_map": list(SOURCES),
        "losses": section,
        "run": {"output": "none"},
    }
    if HEADS[head].data == "text":
        return parse_recipe({**tree, "data": {"train": "none"}})
    task: dict[str, Any] = {"name": "drawn", "source": "none", "kind": head}
    if HEADS[head].labels in ("example", "token"):
        task["labels"] = [str(label) for label in range(CLASSES)]
    if HEADS[head].labels == "example":
        task["columns"] = {"texts": "text", "label": "label"}
    return parse_recipe({**tree, "task": task})


def _labels(head: Head, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of words and spans, the labels that say what of the outputs counts."""
    if HEADS[head].labels == "span":
        return {"labels": torch.tensor([[1, 3], [2, 2]])}
    if HEADS[head].labels == "token":
        classes = torch.arange(TOKENS) % CLASSES
        return {"labels": classes.where(inputs["attention_mask"] == 1, IGNORE_INDEX)}
    return {}


def _step(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    recipe: Recipe,
    traits: tuple[AttentionTraits, AttentionTraits],
    inputs: Mapping[str, torch.Tensor],
) -> None:
    layers = make_layer_map(recipe.layer_map, len(SOURCES), LAYERS)
    objective = make_objective(
        recipe.losses, layers, student, teacher, traits, head=recipe.student.head
    )
    student.zero_grad()
    states = []
    for model, side in ((student, "student"), (teacher, "teacher")):
        with (
            torch.set_grad_enabled(side == "student"),
            capture(model, **objective.layers(side)) as seen,
        ):
            model(**inputs, **capture_keywords(model))
        states.append(seen)
    read = {**inputs, **_labels(recipe.student.head, inputs)}
    if "pixel_values" in inputs:
        first = next(iter({**states[1].hidden, **_queries(states[1])}.values()))
        read = {"input_ids": torch.zeros(first.shape[0], first.shape[-2], dtype=torch.long)}
    total, values = objective(*states, read, torch.ones(len(DIVISORS)))
    total.backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    finite = bool(values.isfinite().all()) and all(bool(g.isfinite().all()) for g in gradients)
    if not finite or not any(bool(g.any()) for g in gradients):
        raise Broken(f"{list(recipe.losses.terms)}: a loss or gradient is not finite, or none is")
    attention = recipe.losses.terms.get("attention")
    if getattr(attention, "kind", None) == "kl":
        expected = divergence_of_maps(states, SOURCES, traits, inputs.get("attention_mask"))
        if not torch.allclose(values[0], expected, rtol=1e-4, atol=1e-6):
            raise Broken(f"KL is {values[0].tolist()}, of the maps {expected.tolist()}")


def _queries(states: Any) -> dict[int, torch.Tensor]:
    return {layer: state.query for layer, state in states.attention.items()}


def _in_words(traits: AttentionTraits) -> str:
    kind = "causal" if traits.causal else "bidirectional"
    widths = sorted(set(traits.windows.values()))
    return f"{kind}, windows of {', '.join(map(str, widths))}" if widths else kind


def _short(error: Exception) -> str:
    # where packages are installed says nothing of a family
    reason = re.sub(r"/\S*site-packages/", "", one_line(error, None))
    return f"{type(error).__name__} {reason[:160]}"


def table(rows: Sequence[Row], skipped: int) -> str:
    """The page of all families, in Markdown."""
    made = [row for row in rows if row.unmade is None]
    whole = [row for row in made if not row.refused and not row.broken]
    partly = [row for row in made if row.refused and row.losses]
    refused = [row for row in made if row.refused and not row.losses]
    lines = [
        f"# Families of transformers {transformers.__version__}",
        "",
        "Written by `make families`; `benchmarks/families.py` says what is checked. "
        f"{len(made)} families have a stack of blocks and read tokens or images: {len(whole)} "
        f"pass with every loss that their heads allow, {len(partly)} with some, {len(refused)} are "
        f"refused. {skipped} more read sound or other signals and were left out.",
        "",
        "*maps differ by*: largest difference between captured attention and the maps that the "
        "model itself gives under eager attention. *refused*: fastkd's own words, of a student "
        f"of layers {' and '.join(map(str, SOURCES))} of {LAYERS} and {TOKENS} tokens.",
        "",
        "| family | model | attention | maps differ by | losses | refused |",
        "|---|---|---|---|---|---|",
    ]
    for row in made:
        said = "; ".join(dict.fromkeys(row.refused)).replace("|", "/")
        sections = ", ".join(dict.fromkeys(loss.split()[0] for loss in row.losses))
        broken = f"**broken: {row.broken}** " if row.broken else ""
        cells = (row.family, row.model, row.attention, row.maps, sections, broken + said)
        lines.append(f"| {' | '.join(cells)} |")
    unmade = [f"{row.family} ({row.unmade})" for row in rows if row.unmade is not None]
    if unmade:
        lines += ["", f"Of {len(unmade)} more no tiny model was made: {'; '.join(unmade)}."]
    return "\n".join(lines) + "\n"


def _told(family: str) -> Row | None:
    row = sweep(family)
    print(family, "BROKEN " + row.broken if row and row.broken else "", file=sys.stderr, flush=True)
    return row


def main() -> None:
    """Sweep all families, or those named, and write or print the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("families", nargs="*", help="all where not given")
    parser.add_argument("--output", type=Path, help="file of the page; printed where not given")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = [_told(family) for family in given.families or all_families()]
    rows = [row for row in found if row is not None]
    page = table(rows, len(found) - len(rows))
    if given.output is None:
        print(page)
    else:
        given.output.write_text(page, encoding="utf-8")
    broken = [f"{row.family}: {row.broken}" for row in rows if row.broken]
    raise SystemExit("\n".join(broken) if broken else 0)


if __name__ == "__main__":
    main()
