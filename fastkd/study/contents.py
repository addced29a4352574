"""What a finished run is worth, if runs that name the same data and models read the same bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from fastkd.errors import UserError
from fastkd.models.digests import NOTE, model_sources, noted_models
from fastkd.recipe import AnyRecipe, each_stage
from fastkd.study.metric import read_metric
from fastkd.study.plan import Plan, Run
from fastkd.training.run_folder import RunFolder
from fastkd.training.same_data import require_same_data, shared_parts
from fastkd.training.stages import stage_folders


def read_value(plan: Plan, run: Run, failed: Collection[str]) -> float | str:
    """The metric of a finished run, or why it has none.

    Args:
        plan: of the study.
        run: a run with a summary.
        failed: keys of runs that others are not held against.
    """
    value = read_metric(plan.place(run).run, plan.spec.metric.path)
    if isinstance(value, str):
        return value
    other = other_content(plan, run, failed)
    return value if other is None else other


def other_content(plan: Plan, run: Run, failed: Collection[str] = ()) -> str | None:
    """What a finished run has read as other bytes than the first finished ones of its task and of
    its condition, which name the same and have not failed; `None` where it hasn't."""
    for other in _beside(plan, run, failed):
        recipes = plan.recipe(run), plan.recipe(other)
        remedy = (
            f"put back what was there, remove {plan.place(run).folder} and run it again with "
            "--retry-failed"
        )
        try:
            _require_same_data(plan, run, other, remedy)
        except UserError as error:
            return str(error)
        mine, theirs = map(_noted, recipes)
        sources, before = map(model_sources, recipes)
        for field, files in mine.items():
            if sources[field] != before.get(field):
                continue
            for name, digest in files.items():
                if theirs.get(field, {}).get(name, digest) != digest:
                    called = sources[field].name
                    return f"{field} {called}: {name} is not what {other.key} read; {remedy}"
    return None


def _beside(plan: Plan, run: Run, failed: Collection[str]) -> Iterator[Run]:
    finished = [
        other
        for other in plan.all_runs()
        if other.task == run.task
        and other.key != run.key
        and other.key not in failed
        and RunFolder(plan.place(other).run).summary.is_file()
    ]
    alike = [other for other in finished if other.condition.name == run.condition.name]
    yield from {other.key: other for other in (*finished[:1], *alike[:1])}.values()


def _require_same_data(plan: Plan, run: Run, other: Run, remedy: str) -> None:
    mine, theirs = (each_stage(plan.recipe(one))[-1] for one in (run, other))
    # another tokenizer, or type of model, reads the same text otherwise
    if model_sources(mine) != model_sources(theirs):
        return
    found, noted = (_data_digests(plan, one) for one in (run, other))
    shared = shared_parts(mine, theirs, found)
    require_same_data(noted, {part: found[part] for part in shared}, other.key, remedy)


def _data_digests(plan: Plan, run: Run) -> Mapping[str, str]:
    summary = RunFolder(plan.place(run).run).read_summary()
    return {} if summary is None else summary["data_digests"]


def _noted(recipe: AnyRecipe) -> Mapping[str, Mapping[str, str]]:
    first = stage_folders(recipe)[0].path
    return noted_models(first) if (first / NOTE).exists() else {}
