"""Evaluations that decide: when a run stops, and which of its students is handed on.

Numbers of an evaluation are told apart by name: `total`, the label of a loss, `score` of a task and
what else `DataModule.headlines` names, `perplexity`. Those after the first step count; the student
that a run starts with was not trained. The best student's weights wait in memory on the first rank
and are part of every checkpoint: what a run is continued from is then all there is to know.
"""

from __future__ import annotations

import operator
from collections import ChainMap
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from fastkd.errors import UserError
from fastkd.recipe import AnyRecipe, Recipe
from fastkd.reporting.console import Reporter
from fastkd.section import did_you_mean
from fastkd.training.engine import whole_weights
from fastkd.training.evaluate import Evaluation
from fastkd.training.perplexity import perplexity_name
from fastkd.training.setup import Run
from fastkd.types import Side


def metric_directions(run: Run) -> dict[str, bool]:
    """Every number that can decide, by name, and whether the larger one is the better; collective
    under ZeRO-3."""
    objective = run.objective
    found = dict.fromkeys((*objective.labels, "total"), False)
    name = perplexity_name(objective)
    if name is not None:
        found[name] = False
    found |= dict.fromkeys(run.datamodule.headlines, True)
    dims = {None if (made := run.embedding(side)) is None else made.dim for side in get_args(Side)}
    if len(dims) > 1 or None in dims:
        # there is nothing to compare
        found.pop("sentence_cosine", None)
    evaluate = run.recipe.evaluate if isinstance(run.recipe, Recipe) else None
    return found if evaluate is None else found | dict.fromkeys(evaluate.names, True)


def check_metrics(run: Run) -> None:
    """See that an evaluation finds the numbers that decide.

    Raises:
        UserError: naming one that it doesn't, and those that it does.
    """
    chosen = _chosen(run.recipe)
    known = metric_directions(run) if chosen else {}
    for field, name in chosen.items():
        if name not in known:
            raise UserError(
                f"{field} is {name!r}, which no evaluation of this run finds; "
                f"{did_you_mean(name, known)}expected one of {', '.join(known)}"
            )


def _chosen(recipe: AnyRecipe) -> dict[str, str]:
    stopping, kept = recipe.train.early_stopping, recipe.run.keep_best
    found = {} if stopping is None else {"train.early_stopping.metric": stopping.metric}
    return found if kept is None else {**found, "run.keep_best": kept}


@dataclass
class Best:
    """The best of some evaluations by one number."""

    metric: str
    larger: bool
    """Whether the larger number is the better."""
    least: float = 0.0
    """By how much a better one is better, at least."""
    value: float | None = None
    step: int = 0
    waited: int = 0
    """Evaluations since then."""

    def observe(self, step: int, value: float) -> bool:
        """Take in an evaluation; whether it is the best so far."""
        better = operator.gt if self.larger else operator.lt
        edge = self.least if self.larger else -self.least
        if self.value is None or better(value, self.value + edge):
            self.value, self.step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "step": self.step, "waited": self.waited}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.value, self.step, self.waited = state["value"], state["step"], state["waited"]


class Steering:
    """What a run's evaluations decide; every rank holds one, and all decide alike."""

    def __init__(self, run: Run) -> None:
        self._run = run
        stopping, kept = run.recipe.train.early_stopping, run.recipe.run.keep_best
        known = metric_directions(run) if stopping or kept else {}
        self._patience = 0 if stopping is None else stopping.patience
        self._stopping = (
            None
            if stopping is None
            else Best(stopping.metric, known[stopping.metric], stopping.minimum_change)
        )
        self._best = None if kept is None else Best(kept, known[kept])
        self.weights: dict[str, Tensor] | None = None
        """The best student's parameters and projections by their names in the module, on the CPU of
        the first rank."""

    @property
    def may_stop(self) -> bool:
        """Whether an evaluation may be the last."""
        return self._stopping is not None

    @property
    def is_over(self) -> bool:
        """Whether nothing has become better for so many evaluations that the run ends."""
        return self._stopping is not None and self._stopping.waited >= self._patience

    def observe(self, step: int, evaluation: Evaluation) -> None:
        """Take in an evaluation; collective over the ranks.

        Raises:
            UserError: it has no such number.
        """
        for best in (self._stopping, self._best):
            if best is None:
                continue
            value = metric_value(evaluation, best.metric)
            # one decision, whatever the last bits of a sum are elsewhere
            value = self._run.ranks.from_main(lambda value=value: value)  # type: ignore[misc]
            if step and best.observe(step, value) and best is self._best:
                self._keep()

    def exported_step(self, last: int) -> int:
        """The step whose student is handed on, of a run that made so many."""
        return last if self._best is None else self._best.step

    def summary(self, last: int) -> dict[str, Any]:
        """For the summary of a run that ended after a step."""
        found: dict[str, Any] = {"exported_step": self.exported_step(last)}
        if self._best is not None:
            found["kept_best"] = {"metric": self._best.metric, "value": self._best.value}
        if self._stopping is not None:
            found["stopped_early"] = self.is_over and last < self._run.recipe.train.steps
        return found

    def describe(self, step: int, reporter: Reporter) -> None:
        """Say that the run stops, where it does."""
        best = self._stopping
        if best is not None and self.is_over:
            reporter.say(
                f"stopped after step {step}: no better {best.metric} than {best.value:.4g} of step "
                f"{best.step} in {best.waited} evaluations"
            )

    def state(self) -> dict[str, Any]:
        """For a checkpoint; weights on the first rank, which writes it."""
        found: dict[str, Any] = {}
        if self._stopping is not None:
            found["stopping"] = self._stopping.state()
        if self._best is not None:
            found["best"] = {**self._best.state(), "weights": self.weights}
        return found

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        if self._stopping is not None:
            self._stopping.load(state["stopping"])
        if self._best is not None:
            self._best.load(state["best"])
            self.weights = state["best"]["weights"] if self._run.ranks.is_main else None

    def _keep(self) -> None:
        engine, module = self._run.engine, self._run.module
        with whole_weights(engine, module.parameters()):
            if self._run.ranks.is_main:
                self.weights = {
                    name: parameter.detach().to("cpu", copy=True)
                    for name, parameter in module.named_parameters()
                }


def metric_value(evaluation: Evaluation, name: str) -> float:
    """A number of an evaluation by its name, see `metric_directions`.

    Raises:
        UserError: it was not computed.
    """
    judged = evaluation.judged
    sections = [judged.get(name, {}) for name in ("agreement", "pairs", "mteb")]
    numbers = dict(ChainMap(evaluation.losses, *sections, judged))
    numbers["total"] = evaluation.total
    value = numbers.get(name)
    if value is None:
        raise UserError(
            f"{name} was to decide, but this evaluation has no such number; give another metric to "
            "train.early_stopping or run.keep_best"
        )
    return float(value)
