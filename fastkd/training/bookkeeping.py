"""What a run writes down between its steps: metrics, evaluations, checkpoints; and where it ends.

The step itself is in `loop.py`. Here is what it leaves, who is told, and how a run that is
continued finds its place.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from fastkd.data.prefetch import Prefetched
from fastkd.errors import Interrupted, UserError
from fastkd.recipe import AnyRecipe
from fastkd.reporting.console import Reporter
from fastkd.reporting.numbers import fixed
from fastkd.reporting.scores import one_class
from fastkd.signals import Signalled, stop_signals
from fastkd.training.checkpoint import Checkpoints
from fastkd.training.continuation import from_its_student
from fastkd.training.cost import Cost
from fastkd.training.evaluate import Evaluation, evaluate
from fastkd.training.finite import broken_weights
from fastkd.training.metric_lines import Line, by_term, make_line, numbers_of
from fastkd.training.predictions import Predictions
from fastkd.training.run_folder import RunFolder
from fastkd.training.same_data import require_same_data
from fastkd.training.setup import Run
from fastkd.training.stages import Stage
from fastkd.training.steering import Steering
from fastkd.training.summary import judged_parts
from fastkd.training.tracker import TrackioMonitor, rewind_tensorboard
from fastkd.training.window import SMALLER, Window

_PUT_BACK = "put back what was there, or start again in another run.output"


@dataclass(frozen=True)
class Callbacks:
    """Functions of the user's that a run calls on rank 0; what they raise ends the run on every
    rank."""

    on_step: Callable[[int, dict[str, Any]], None] | None = None
    """Called every `train.log_every` steps with the step and the line of `metrics.jsonl`."""
    on_evaluate: Callable[[int, Evaluation], None] | None = None
    """Called after every evaluation with the step and what was found."""

    def given(self) -> set[str]:
        """Names of those that there are."""
        return {each.name for each in fields(self) if getattr(self, each.name) is not None}


SILENT = Callbacks()


class Bookkeeper:
    """Keeps a run's folder in step with the run.

    Args:
        run: which trains.
        folder: where it is written.
        reporter: what the user sees.
        callbacks: what else is told.
        cost: what the run takes.
    """

    def __init__(
        self, run: Run, folder: RunFolder, reporter: Reporter, callbacks: Callbacks, cost: Cost
    ) -> None:
        self.run = run
        self.folder = folder
        self.reporter = reporter
        self.callbacks = callbacks
        self.cost = cost
        self.checkpoints = Checkpoints(
            folder.checkpoints, run.ranks, run.recipe.train.keep_checkpoints
        )
        self.steering = Steering(run)
        self.predictions = Predictions(run, folder)
        self.micro_batches = Prefetched(run.micro_batches(), run.ranks.device)
        self.trackio: TrackioMonitor | None = None
        self._teacher_judged = False
        # the others may have been given none
        self._called = run.ranks.from_main(callbacks.given)
        # what was decided before the evaluation of a last step that a longer run would not make
        self._before_last: dict[str, Any] | None = None

    def restore(self, recipe: AnyRecipe, stage: Stage | None) -> int:
        """Load the newest whole checkpoint, if there is one; return the step it stands at.

        Args:
            recipe: as it was given, which the run goes on under.
            stage: which one of another run this is, if it is one.

        Raises:
            UserError: the checkpoint is of other data, or the run can't be made longer.
        """
        run, folder, reporter = self.run, self.folder, self.reporter
        step, predictions = 0, {}
        tag = self.checkpoints.newest(reporter.say)
        if tag is not None:
            seed = run.recipe.train.dropping
            state = self.checkpoints.load(run.engine, tag, seed, reporter.say)
            self.micro_batches.load_state_dict(state["stream"])
            require_same_data(state["data"], run.data_digests, str(folder.path), _PUT_BACK)
            self.cost.load(state["cost"])
            run.objective.weights.load_feedback(state["objective"], run.ranks.device)
            step = state["step"]
            if step < run.recipe.train.steps and state["before_last"]:
                state |= state["before_last"]
            self.steering.load(state["steering"])
            predictions = state["predictions"]
            reporter.say(f"continuing from {folder.checkpoints / tag}")
        # after what may still refuse
        longer = run.ranks.from_main(lambda: _take_over(folder, recipe, tag, stage))
        if longer is not None:
            reporter.say(longer)
        self._teacher_judged = run.ranks.from_main(partial(self._take_up, step, predictions))
        return step

    def _take_up(self, step: int, predictions: dict[str, Any]) -> bool:
        """Let what rank 0 writes go on after a step; whether the teacher has been judged."""
        run, folder = self.run, self.folder
        self.predictions.load(predictions)
        if folder.metrics.exists():
            rewind_tensorboard(run.engine.monitor, step if step else -1)
        if step:
            folder.rewind_metrics(step)
        else:
            self._begin_again()
        if run.recipe.run.monitor == "trackio":
            self.trackio = TrackioMonitor(folder.path, goes_on=step > 0)
        return any(line["kind"] == "teacher" for line in folder.each_metric())

    def _begin_again(self) -> None:
        """Put away the lines of a run that ended before its first checkpoint, with a word."""
        lost = max((line["step"] for line in self.folder.each_metric()), default=0)
        if lost:
            self.reporter.say(
                f"{self.folder.path}: no checkpoint was written before it ended, so its first "
                f"{lost} steps are made again; train.checkpoint_every=N writes one every N steps"
            )
        self.folder.metrics.unlink(missing_ok=True)

    def close(self) -> None:
        """Let the tracker write what it holds."""
        if self.trackio is not None:
            self.trackio.close()

    def close_step(self, step: int, window: Window, stop: list[int]) -> None:
        """Write down, evaluate and save what is due after a step.

        Args:
            step: that was made, counted from 1.
            window: which holds its losses.
            stop: signals that ask for an end.

        Raises:
            UserError: a number that is not finite, or a disk that is full.
            Interrupted: this rank or another was asked to stop, and a checkpoint is written.
        """
        run, train = self.run, self.run.recipe.train
        self.reporter.advance(step)
        last = step == train.steps
        due = last or bool(train.checkpoint_every and step % train.checkpoint_every == 0)
        # ranks can only agree on a stop where they talk anyway
        alone = bool(stop) and run.ranks.world_size == 1
        stopping = False
        scheduled = bool(train.evaluate_every and step % train.evaluate_every == 0)
        evaluates = last or scheduled
        ends = evaluates and self.steering.may_stop
        # nothing is saved of a window that was not looked at
        if step % train.log_every == 0 or due or alone or ends or window.skipped:
            record, stopping = window.close(bool(stop))
            self._write(step, record)
        paused = time.perf_counter()
        # before the checkpoint: a run that is resumed from it has this evaluation behind it
        if evaluates:
            self._before_last = None if scheduled else self._decided()
            self.evaluate(step)
        ended = last or self.steering.is_over
        if due or stopping or ended:
            self._save(step)
        if stopping and not ended:
            raise Interrupted(f"stopped after step {step}; continue with --resume")
        window.exclude(time.perf_counter() - paused)

    def evaluate(self, step: int) -> None:
        """Evaluate the student, and the teacher where it has not been yet, and write it down.

        Raises:
            UserError: a number that is not finite, or one that was to decide and isn't there.
        """
        result = evaluate(self.run, judge_teacher=not self._teacher_judged)
        self._teacher_judged = True
        ranks = self.run.ranks
        ranks.from_main(partial(self._write_evaluation, step, result))
        self.steering.observe(step, result)
        if self.run.recipe.run.predictions and self.steering.exported_step(step) == step:
            ranks.from_main(partial(self.predictions.observe, step, result))
        self._call("on_evaluate", step, result)

    def _write_evaluation(self, step: int, result: Evaluation) -> None:
        """Write down and say what was found, on rank 0."""
        if result.teacher is not None:
            self._note("teacher", step, result.teacher)
            self.reporter.say("  ".join(["teacher", *judged_parts(result.teacher)]))
            _doubt(result.teacher, self.reporter)
        self._note("heldout", step, result.of_student())
        said = [f"held out at step {step}", f"loss {result.total:.4g}"]
        self.reporter.say("  ".join([*said, *judged_parts(result.judged)]))

    def _note(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._append(make_line(kind, step, values))

    def _append(self, line: Line) -> None:
        """Write a line of metrics, here and in the tracker, on rank 0."""
        self.folder.append_metrics(line)
        for monitor in (self.run.engine.monitor, self.trackio):
            if monitor is not None:
                monitor.write_events(list(numbers_of(line)))

    def _write(self, step: int, values: dict[str, Any]) -> None:
        """Write down and say what the last steps came to."""
        line, run = make_line("train", step, values), self.run

        def tell() -> None:
            self._append(line)
            self.reporter.metrics(step, run.recipe.train.steps, _parts(values))

        run.ranks.from_main(tell)
        self._call("on_step", step, line)

    def _call(self, name: str, step: int, found: Any) -> None:
        """Call a function of rank 0's; what it raises ends the run on every rank."""

        def call() -> None:
            # what it returns is of no use to the others
            getattr(self.callbacks, name)(step, found)

        if name in self._called:
            self.run.ranks.from_main(call, f"rank 0's {name}")

    def _save(self, step: int) -> None:
        """Write a checkpoint of weights that are finite.

        Raises:
            UserError: they are not.
        """
        broken = broken_weights(self.run.engine, self.run.ranks)
        if broken:
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            raise UserError(
                f"{broken[0]}{more} not finite after step {step}, so no checkpoint is written of "
                f"it; every loss was finite, so the step was too long: {SMALLER}"
            )
        position = {
            "step": step,
            "stream": self.micro_batches.state_dict(),
            "objective": self.run.objective.weights.feedback(),
            "data": self.run.data_digests,
            "cost": self.cost.state(),
            "before_last": self._before_last,
            **self._decided(),
        }
        self.run.ranks.from_main(self.folder.sync_metrics)
        self.checkpoints.save(self.run.engine, step, position)

    def _decided(self) -> dict[str, Any]:
        """What the evaluations so far came to, for a checkpoint."""
        return {"steering": self.steering.state(), "predictions": self.predictions.state()}


@contextmanager
def stop_asked() -> Iterator[list[int]]:
    """Collect what asks for an end while the context is open; a second SIGINT ends at once."""
    received: list[int] = []

    def note(number: int) -> None:
        if received and number == signal.SIGINT:
            raise Signalled(number)
        received.append(number)

    with stop_signals(note):
        yield received


def _take_over(
    folder: RunFolder, recipe: AnyRecipe, tag: str | None, stage: Stage | None
) -> str | None:
    """Let the run go on under a recipe that may continue it; what that makes longer."""
    longer = folder.longer(recipe)
    if longer is not None and tag is None and folder.read_summary() is not None:
        raise UserError(
            f"{folder.path} is finished and its checkpoints are gone, so it can't be {longer}; "
            f"{from_its_student(recipe)}"
        )
    if stage is not None:
        # first: else the whole would be finished while its last stage is not
        stage.take_over()
    folder.take_over(recipe)
    return longer


def _doubt(teacher: dict[str, Any], reporter: Reporter) -> None:
    """Say so of a teacher that knows no more than one that gives one answer to everything."""
    score, constant = teacher.get("score"), teacher.get("baseline", {}).get("score")
    if score is not None and constant is not None and score <= constant and score < 1:
        said = one_class(teacher)
        predicts = "" if said is None else f" (it predicts {said})"
        reporter.say(
            f"warning: the teacher scores {score:.4f}{predicts}, and one answer to everything "
            f"{constant:.4f}; see that it was trained on this task, and that the names of its "
            "outputs (id2label) and task.labels stand in the same order"
        )


def _parts(values: dict[str, Any]) -> list[str]:
    """The loss and what each term adds to it."""
    parts = [f"loss {values['loss']:.4g}"]
    parts += [f"{term} {value:.4g}" for term, value in by_term(values["weighted"]).items()]
    speeds = [name for name in values if name.endswith("_per_second")]
    return parts + [
        f"{fixed(values[name])} {name.removesuffix('_per_second')}/s" for name in speeds
    ]
