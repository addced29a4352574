"""The run: steps, evaluations, checkpoints, and what is left when it ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from fastkd.data.datamodule import MicroBatches
from fastkd.distributed import Ranks
from fastkd.errors import Interrupted, UserError
from fastkd.files.lock import held
from fastkd.layer_map import Progress
from fastkd.models import note_models
from fastkd.recipe import AnyRecipe
from fastkd.reporting.console import Reporter
from fastkd.signals import Signalled, stop_signals
from fastkd.training.checkpoint import Checkpoints
from fastkd.training.evaluate import evaluate_assembly
from fastkd.training.export import export_student
from fastkd.training.finite import broken_weights
from fastkd.training.introduction import introduce
from fastkd.training.rehearsal import try_losses
from fastkd.training.run_folder import RunFolder
from fastkd.training.setup import Assembly, assemble
from fastkd.training.summary import judged_parts, summarise
from fastkd.training.window import SMALLER, Window
from fastkd.types import Inputs


def distill(
    recipe: AnyRecipe,
    ranks: Ranks,
    *,
    resume: bool,
    reporter: Reporter,
    claimed: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run a recipe from start to end, or continue it, and return its summary.

    Args:
        recipe: what to do; with one of a fine-tuning run hard labels take the teacher's place.
        ranks: from `start_ranks`; every rank calls this.
        resume: continue the run in `run.output` where there is one; a finished one is left alone.
        reporter: what the user sees; silent on ranks other than 0.
        claimed: called on rank 0 once all is checked, before anything is written to the folder.

    Raises:
        UserError: anything that the user can mend.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    run = RunFolder(recipe.run.output)
    with hold_run(run, recipe, ranks, resume=resume, reporter=reporter) as finished:
        if finished is not None:
            return finished
        return distill_held(recipe, ranks, reporter, claimed)


def distill_held(
    recipe: AnyRecipe,
    ranks: Ranks,
    reporter: Reporter,
    claimed: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """As `distill`, of a folder that is held and whose run is not finished."""
    run = RunFolder(recipe.run.output)
    started = time.perf_counter()
    assembly = assemble(recipe, ranks, progress=not reporter.console.quiet)
    try_losses(assembly)

    def claim() -> None:
        if claimed is not None:
            claimed()
        run.create(recipe)
        note_models(run.path, recipe)

    ranks.from_main(claim)
    return _run(recipe, assembly, run, started, reporter)


@contextmanager
def hold_run(
    run: RunFolder, recipe: AnyRecipe, ranks: Ranks, *, resume: bool, reporter: Reporter
) -> Iterator[dict[str, Any] | None]:
    """Keep other processes out of a run's folder while the context is open; collective.

    Nothing stays of the folder where the run is not claimed meanwhile.

    Args:
        run: where the recipe writes to.
        recipe: what is to be run there.
        ranks: of which the first one holds the folder.
        resume: whether a run may be there.
        reporter: what the user sees.

    Yields:
        The summary of a run that is finished, else `None`.

    Raises:
        UserError: the folder is taken, in use, or holds a run of another recipe.
    """

    def enter() -> dict[str, Any] | None:
        # a folder that is somebody else's is left as it is, without a lock in it
        run.check_ours()
        if not stack.enter_context(held(run.path)):
            reporter.say(f"warning: {run.path} can't be locked; start nothing else that writes it")
        finished = run.check(recipe, resume=resume)
        run.tidy()
        return finished

    with ExitStack() as stack:
        finished = ranks.from_main(enter)
        if finished is not None:
            reporter.say(f"{run.path} is finished; remove it to run again")
        yield finished


def _run(
    recipe: AnyRecipe, assembly: Assembly, run: RunFolder, started: float, reporter: Reporter
) -> dict[str, Any]:
    ranks, train = assembly.ranks, assembly.recipe.train
    introduce(assembly, reporter)
    checkpoints = Checkpoints(run.checkpoints, ranks, train.keep_checkpoints)
    feed = open_micro_batches(assembly)
    step = _restore(recipe, assembly, checkpoints, feed, run, reporter)
    if step == 0:
        _evaluate(assembly, run, 0, reporter)
    with _signals() as stop, reporter.steps(step, train.steps):
        _train(assembly, feed, checkpoints, run, step, reporter, stop)
    summary = summarise(assembly, run, time.perf_counter() - started)
    export_student(
        assembly.engine, assembly.source, assembly.handed_on, assembly.tokenizer, run, ranks
    )
    if ranks.is_main:
        # last, because it is what makes the run finished
        run.write_summary(summary)
    # a launcher ends all ranks when one fails at its exit, so none leaves while the first writes
    ranks.barrier()
    return summary


def open_micro_batches(assembly: Assembly) -> MicroBatches:
    """The micro-batches of a run on this rank, from its first step."""
    train = assembly.recipe.train
    return assembly.datamodule.micro_batches(
        train.batch_size, train.seed, assembly.plan, assembly.ranks.rank
    )


def train_step(assembly: Assembly, feed: MicroBatches) -> Tensor:
    """One optimiser step over all micro-batches of this rank.

    Returns:
        fp32 [2, labels] on the device: this rank's part of the step's raw and weighted losses; the
        sum over ranks is the mean over the global batch.
    """
    plan, ranks, engine = assembly.plan, assembly.ranks, assembly.engine
    objective = assembly.objective
    micro_batches: list[Inputs] = [
        {name: tensor.to(ranks.device, non_blocking=True) for name, tensor in inputs.items()}
        for inputs in feed.next_step(objective.moment.step)
    ]
    counts = torch.stack([objective.divisors(inputs) for inputs in micro_batches])
    shares = counts / ranks.sum(counts.sum(dim=0)).clamp(min=1)
    # the engine averages over ranks and micro-batches, where the parts should add up
    parts = plan.world_size * plan.accumulation
    pieces = list(zip(micro_batches, (shares * parts).float(), strict=True))
    if objective.needs_look:
        objective.observe(ranks.sum(_look(assembly, pieces)[0] / parts))
    losses = torch.zeros(2, len(objective.labels), device=ranks.device)
    for inputs, share in pieces:
        states = assembly.teacher.capture(inputs)
        total, values = engine(inputs, states, share)
        engine.backward(total)
        engine.step()
        losses += values / parts
    if objective.adapts:
        objective.observe(ranks.sum(losses[0].clone()))
    return losses


def _look(assembly: Assembly, pieces: Sequence[tuple[Inputs, Tensor]]) -> Tensor:
    """Losses of a step that is not made, [2, labels]: weights that follow losses start from it."""
    assembly.engine.eval()
    with torch.no_grad():
        found = [assembly.engine(i, assembly.teacher.capture(i), share)[1] for i, share in pieces]
    assembly.engine.train()
    return torch.stack(found).sum(dim=0)


def _train(
    assembly: Assembly,
    feed: MicroBatches,
    checkpoints: Checkpoints,
    run: RunFolder,
    step: int,
    reporter: Reporter,
    stop: list[int],
) -> None:
    train, ranks = assembly.recipe.train, assembly.ranks
    window = Window(assembly, feed, step)
    while step < train.steps:
        assembly.objective.at(Progress(step, feed.epoch))
        window.add(train_step(assembly, feed))
        step += 1
        reporter.advance(step)
        last = step == train.steps
        due = last or bool(train.checkpoint_every and step % train.checkpoint_every == 0)
        # ranks can only agree on a stop where they talk anyway
        alone = bool(stop) and ranks.world_size == 1
        stopping = False
        # nothing is saved of a window that was not looked at
        if step % train.log_every == 0 or due or alone or window.skipped:
            record, stopping = window.close(bool(stop))
            if ranks.is_main:
                run.append_metrics(record)
                _write_events(assembly, record)
            reporter.metrics(step, train.steps, _parts(record))
        paused = time.perf_counter()
        # before the checkpoint: a run that is resumed from it has this evaluation behind it
        if last or (train.evaluate_every and step % train.evaluate_every == 0):
            _evaluate(assembly, run, step, reporter)
        if due or stopping:
            _save(assembly, feed, checkpoints, step)
        if stopping and not last:
            raise Interrupted(f"stopped after step {step}; continue with --resume")
        window.exclude(time.perf_counter() - paused)


def _save(assembly: Assembly, feed: MicroBatches, checkpoints: Checkpoints, step: int) -> None:
    """Write a checkpoint of weights that are finite.

    Raises:
        UserError: they are not.
    """
    broken = broken_weights(assembly.engine, assembly.ranks)
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(
            f"{broken[0]}{more} not finite after step {step}, so no checkpoint is written of it; "
            f"every loss was finite, so the step was too long: {SMALLER}"
        )
    position = {
        "step": step,
        "stream": feed.state_dict(),
        "objective": assembly.objective.feedback(),
    }
    checkpoints.save(assembly.engine, step, position)


def _take_over(run: RunFolder, recipe: AnyRecipe, tag: str | None) -> str | None:
    """Let the run go on under a recipe that may continue it; what that makes longer."""
    longer = run.longer(recipe)
    if longer is not None and tag is None and run.read_summary() is not None:
        raise UserError(
            f"{run.path} is finished and its checkpoints are gone, so it can't be {longer}; go on "
            "from its student in another run, with student.init"
        )
    run.take_over(recipe)
    return longer


def _restore(
    recipe: AnyRecipe,
    assembly: Assembly,
    checkpoints: Checkpoints,
    feed: MicroBatches,
    run: RunFolder,
    reporter: Reporter,
) -> int:
    """Load the newest whole checkpoint, if there is one; return the step it stands at."""
    step = 0
    tag = checkpoints.newest(reporter.say)
    if tag is not None:
        state = checkpoints.load(assembly.engine, tag)
        feed.load_state_dict(state["stream"])
        # checkpoints of fastkd 0.1 have none, and their recipes no weight that follows losses
        if "objective" in state:
            assembly.objective.load_feedback(state["objective"], assembly.ranks.device)
        step = state["step"]
        reporter.say(f"continuing from {run.checkpoints / tag}")
    # after what may still refuse
    longer = assembly.ranks.from_main(lambda: _take_over(run, recipe, tag))
    if longer is not None:
        reporter.say(longer)
    if assembly.ranks.is_main:
        if step:
            run.rewind_metrics(step)
        else:
            run.metrics.unlink(missing_ok=True)
    return step


def _evaluate(assembly: Assembly, run: RunFolder, step: int, reporter: Reporter) -> None:
    result = evaluate_assembly(assembly, judge_teacher=step == 0)
    if assembly.ranks.is_main:
        if result.teacher is not None:
            run.append_metrics({"kind": "teacher", "step": step, **result.teacher})
        run.append_metrics({"kind": "heldout", "step": step, **result.as_dict()})
    if result.teacher is not None:
        reporter.say("  ".join(["teacher", *judged_parts(result.teacher)]))
        _doubt(result.teacher, assembly.datamodule.constant_score(), reporter)
    said = [f"held out at step {step}", f"loss {result.total:.4g}", *judged_parts(result.judged)]
    reporter.say("  ".join(said))


def _doubt(teacher: dict[str, Any], constant: float | None, reporter: Reporter) -> None:
    """Say so of a teacher that knows no more than one that gives one answer to everything."""
    score = teacher.get("score")
    if score is not None and constant is not None and score <= constant and score < 1:
        reporter.say(
            f"warning: the teacher scores {score:.4f}, and one answer to everything "
            f"{constant:.4f}; see that it was trained on this task, and that the names of its "
            "outputs (id2label) and task.labels stand in the same order"
        )


def _parts(record: dict[str, Any]) -> list[str]:
    """The loss and what each term adds to it."""
    terms: dict[str, float] = {}
    for label, value in record["weighted"].items():
        term = label.split("/")[0]
        terms[term] = terms.get(term, 0.0) + value
    parts = [f"loss {record['loss']:.4g}"]
    parts += [f"{term} {value:.4g}" for term, value in terms.items()]
    speeds = [name for name in record if name.endswith("_per_second")]
    return parts + [f"{record[name]:,.0f} {name.removesuffix('_per_second')}/s" for name in speeds]


def _write_events(assembly: Assembly, record: dict[str, Any]) -> None:
    step = record["step"]
    events = [("train/loss", record["loss"], step), ("train/lr", record["learning_rate"], step)]
    events += [(f"train/{label}", value, step) for label, value in record["losses"].items()]
    assembly.engine.monitor.write_events(events)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect what asks for an end while the context is open; a second SIGINT ends at once."""
    received: list[int] = []

    def note(number: int) -> None:
        if received and number == signal.SIGINT:
            raise Signalled(number)
        received.append(number)

    with stop_signals(note):
        yield received
