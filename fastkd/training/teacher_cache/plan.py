"""Where a run's cache of teacher states lies, in which form, and what it takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from fastkd.capture import Capture, try_recomputing
from fastkd.data.text.cache import cache_key, is_complete
from fastkd.errors import UserError
from fastkd.files.disk import check_place
from fastkd.files.home import at_home
from fastkd.head_spec import HEADS
from fastkd.losses.factory import embedding_losses
from fastkd.models.digests import model_digests
from fastkd.packed_row import PackedRow
from fastkd.recipe import Recipe
from fastkd.recipe.models import CacheAttention, CacheForm
from fastkd.reporting.numbers import size_of
from fastkd.training.setup import Run
from fastkd.training.teacher import TeacherRunner
from fastkd.training.teacher_cache.fill import FIELD, epoch_batches, fill
from fastkd.training.teacher_cache.layout import (
    Field,
    Layout,
    constant_part,
    fields_of,
    with_padded_modules,
    without_values,
)
from fastkd.training.teacher_cache.rows import Rows
from fastkd.training.teacher_cache.states import TeacherStates
from fastkd.types import Inputs, teacher_inputs

FORMAT = 1
"""Raised when the same settings would give other files."""
_PRECISIONS: Mapping[CacheForm, torch.dtype | None] = {"exact": None, "bfloat16": torch.bfloat16}
_OF_EMBEDDINGS: Mapping[CacheForm, torch.dtype] = {"float16": torch.float16, "int8": torch.int8}
"""Further ones where nothing but an embedding is read, which has no numbers far from its others."""
_GIB = 2**30


class Form(NamedTuple):
    """How states are stored."""

    precision: CacheForm
    """As `teacher.cache`, but for none."""
    attention: CacheAttention = "stored"
    """As `teacher.cache_attention`."""

    def __str__(self) -> str:
        words = self.precision, *(["attention recomputed"] if self.attention != "stored" else [])
        return ", ".join(words)


@dataclass(frozen=True)
class CachePlan:
    """What is stored of the teacher in a run, and where."""

    form: Form
    folder: Path
    layout: Layout
    rows_of: Mapping[Form, Rows]
    """Rows of every form in which these states may be stored."""
    sizes: Mapping[Form, int]
    """Bytes on disk of each of these."""
    settings: dict[str, Any]
    """What the folder's name is made of."""
    filled: bool

    @property
    def rows(self) -> Rows:
        """What is stored, and where each stands."""
        return self.rows_of[self.form]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.sizes[self.form]

    def use(self, run: Run, *, progress: bool) -> None:
        """Let a run read its teacher's states from disk, once they are there; collective.

        Raises:
            UserError: they can't be stored, or a rank does not see them.
        """
        assert isinstance(run.teacher, TeacherRunner), "a plan is made for a teacher"
        if not self.filled:
            fill(run, self.folder, self.layout, self.rows, self.settings, progress=progress)

        def opened() -> TeacherStates:
            if not is_complete(self.folder, FIELD, build=run.ranks.is_main):
                raise UserError(
                    f"{FIELD}: {self.folder} is not whole on every rank; all ranks must see the "
                    "same folder"
                )
            return TeacherStates(self.folder, self.layout, self.rows)

        run.teacher.stored = run.ranks.on_each(opened)


def plan_cache(run: Run, form: Form) -> CachePlan:
    """Plan to store what the losses of a run read of its teacher; collective, writes nothing.

    Args:
        run: of a recipe whose states can be stored, see `Recipe.why_not_cached`.
        form: where no loss reads attention, that is not recomputed either.

    Raises:
        UserError: a submodule whose states have no place for each token, or attention that can't be
            recomputed.
    """
    recipe, teacher = run.recipe, run.teacher
    assert isinstance(recipe, Recipe) and isinstance(teacher, TeacherRunner)
    (inputs,) = first_batches(run, 1)
    wanted = run.objective.all_layers("teacher")
    if recipe.teacher.cache_states == "all":
        wanted = _of_all_layers(run, recipe, wanted)
    if not wanted["attention"]:
        form = Form(form.precision)
    states = teacher.record(inputs, _recorded(wanted, recomputed=True))
    states = with_padded_modules(states, inputs)
    if not run.objective.reads_values:
        states = without_values(states)
    fields = _fields_of_forms(states, wanted, inputs)
    if form not in fields:
        read = [field.name for field in fields[Form("exact")] if field.name != "embedding"]
        raise UserError(
            f"teacher.cache is {form.precision}, which stores embeddings alone, but the losses "
            f"read {read[0]} of the teacher; take exact or bfloat16"
        )
    recomputed = form.attention == "recomputed"
    layout = Layout(
        fields=fields[form],
        recorded=_recorded(wanted, recomputed),
        template=constant_part(states),
        recomputed=try_recomputing(teacher.model, inputs, wanted["attention"])
        if recomputed
        else None,
    )
    settings = {
        "format": FORMAT,
        "teacher": run.ranks.from_main(lambda: model_digests(recipe.teacher.source)),
        # other code of the same model may give other states
        "transformers": transformers.__version__,
        "head": recipe.student.head,
        "dtype": recipe.teacher.dtype,
        "attention": recipe.teacher.attention,
        "tf32": recipe.train.tf32,
        "device": run.ranks.device.type,
        "states": [field.as_dict() for field in layout.fields],
        **_pooling_of(recipe),
        **_others_of(run, recipe),
        **run.datamodule.cache_identity(heldout=_stores_heldout(run, layout.fields)),
    }
    rows_of = {}
    for one, its in fields.items():
        heldout = _stores_heldout(run, its)
        rows_of[one] = Rows(run.datamodule.stored_rows(heldout=heldout), heldout)
    folder = at_home(recipe.teacher.cache_folder, FIELD) / cache_key(settings)
    return CachePlan(
        form=form,
        folder=folder,
        layout=layout,
        rows_of=rows_of,
        sizes={
            one: sum(rows_of[one].entries(field) * field.entry_bytes for field in its)
            for one, its in fields.items()
        },
        settings=settings,
        filled=run.ranks.from_main(lambda: is_complete(folder, FIELD)),
    )


def check_room(plan: CachePlan, limit: float) -> None:
    """See that what is to be stored may be, and that there is a place with room for it.

    Args:
        plan: of a run.
        limit: GiB, `teacher.cache_limit`.

    Raises:
        UserError: naming what is missing.
    """
    if plan.size > limit * _GIB:
        raise UserError(
            f"teacher.cache: {size_of(plan.size)} of states, but teacher.cache_limit is {limit:g}; "
            f"raise it, {_smaller(plan)}or leave teacher.cache out"
        )
    root = plan.folder.parent
    free = shutil.disk_usage(existing(root)).free
    if not plan.filled and plan.size > free:
        raise UserError(
            f"{FIELD}: {size_of(plan.size)} of states, but {root} has {size_of(free)} free; free "
            f"some, name another folder, {_smaller(plan)}or leave teacher.cache out"
        )
    if not plan.filled:
        check_place(plan.folder, FIELD, above=True)


def plan_for_run(run: Run) -> CachePlan | None:
    """The cache that a run's recipe asks for, once there is room for it; collective.

    Raises:
        UserError: as `plan_cache` and `check_room`.
    """
    if not isinstance(run.recipe, Recipe) or run.recipe.teacher.cache == "none":
        return None
    teacher = run.recipe.teacher
    plan = plan_cache(run, Form(teacher.cache, teacher.cache_attention))
    run.ranks.from_main(lambda: check_room(plan, teacher.cache_limit))
    return plan


def first_batches(run: Run, count: int) -> list[Inputs]:
    """The first micro-batches of an epoch, on the device."""
    batches = epoch_batches(run)
    return [run.move(batches.next_step(number)[0]) for number in range(count)]


def existing(folder: Path) -> Path:
    """A folder, or the nearest above it that there is."""
    # `False` of one that may not be looked for, where `Path.is_dir` raises
    return next(path for path in (folder, *folder.absolute().parents) if os.path.isdir(path))


def _recorded(wanted: Mapping[str, Any], recomputed: bool) -> dict[str, Any]:
    """Keyword arguments of `capture` that also record what attention is recomputed from."""
    below = {layer - 1 for layer in wanted["attention"]} if recomputed else set()
    return {**wanted, "hidden": wanted["hidden"] | below}


def _fields_of_forms(
    states: Capture, wanted: Mapping[str, Any], inputs: Inputs
) -> dict[Form, tuple[Field, ...]]:
    """What each form stores of a capture that holds what attention is recomputed from."""
    row = PackedRow.of(inputs)
    batch, tokens = teacher_inputs(inputs)["input_ids"].shape
    if row is not None:
        batch, tokens = len(row.lengths), row.longest
    hidden = {n: state for n, state in states.hidden.items() if n in wanted["hidden"]}
    stored: dict[CacheAttention, Capture] = {"stored": replace(states, hidden=hidden)}
    if wanted["attention"]:
        stored["recomputed"] = replace(states, attention={})
    precisions = dict(_PRECISIONS)
    if [field.name for field in fields_of(states, (batch, tokens), None)] == ["embedding"]:
        precisions |= _OF_EMBEDDINGS
    return {
        Form(precision, attention): fields_of(kept, (batch, tokens), dtype)
        for precision, dtype in precisions.items()
        for attention, kept in stored.items()
    }


def _of_all_layers(run: Run, recipe: Recipe, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `capture` that other losses and mappings read as well.

    Raises:
        UserError: the losses read something besides layers and the head.
    """
    besides = {
        "several teachers": bool(recipe.teacher.others),
        "embeddings of whole texts": wanted["outputs"],
        "submodules": bool(wanted["modules"]),
    }
    for what, given in besides.items():
        if given:
            raise UserError(
                "teacher.cache_states is all, which stores the states of layers and what the head "
                f"gives, but the losses read {what}; set it to read"
            )
    assert isinstance(run.teacher, TeacherRunner)
    depth = run.teacher.model.config.num_hidden_layers
    has_head = bool(HEADS[recipe.student.head].losses)
    return {**wanted, "hidden": set(range(depth + 1)), "logits": has_head}


def _others_of(run: Run, recipe: Recipe) -> dict[str, Any]:
    """The further teachers, where there are some."""
    given = recipe.teacher.others
    if not given:
        return {}
    found = run.ranks.from_main(lambda: [model_digests(other.source) for other in given])
    return {"others": found, "combine": recipe.teacher.combine}


def _pooling_of(recipe: Recipe) -> dict[str, Any]:
    """How losses have embeddings pooled, where that is not what the teacher's own files say."""
    readers = embedding_losses(recipe.losses, recipe.student.head)
    asked = {config.pooling for config in readers.values()}
    return {"pooling": asked.pop()} if asked - {None} else {}


def _stores_heldout(run: Run, fields: Iterable[Field]) -> bool:
    """Whether held-out rows are stored as well: an evaluation must not read what was rounded."""
    exact = all(field.stored == field.dtype for field in fields)
    return exact and run.datamodule.stores_heldout


def _smaller(plan: CachePlan) -> str:
    """The smallest form that takes less room, where there is one."""
    smallest = min(plan.sizes, key=lambda form: plan.sizes[form])
    if plan.sizes[smallest] >= plan.size:
        return ""
    changes = []
    if smallest.precision != plan.form.precision:
        changes.append(f"teacher.cache={smallest.precision}")
    if smallest.attention != plan.form.attention:
        changes.append(f"teacher.cache_attention={smallest.attention}")
    return f"take {' '.join(changes)} ({size_of(plan.sizes[smallest])}), "
