"""What the commands do, as functions: `distill`, `finetune`, `evaluate`.

They read the same recipes, write the same folders and say the same lines, to the same numbers. What
the command line turns into a line and an exit code is an exception here: `UserError` for what the
caller can mend, `Interrupted` after Ctrl-C or SIGTERM once a checkpoint is written, `LostRank`.

A process is left as it was found. One that has initialised `torch.distributed` keeps its group and
its ranks; any other gets a group of one for the time of the call. The caller's default dtype,
autocast, `no_grad` or `inference_mode` change no number. Signals are handled where Python allows
it, in the main thread. One run at a time: a second one, in another thread, is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fastkd.errors import UserError, path_name
from fastkd.models import read_model
from fastkd.recipe import (
    AnyRecipe,
    FinetuneRecipe,
    Recipe,
    apply_overrides,
    parse_finetune_recipe,
    parse_recipe,
    read_tree,
)
from fastkd.reporting.report import print_evaluation, print_summary, write_report
from fastkd.training.bookkeeping import Callbacks
from fastkd.training.evaluate import Evaluation
from fastkd.training.evaluate_run import evaluate_run
from fastkd.training.loop import run_recipe
from fastkd.training.run_folder import RunFolder
from fastkd.training.session import quietened, session
from fastkd.training.usual_modes import usual_modes
from fastkd.types import AnyPath, Head

OnStep = Callable[[int, dict[str, Any]], None]
OnEvaluate = Callable[[int, Evaluation], None]


@dataclass(frozen=True)
class RunResult:
    """What a finished run left."""

    folder: Path
    """Where it was written, from the root: the folder that `evaluate` takes."""
    summary: dict[str, Any] = field(repr=False)
    """As in its `summary.json`."""
    head: Head = "none"
    """What stands on the student's blocks."""

    @property
    def losses_before(self) -> dict[str, float]:
        """Raw held-out losses before the first step, by label as in `attention/1-2`; of a run in
        stages those of its first, which may be others than `losses_after` has.

        Raises:
            UserError: of a lean run, which left this evaluation out, or one whose metrics lost it.
        """
        if self.summary["before"] is None:
            raise UserError(
                f"{self.folder} was not evaluated before its first step (run.lean), or its "
                "metrics.jsonl has lost that line"
            )
        return dict(self.summary["before"]["losses"])

    @property
    def losses_after(self) -> dict[str, float]:
        """Losses by label of the student that was exported: after the last step, or with
        `run.keep_best` at the best evaluation."""
        return dict(self.summary["after"]["losses"])

    @cached_property
    def student(self) -> PreTrainedModel:
        """The student, read from the folder that was exported: fp32, on the CPU, in eval mode."""
        folder = self._student_folder()
        with quietened(), usual_modes():
            model, _ = read_model(folder, f"student {folder}", torch.float32, None, self.head)
        return model.eval()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was exported with it."""
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self._student_folder())
        return found

    def _student_folder(self) -> str:
        # what is no folder would be asked for on the hub
        folder = (self.folder / "student").absolute()
        if not folder.is_dir():
            raise UserError(f"{folder} is not there; make the run again, or move it back")
        return str(folder)


def distill(
    recipe: AnyPath | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    quiet: bool = False,
    on_step: OnStep | None = None,
    on_evaluate: OnEvaluate | None = None,
    **dotted: Any,
) -> RunResult:
    """Distil a student as a recipe says, as `fastkd distill` does. Of several ranks every one calls
    this, not the first alone.

    Args:
        recipe: path of a YAML file, the same as a mapping, or a `Recipe`; it is not changed.
        overrides: values to replace by dotted key, as in `{"train.steps": 10}`.
        resume: continue the run in `run.output`, if there is one; a finished one is left alone.
        quiet: say nothing but warnings.
        on_step: called on rank 0 every `train.log_every` steps with the step and the line that
            `metrics.jsonl` has of it; what it raises ends the run, which can be resumed from its
            last checkpoint. Other ranks raise a `UserError` then that says what it was.
        on_evaluate: called on rank 0 after every held-out evaluation with the step and an
            `Evaluation`, likewise.
        dotted: more overrides, as in `distill(recipe, **{"train.steps": 10})`.

    Raises:
        UserError: anything that the caller can mend. What can be seen before the first step leaves
            no run behind; one that ends later, as of a loss that is no number, can be resumed from
            its last checkpoint.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
        LostRank: another rank is gone, hangs or does not call this.
    """
    if isinstance(recipe, FinetuneRecipe):
        raise UserError("recipe is a FinetuneRecipe, expected a Recipe; call fastkd.finetune")
    given = _tree(recipe), _together(overrides, dotted)
    callbacks = _callbacks(on_step, on_evaluate)
    parsed = parse_recipe(_replaced(*given), _name(recipe))
    return _run(parsed, parsed.student.head, resume, quiet, callbacks)


def finetune(
    recipe: AnyPath | Mapping[str, Any] | FinetuneRecipe,
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    quiet: bool = False,
    on_step: OnStep | None = None,
    on_evaluate: OnEvaluate | None = None,
    **dotted: Any,
) -> RunResult:
    """Train a model on the labels of a task, as `fastkd finetune` does; see `distill`. Of several
    ranks every one calls this, not the first alone.

    The result's `student` is the model that was trained.
    """
    if isinstance(recipe, Recipe):
        raise UserError("recipe is a Recipe, expected a FinetuneRecipe; call fastkd.distill")
    given = _tree(recipe), _together(overrides, dotted)
    callbacks = _callbacks(on_step, on_evaluate)
    parsed = parse_finetune_recipe(_replaced(*given), _name(recipe))
    return _run(parsed, parsed.task.kind, resume, quiet, callbacks)


def _run(
    recipe: AnyRecipe, head: Head, resume: bool, quiet: bool, callbacks: Callbacks
) -> RunResult:
    # the caller may go elsewhere
    folder = Path(recipe.run.output).absolute()
    with session(recipe, quiet=quiet) as (ranks, reporter):
        summary = run_recipe(
            recipe,
            ranks,
            resume=resume,
            reporter=reporter,
            report=write_report,
            callbacks=callbacks,
        )
        # the first rank has read the numbers, and every rank returns them as the file has them
        summary = ranks.from_main(lambda: json.loads(json.dumps(summary)))
        ranks.from_main(lambda: print_summary(summary, reporter))
    return RunResult(folder, summary, head)


def evaluate(
    run: AnyPath | RunResult,
    overrides: Mapping[str, Any] | None = None,
    *,
    quiet: bool = False,
    **dotted: Any,
) -> Evaluation:
    """Evaluate what a finished run made, and its teacher, on its held-out text or task, or on
    another. Of several ranks every one calls this, not the first alone.

    Args:
        run: its folder, or what `distill` or `finetune` returned.
        overrides: values of `data`, `task`, `teacher`, `train`, `evaluate` or of how the student
            attends (`student.attention`) to replace, by dotted key, as in
            `{"data.heldout": "other.txt"}`.
        quiet: print no table.
        dotted: more of them.

    Raises:
        UserError: the run is not finished, or an override does not fit.
        LostRank: another rank is gone, hangs or does not call this.
    """
    place = run.folder if isinstance(run, RunResult) else run
    folder = RunFolder(path_name(place, "run", "the folder of a finished run, or a RunResult"))
    given = _written(_together(overrides, dotted))
    with session(quiet=quiet) as (ranks, reporter):
        found = evaluate_run(folder, given, ranks)
        print_evaluation(found.as_dict(), reporter)
    return found


def _callbacks(on_step: OnStep | None, on_evaluate: OnEvaluate | None) -> Callbacks:
    for name, given in (("on_step", on_step), ("on_evaluate", on_evaluate)):
        if given is not None and not callable(given):
            raise UserError(f"{name} is a {type(given).__name__}, expected a function, or None")
    return Callbacks(on_step, on_evaluate)


def _together(overrides: Mapping[str, Any] | None, dotted: dict[str, Any]) -> dict[str, Any]:
    if overrides is not None and not isinstance(overrides, Mapping):
        raise UserError(
            f"overrides is a {type(overrides).__name__}, expected a mapping of dotted keys to "
            'values, as in {"train.steps": 10}'
        )
    return {**(overrides or {}), **dotted}


def _tree(recipe: AnyPath | Mapping[str, Any] | Recipe | FinetuneRecipe) -> dict[str, Any]:
    """The sections of a recipe, as a file would hold them."""
    if isinstance(recipe, Recipe | FinetuneRecipe):
        return recipe.model_dump(mode="json")
    if isinstance(recipe, Mapping):
        tree: dict[str, Any] = json.loads(_json(dict(recipe), "recipe"))
        return tree
    if isinstance(recipe, str | os.PathLike):
        return read_tree(os.fspath(recipe))
    raise UserError(
        f"recipe is a {type(recipe).__name__}, expected the path of a YAML file, a mapping of "
        "sections, or a fastkd.Recipe"
    )


def _name(recipe: AnyPath | Mapping[str, Any] | Recipe | FinetuneRecipe) -> str:
    """What stands before every complaint about a recipe."""
    return os.fspath(recipe) if isinstance(recipe, str | os.PathLike) else "recipe"


def _replaced(tree: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    apply_overrides(tree, _written(overrides))
    return tree


def _written(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as the command line spells them."""
    return [f"{key}={_json(value, f'override {key}')}" for key, value in overrides.items()]


def _json(value: Any, what: str) -> str:
    """A value as text that YAML reads; a path is its name.

    Raises:
        UserError: no file could hold it.
    """

    def named(given: Any) -> str:
        name: str = os.fspath(given)
        return name

    try:
        return json.dumps(value, default=named, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{what}: {error}; give what a YAML file could hold: text, numbers, lists, mappings"
        ) from error
