"""What is disturbed: commands on tiny models, and what an undisturbed one leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import make_recipe, read_losses
from tiny_training import save_classifier, save_encoder, write_recipe, write_task

# dropout makes the random numbers matter
_STUDENT = {"layers": 2, "hidden_size": 24, "intermediate_size": 48, "dropout": 0.1}
_KEEPING = {"checkpoint_every": 2, "keep_checkpoints": 2}
# a sum of two ranks is rounded otherwise, and Adam divides by small numbers
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Scenario:
    """A command.

    Args:
        make: writes models, data and a recipe into a folder; the recipe.
        arguments: the command, of a recipe and the folder that it works in.
        again: what is added to continue it.
        ranks: processes.
        then: processes that continue it, where those are not as many.
        rounding: relative difference of losses, and absolute one of weights, that other numbers of
            ranks may make; else every bit is the same.
        weight: how often it is drawn.
    """

    make: Callable[[Path], Path]
    arguments: Callable[[Path, Path], list[str]]
    again: str = "--resume"
    ranks: int = 1
    then: int | None = None
    rounding: float = 0.0
    weight: int = 3


@dataclass(frozen=True)
class Result:
    """What a command came to: all that a later one could depend on."""

    weights: dict[str, torch.Tensor]
    losses: dict[str, list[dict[str, float]]]
    printed: str = ""

    def difference(self, other: Result, rounding: float = 0.0) -> str:
        """The first difference, in words; empty where every bit is the same, or but for rounding
        that is allowed for."""
        if self.weights.keys() != other.weights.keys() or self.losses.keys() != other.losses.keys():
            names = {*self.weights, *self.losses} ^ {*other.weights, *other.losses}
            return f"other files or tensors: {', '.join(sorted(names)[:3])}"
        for name, tensor in self.weights.items():
            if not _same(tensor, other.weights[name], rounding):
                return f"other values in {name}"
        for name, losses in self.losses.items():
            if not _same_losses(losses, other.losses[name], rounding):
                return f"other losses in {name}"
        return "" if self.printed == other.printed else "other blocks in the cache"


def _same(mine: torch.Tensor, other: torch.Tensor, rounding: float) -> bool:
    if not rounding:
        return torch.equal(mine, other)
    return mine.shape == other.shape and torch.allclose(mine, other, rtol=0, atol=rounding)


def _same_losses(
    mine: list[dict[str, float]], other: list[dict[str, float]], rounding: float
) -> bool:
    if not rounding:
        return mine == other
    return [each.keys() for each in mine] == [each.keys() for each in other] and all(
        math.isclose(one[name], two[name], rel_tol=rounding)
        for one, two in zip(mine, other, strict=True)
        for name in one
    )


def read_result(work: Path, printed: str) -> Result:
    """Of the command that worked in a folder: students, projections and losses of every run."""
    weights = {}
    for path in sorted(work.rglob("*.safetensors")):
        if "checkpoints" not in path.parts:
            found = load_file(path)
            weights |= {f"{path.relative_to(work)}: {name}": found[name] for name in found}
    runs = [path.parent for path in sorted(work.rglob("metrics.jsonl"))]
    return Result(weights, {str(run.relative_to(work)): read_losses(run) for run in runs}, printed)


def _text(folder: Path) -> Path:
    return make_recipe(folder, student=_STUDENT, train=_KEEPING)


def _moving(folder: Path) -> Path:
    """Without dropout, whose draws other ranks don't repeat."""
    return make_recipe(folder, student={**_STUDENT, "dropout": 0.0}, train=_KEEPING)


def _task(folder: Path) -> Path:
    write_task(folder / "task")
    save_classifier(folder / "classifier")
    save_encoder(folder / "encoder")
    return folder


def _stages(folder: Path) -> Path:
    stages = [{"train": {"steps": 3}}, {"losses": {"logits": {}}, "train": {"steps": 3}}]
    recipe = write_recipe(_task(folder), "staged", losses={"hidden": {}}, stages=stages)
    tree = yaml.safe_load(recipe.read_text())
    tree["train"] |= _KEEPING
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


def _tuning(folder: Path) -> Path:
    return write_recipe(_task(folder), "tuned", train=_KEEPING)


def _study(folder: Path) -> Path:
    """The recipe of its runs: the study is written where it works."""
    return write_recipe(_task(folder), "run", losses={"hidden": {}}, train={"steps": 3})


def _study_arguments(recipe: Path, work: Path) -> list[str]:
    tree = yaml.safe_load(recipe.read_text())
    tree["task"]["cache"] = str(work / "cache")
    study = {
        "name": "soak",
        "output": str(work / "out"),
        "recipe": tree,
        "axes": {"mapping": {name: {"layer_map": name} for name in ("last", "first")}},
        # two runs take long enough
        "skip": [{"mapping": "last"}],
        "seeds": 2,
        "metric": {"path": "after.score", "direction": "maximize", "heldout": "score"},
    }
    # beside the folder that is damaged: it is the user's own
    path = work.with_name("study.yaml")
    path.write_text(yaml.safe_dump(study))
    return ["study", str(path)]


def _run_arguments(command: str, section: str) -> Callable[[Path, Path], list[str]]:
    def arguments(recipe: Path, work: Path) -> list[str]:
        return [command, str(recipe), f"run.output={work}/run", f"{section}.cache={work}/cache"]

    return arguments


def _cache_arguments(recipe: Path, work: Path) -> list[str]:
    return ["cache", str(recipe), f"data.cache={work}/cache", "data.workers=2"]


SCENARIOS = {
    "distill": Scenario(_text, _run_arguments("distill", "data"), weight=6),
    "two-ranks": Scenario(_text, _run_arguments("distill", "data"), ranks=2, weight=2),
    "fewer-ranks": Scenario(
        _moving, _run_arguments("distill", "data"), ranks=2, then=1, rounding=_ROUNDING, weight=2
    ),
    "more-ranks": Scenario(
        _moving, _run_arguments("distill", "data"), then=2, rounding=_ROUNDING, weight=2
    ),
    "stages": Scenario(_stages, _run_arguments("distill", "task"), weight=4),
    "finetune": Scenario(_tuning, _run_arguments("finetune", "task"), weight=4),
    # a run that was killed has failed
    "study": Scenario(_study, _study_arguments, again="--retry-failed", weight=2),
    "cache": Scenario(_text, _cache_arguments, again="", weight=3),
}
