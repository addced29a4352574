"""The storage of a study: which work there is, who does it, what it came to.

Two Optuna studies share one SQLite file. `NAME` holds a search's candidates, each a trial that is
run on all tasks with all seeds and scored by its mean. `NAME/grid` holds what is known beforehand,
one trial a run: all of a grid, or what a search is compared with. A trial in the state RUNNING
whose claim is free was left by a worker that ended, and is the next to be continued.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from fastkd.errors import UserError, one_line
from fastkd.section import LONGEST_RUN
from fastkd.study.contents import read_value
from fastkd.study.locks import Claim, alone
from fastkd.study.metric import read_metric
from fastkd.study.naming import candidate_name
from fastkd.study.opening import check_file, check_same, open_file
from fastkd.study.plan import Condition, Plan, Run, digest
from fastkd.study.search import draw, make_pruner, make_sampler
from fastkd.training.run_folder import RunFolder

State = Literal["waiting", "running", "finished", "pruned", "failed"]
STATES: dict[TrialState, State] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Record:
    """What is known of one run."""

    run: Run
    state: State
    value: float | None = None
    seconds: float | None = None
    message: str = ""


@dataclass
class Work:
    """A trial that this worker has claimed."""

    study: optuna.Study
    trial: Trial
    claim: Claim
    condition: Condition
    runs: list[Run]

    @property
    def name(self) -> str:
        """What the trial is called in messages."""
        return self.runs[0].key if len(self.runs) == 1 else self.condition.name


class Store:
    """The storage of one study, open.

    Args:
        plan: the study.

    Raises:
        UserError: the file holds another study, this one with other contents, or no study at all.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.path = plan.output / "study.db"
        self._runs = {run.key: run for run in plan.all_runs()}
        with self._alone():
            check_file(self.path, plan.output)
            self._open()

    def add_work(self, *, retry_failed: bool = False) -> None:
        """Queue what is not in the storage yet and, if asked to, what failed.

        Raises:
            UserError: a run is there with another recipe.
        """
        with self._alone():
            known = self._newest(self.grid)
            for key, trial in known.items():
                if key not in self._runs and not trial.state.is_finished():
                    raise UserError(
                        f"{self.path} waits for {key}, which {self.plan.path} no longer has; put "
                        "it back, or give the study another output"
                    )
            self.check_recipes()
            for key, run in self._runs.items():
                if key not in known:
                    self._add(self.grid, {"name": key, "recipe": self.plan.digest(run)})
            if self.search is not None and self.plan.spec.search is not None:
                candidates = self._newest(self.search)
                is_grid = self.plan.spec.search.sampler == "grid"
                for number, params in enumerate(self.plan.combinations() if is_grid else ()):
                    # whoever queued them may have been stopped on the way
                    if (name := candidate_name(number)) not in candidates:
                        self.search.enqueue_trial(params, {"name": name})
                known |= candidates
            for trial in known.values() if retry_failed else ():
                if trial.state == TrialState.FAIL:
                    study = self.grid if trial.user_attrs["name"] in self._runs else self.search
                    assert study is not None
                    self._add(study, {**trial.user_attrs, "message": ""}, trial)

    def check_recipes(self) -> None:
        """See that the runs that are there are those of the study file.

        Raises:
            UserError: a run is there with another recipe.
        """
        known = self._newest(self.grid)
        for key, run in self._runs.items():
            if key in known and known[key].user_attrs["recipe"] != self.plan.digest(run):
                raise UserError(
                    f"{self.plan.path}: {key} was run with another recipe before; give the "
                    "condition another name, or the study another output"
                )

    def take(self) -> Work | None:
        """The next piece of work, claimed; `None` while there is none to be had."""
        with self._alone():
            for study in self._studies():
                # once: every read has all trials that are not over
                trials = study.get_trials(deepcopy=False)
                for frozen in trials:
                    if frozen.state != TrialState.RUNNING:
                        continue
                    claim = Claim.take(self._claim_path(frozen))
                    if claim is None:
                        continue
                    # whoever held it may have finished since we looked
                    if study.get_trials(False)[frozen.number].state == TrialState.RUNNING:
                        return self._work(study, self._continued(study, frozen), claim)
                    claim.release()
                trial = self._next(study, trials)
                if trial is not None:
                    if "name" not in trial.user_attrs:
                        trial.set_user_attr("name", candidate_name(trial.number))
                    claim = Claim.take(self._claim_path(trial))
                    assert claim, "a trial that was just asked for is nobody's"
                    return self._work(study, trial, claim)
        return None

    def _next(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> Trial | None:
        """The next trial that nobody has begun, of all of a study; it runs from now on."""
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        if study is self.grid:
            if not waiting:
                return None
            # as `ask` has it, which would read all trials again and has nothing to draw here
            number = waiting[0]._trial_id
            free = self._storage.set_trial_state_values(number, TrialState.RUNNING)
            assert free, "nobody else takes one meanwhile"
            return Trial(study, number)
        if not waiting and not self._wants_more(study, trials):
            return None
        self._seed(study, waiting[0].number if waiting else len(trials))
        return study.ask()

    def _continued(self, study: optuna.Study, frozen: FrozenTrial) -> Trial:
        """A trial that was begun, maybe before it had all its levels: those that it lacks are drawn
        as if it had not been stopped."""
        if study is self.grid:
            return Trial(study, frozen._trial_id)
        self._seed(study, frozen.number)
        trial = Trial(study, frozen._trial_id)
        for name, distribution in frozen.distributions.items():
            if not distribution.single():
                study.sampler.sample_independent(study, frozen, name, distribution)
        return trial

    def _seed(self, search: optuna.Study, number: int) -> None:
        """Let a search draw what the candidate of a number is."""
        assert self.plan.spec.search is not None, "the other study is the search's"
        search.sampler = make_sampler(self.plan.spec.search, number)

    def begun_elsewhere(self) -> list[str]:
        """Trials under way that another process took, for people."""
        found = []
        for study in self._studies():
            for trial in study.get_trials(False, (TrialState.RUNNING,)):
                process = Claim.taken_elsewhere(self._claim_path(trial))
                if process is not None:
                    found.append(f"{_name(trial)} (process {process})")
        return found

    def is_done(self) -> bool:
        """Whether nothing waits or runs, here or elsewhere."""
        for study in self._studies():
            trials = study.get_trials(deepcopy=False)
            over = all(trial.state.is_finished() for trial in trials)
            if not over or self._wants_more(study, trials):
                return False
        return True

    def counts(self) -> tuple[int, int]:
        """Trials that are over, and all that there will be."""
        done = total = 0
        for study in self._studies():
            names = self._newest(study)
            done += sum(trial.state.is_finished() for trial in names.values())
            total += self._planned(study, len(names))
        return done, total

    def run_counts(self) -> tuple[int, int]:
        """Runs that are over, and all that there will be; a candidate is several."""
        done = total = 0
        for study in self._studies():
            names = self._newest(study)
            each = 1 if study is self.grid else len(self.plan.tasks) * len(self.plan.spec.seeds)
            for trial in names.values():
                scored = len(trial.user_attrs.get("scores", {}))
                done += each if trial.state.is_finished() else scored
            total += each * self._planned(study, len(names))
        return done, total

    def has_scores(self) -> bool:
        """Whether any run of the study has a value."""
        return any(
            trial.user_attrs.get("scores")
            for study in self._studies()
            for trial in self._newest(study).values()
        )

    def failed(self) -> set[str]:
        """Keys of the runs known beforehand that failed."""
        trials = self._newest(self.grid)
        return {name for name, trial in trials.items() if trial.state == TrialState.FAIL}

    def has_score(self, work: Work, run: Run) -> bool:
        """Whether one of a trial's runs has a value already."""
        return _short(run) in work.trial.user_attrs.get("scores", {})

    def score(self, work: Work, run: Run, value: float, seconds: float) -> None:
        """Note the value of one of a trial's runs."""
        scores = work.trial.user_attrs.get("scores", {})
        work.trial.set_user_attr("scores", {**scores, _short(run): [value, seconds]})

    def finish(self, work: Work) -> None:
        """Close a trial all of whose runs have values: it is worth their mean."""
        scores = work.trial.user_attrs["scores"]
        value = sum(value for value, _ in scores.values()) / len(scores)
        work.study.tell(work.trial, value)

    def fail(self, work: Work, message: str) -> None:
        """Close a trial that can't be finished."""
        work.trial.set_user_attr("message", message)
        work.study.tell(work.trial, state=TrialState.FAIL)

    def prune(self, work: Work) -> None:
        """Close a trial that is not worth finishing."""
        work.study.tell(work.trial, state=TrialState.PRUNED)

    def report(self, work: Work, run: Run, values: Mapping[int, float]) -> bool:
        """Note held-out values of a run by step, and whether the trial should be pruned.

        Args:
            work: the trial.
            run: one of its runs.
            values: held-out value by step.
        """
        # the same number means the same step of the same task and seed in every trial
        first = work.runs.index(run) * LONGEST_RUN
        known = self._frozen(work).intermediate_values
        for step, value in values.items():
            if first + step not in known:
                work.trial.report(value, first + step)
        frozen = self._frozen(work)
        # the pruner takes the best so far, and those of other tasks don't compare with this run's
        frozen.intermediate_values = {
            step: value
            for step, value in frozen.intermediate_values.items()
            if first <= step < first + LONGEST_RUN
        }
        return bool(frozen.intermediate_values) and work.study.pruner.prune(work.study, frozen)

    def records(self) -> list[Record]:
        """Every run of the study as the file has it now."""
        found: list[Record] = []
        grid = self._newest(self.grid)
        for key, run in self._runs.items():
            found += _records(grid.get(key), [run])
        for name, trial in self._newest(self.search).items() if self.search else ():
            if trial.params:
                runs = self.plan.runs(self.plan.candidate(name, trial.params))
                found += _records(trial, runs)
        return found

    def _open(self) -> None:
        spec = self.plan.spec
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            storage = open_file(self.path)
            names = {s.study_name for s in optuna.get_all_study_summaries(storage)}
        except RuntimeError as error:
            raise UserError(
                f"{self.path} is of another version of Optuna ({one_line(error, None)}); "
                "upgrade it with `optuna storage upgrade`, or give the study another output"
            ) from error
        grid, search = f"{spec.name}/grid", spec.name
        if foreign := names - {grid, search}:
            raise UserError(
                f"{self.path} holds the study {sorted(foreign)[0].removesuffix('/grid')!r}, not "
                f"{spec.name!r}; give the study its own name back, or another output"
            )
        self._storage = storage
        direction = spec.metric.direction
        options: dict[str, Any] = {"storage": storage, "direction": direction}
        self.grid = optuna.create_study(study_name=grid, load_if_exists=True, **options)
        self.search: optuna.Study | None = None
        if spec.search is not None:
            pruner = make_pruner(spec.search)
            self.search = optuna.create_study(
                study_name=search, load_if_exists=True, pruner=pruner, **options
            )
        if check_same(self.grid, self.path, self._fixed(), spec.metric.direction, self.search):
            self._read_again()

    def _read_again(self) -> None:
        """Take another number from the summaries of runs that are over, which stay as they are.

        Raises:
            UserError: a run is under way, whose worker reads the number as it was.
        """
        for study in self._studies():
            for trial in study.get_trials(False, (TrialState.RUNNING,)):
                claim = Claim.take(self._claim_path(trial))
                if claim is None:
                    raise UserError(
                        f"{self.path}: {_name(trial)} is under way by the metric as it was; stop "
                        "the process that runs it, and run this again"
                    )
                claim.release()
        self._read_grid_again()
        for study in self._studies():
            for trial in study.get_trials(False, (TrialState.WAITING, TrialState.RUNNING)):
                if trial.user_attrs.get("scores"):
                    Trial(study, trial._trial_id).set_user_attr("scores", {})
        if self.search is not None:
            self._forget_candidates(self.search)
        self.grid.set_user_attr("fixed", self._fixed())

    def _read_grid_again(self) -> None:
        failed = self.failed()
        for name, trial in self._newest(self.grid).items():
            run = self._runs.get(name)
            if run is None or not trial.state.is_finished():
                continue
            attributes = {"name": name, "recipe": trial.user_attrs["recipe"]}
            folder = self.plan.place(run).run
            if not RunFolder(folder).summary.is_file():
                if trial.state == TrialState.COMPLETE:
                    # nothing is left to read
                    self._add(self.grid, attributes)
                continue
            # one that has a value has read what the others have
            is_known = trial.state == TrialState.COMPLETE
            path = self.plan.spec.metric.path
            found = read_metric(folder, path) if is_known else read_value(self.plan, run, failed)
            if isinstance(found, float):
                seconds = trial.user_attrs.get("scores", {}).get(_short(run), [0.0, 0.0])[1]
                attributes["scores"] = {_short(run): [found, seconds]}
                failed.discard(name)
                self.grid.add_trial(optuna.create_trial(value=found, user_attrs=attributes))
            else:
                attributes["message"] = found
                failed.add(name)
                self._add(self.grid, attributes, state=TrialState.FAIL)

    def _forget_candidates(self, search: optuna.Study) -> None:
        """Put others in the place of candidates that have what can't be taken back: held-out
        values of those under way, values of single runs of those that failed."""
        newest = self._newest(search)
        for trial in search.get_trials(False, (TrialState.RUNNING,)):
            if trial.intermediate_values:
                # one that was stopped right here has its successor
                if newest[_name(trial)].number == trial.number:
                    self._add(search, {"name": _name(trial)}, trial)
                search.tell(trial.number, state=TrialState.FAIL)
        for trial in newest.values():
            if trial.state == TrialState.FAIL and trial.user_attrs.get("scores"):
                self._add(search, {**trial.user_attrs, "scores": {}}, trial, TrialState.FAIL)

    def _fixed(self) -> dict[str, str]:
        """Digests of what must not change once there are runs, by its name in the file."""
        said = self.plan.spec.model_dump(mode="json")
        kept = ["command", "metric"]
        if self.plan.spec.search is not None:
            # scores of candidates are means over these
            kept += ["recipe", "overrides", "tasks", "axes", "spaces", "seeds"]
            # numbers of candidates, choices and held-out values are of things in this order
            said |= {key: list(said[key].items()) for key in ("tasks", "spaces")}
            said["axes"] = [(axis, list(levels.items())) for axis, levels in said["axes"].items()]
        search = said["search"] and {**said["search"], "trials": None}
        return {key: digest(said[key]) for key in kept} | {"search": digest(search)}

    def _studies(self) -> Iterator[optuna.Study]:
        yield self.grid
        if self.search is not None:
            yield self.search

    def _newest(self, study: optuna.Study) -> dict[str, FrozenTrial]:
        """The last trial of each name; earlier ones failed and were tried again."""
        return _by_name(study.get_trials(deepcopy=False))

    def _planned(self, study: optuna.Study, known: int) -> int:
        """How many trials there will be, of which some are known."""
        search = self.plan.spec.search if study is self.search else None
        return max(known, (search and search.trials) or 0)

    def _wants_more(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> bool:
        known = len(_by_name(trials))
        return known < self._planned(study, known)

    def _add(
        self,
        study: optuna.Study,
        attributes: dict[str, Any],
        like: FrozenTrial | None = None,
        state: TrialState = TrialState.WAITING,
    ) -> None:
        study.add_trial(
            optuna.create_trial(
                state=state,
                params=like.params if like else None,
                distributions=like.distributions if like else None,
                user_attrs=attributes,
            )
        )

    def _work(self, study: optuna.Study, trial: Trial, claim: Claim) -> Work:
        name = _name(trial)
        if study is self.grid:
            run = self._runs[name]
            return Work(study, trial, claim, run.condition, [run])
        condition = self.plan.candidate(name, draw(trial, self.plan))
        return Work(study, trial, claim, condition, self.plan.runs(condition))

    def _frozen(self, work: Work) -> FrozenTrial:
        return copy.deepcopy(work.study.get_trials(deepcopy=False)[work.trial.number])

    def _claim_path(self, trial: FrozenTrial | Trial) -> Path:
        return self.plan.output / "claims" / _name(trial)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with alone(self.plan.output / "study.lock"):
            yield


def _records(trial: FrozenTrial | None, runs: Iterable[Run]) -> Iterator[Record]:
    state = "waiting" if trial is None else STATES[trial.state]
    attributes = {} if trial is None else trial.user_attrs
    scores: Mapping[str, Sequence[float]] = attributes.get("scores", {})
    for run in runs:
        if _short(run) in scores:
            value, seconds = scores[_short(run)]
            yield Record(run, "finished", value, seconds)
        else:
            yield Record(run, state, message=attributes.get("message", ""))


def _by_name(trials: Iterable[FrozenTrial]) -> dict[str, FrozenTrial]:
    return {_name(trial): trial for trial in trials}


def _name(trial: FrozenTrial | Trial) -> str:
    # a worker that is killed between two writes leaves a trial without a name
    name: str = trial.user_attrs.get("name", candidate_name(trial.number))
    return name


def _short(run: Run) -> str:
    return f"{run.task or ''}/{run.seed}"
