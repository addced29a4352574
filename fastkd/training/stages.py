"""A recipe with stages: what is checked before the first and each later one, and what the last one
leaves."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.files.disk import disk_errors, replace_folder, settle, temporary_of
from fastkd.models import noted_models
from fastkd.recipe import AnyRecipe, Recipe, each_stage
from fastkd.reporting.console import Reporter
from fastkd.training.card import write_card
from fastkd.training.rehearsal import check_recipe
from fastkd.training.run_folder import RunFolder
from fastkd.training.same_data import judged_alike, require_same_data, shared_parts
from fastkd.training.setup import Run
from fastkd.training.summary import worsened_scores

_ADDED_UP = ("steps", "seconds", "train_examples", "train_rows", "train_tokens")


@dataclass(frozen=True)
class Stage:
    """A stage that is to be trained, of a run of several."""

    whole: RunFolder
    recipe: Recipe
    """Recipe of the whole run."""
    number: int
    """From 1."""
    done: Sequence[Mapping[str, Any]]
    """Summaries of the stages before it."""

    @property
    def first_folder(self) -> Path | None:
        """Folder of the first stage, if this is a later one."""
        return None if self.number == 1 else stage_folders(self.recipe)[0].path

    def claim(self, run: Run) -> None:
        """See that a later stage reads what the first one did, and claim the whole run's folder.

        Raises:
            UserError: data that both read has changed since.
        """
        if self.number > 1:
            first, this = each_stage(self.recipe)[0], each_stage(self.recipe)[self.number - 1]
            found = run.data_digests
            require_same_data(
                self.done[0].get("data_digests", {}),
                {part: found[part] for part in shared_parts(first, this, found)},
                str(self.first_folder),
                "put back what was there, or give another run.output",
            )
        self.whole.create(self.recipe)

    def take_over(self) -> None:
        """Let the whole run go on under the recipe that it is continued with."""
        self.whole.take_over(self.recipe)


def check_later(stages: list[Recipe], ranks: Ranks, reporter: Reporter) -> None:
    """See that the stages after the one that is next can run, before that one takes its time.

    Each starts from a student that isn't there yet: one of the same shape, as the first stage
    starts with, stands in for it.
    """

    def find() -> list[int]:
        done = [RunFolder(stage.run.output).summary.is_file() for stage in stages]
        return [number for number, is_done in enumerate(done) if not is_done][1:]

    for number in ranks.from_main(find):
        reporter.say(f"checking stage {number + 1} of {len(stages)}")
        stage = stages[number].model_copy(update={"student": stages[0].student})
        try:
            check_recipe(stage, ranks, progress=not reporter.console.quiet)
        except UserError as error:
            raise UserError(f"stages.{number + 1}: {error}") from error


def stage_folders(recipe: AnyRecipe) -> list[RunFolder]:
    """The folders of all stages of a recipe; its own where it has none."""
    return [RunFolder(stage.run.output) for stage in each_stage(recipe)]


def finish_stages(recipe: Recipe, summaries: list[dict[str, Any]], ranks: Ranks) -> dict[str, Any]:
    """Let the run's folder hold what its stages came to; its summary, on every rank."""
    folder = RunFolder(recipe.run.output)
    summary = join_summaries(folder, summaries)

    def finish() -> None:
        folder.take_over(recipe)
        stages = stage_folders(recipe)
        _take_student(folder, stages[-1])
        if recipe.run.predictions:
            folder.write_predictions(stages[-1].predictions.read_bytes())
        # the first stage started from the recipe's models, a later one from a stage
        if not recipe.run.lean:
            write_card(folder, recipe, summary, noted_models(stages[0].path))
        # last, because it is what makes the run finished
        folder.write_summary(summary)

    ranks.from_main(finish)
    return summary


def join_summaries(run: RunFolder, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary of a run of several stages, in order: steps, time and data of all, the largest
    peak of memory, what was before the first, and all else of the last."""
    last = summaries[-1]
    sums = {key: sum(s[key] for s in summaries) for key in _ADDED_UP if key in last}
    # the peak of another kind of memory compares with none here
    alike = (s for s in summaries if s["peak_memory_of"] == last["peak_memory_of"])
    return {
        **last,
        **sums,
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in alike),
        "run": str(run.path),
        "before": summaries[0]["before"],
        # losses of different stages don't compare, so each is held against itself
        "worse": [
            f"stage {number}: {said}"
            for number, stage in enumerate(summaries, start=1)
            for said in stage.get("worse", [])
        ]
        + _worse_in_the_end(summaries),
        "stages": summaries,
    }


def _worse_in_the_end(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the last stage left worse than the first found it, of what means the same in all stages;
    the losses of a stage are its own, and so are the tokens that it masks."""
    first, last = summaries[0], summaries[-1]
    before, after = first["before"], last["after"]
    digests = (stage.get("data_digests", {}) for stage in (first, last))
    if before is None or after is None or not judged_alike(*digests):
        return []
    own = {"pseudo_perplexity"}
    if _metrics(before) != _metrics(after):
        own.add("score")
    found = worsened_scores(
        *({k: v for k, v in x.items() if k not in own} for x in (before, after))
    )
    return [f"stages 1 to {len(summaries)}: {said}" for said in found]


def _metrics(judged: Mapping[str, Any]) -> dict[str, list[str]]:
    """What a score is the mean of."""
    return {name: sorted(values) for name, values in judged.get("scores", {}).items()}


def _take_student(run: RunFolder, last: RunFolder) -> None:
    folder = temporary_of(run.student)
    with disk_errors(run.path):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(last.student, folder)
        settle(folder)
        replace_folder(folder, run.student)
