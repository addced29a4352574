"""How a search draws its candidates: Optuna's samplers over the axes and spaces of a study."""

from __future__ import annotations

import warnings
from typing import cast

import optuna
from optuna.trial import Trial

from fastkd.study.naming import Level
from fastkd.study.plan import Plan
from fastkd.study.spec import Search, Space

# fewer candidates say nothing about importance
IMPORTANCE_TRIALS = 10


def make_sampler(search: Search, drawn: int) -> optuna.samplers.BaseSampler:
    """The sampler of the next candidate.

    Args:
        search: section of the study.
        drawn: how many candidates there are already. Each gets a sampler of its own: two processes
            that start from the same seed must not draw the same numbers.
    """
    # NumPy takes 32 bits
    seed = (search.seed * 100_003 + drawn) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        if search.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)


def make_pruner(search: Search) -> optuna.pruners.BasePruner:
    """The pruner of a search."""
    if search.pruner == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=search.startup_trials)


def draw(trial: Trial, plan: Plan) -> dict[str, Level]:
    """The level of every axis and space for a trial; those that it has already stay."""
    params: dict[str, Level] = {}
    for axis, levels in plan.axes.items():
        params[axis] = trial.suggest_categorical(axis, [str(level) for level in levels])
    for name, space in plan.spec.spaces.items():
        params[name] = _draw(trial, name, space)
    return params


def _draw(trial: Trial, name: str, space: Space) -> Level:
    if space.values is not None:
        # Optuna's choices may be None, ours can't
        return cast("Level", trial.suggest_categorical(name, space.values))
    assert space.low is not None and space.high is not None
    if space.integer:
        return trial.suggest_int(name, round(space.low), round(space.high), log=space.log)
    return trial.suggest_float(name, space.low, space.high, log=space.log)


def importances(study: optuna.Study) -> dict[str, dict[str, float]]:
    """How much each axis and space of a search matters, by Optuna's evaluators.

    fANOVA (Hutter et al., ICML 2014) explains the variance over the whole space; PED-ANOVA
    (Watanabe et al., arXiv 2304.10255) what makes a candidate one of the best tenth.

    Returns:
        Shares that add up to 1, by name, by evaluator; empty with fewer than `IMPORTANCE_TRIALS`
        finished candidates, or where all score the same.
    """
    finished = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(finished) < IMPORTANCE_TRIALS or len({trial.value for trial in finished}) < 2:
        return {}
    evaluators: dict[str, optuna.importance.BaseImportanceEvaluator] = {
        "fANOVA": optuna.importance.FanovaImportanceEvaluator(seed=0),
        "PED-ANOVA": optuna.importance.PedAnovaImportanceEvaluator(),
    }
    return {
        name: optuna.importance.get_param_importances(study, evaluator=evaluator)
        for name, evaluator in evaluators.items()
    }
