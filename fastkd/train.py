"""The run: steps, evaluations, checkpoints, and what is left when it ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fastkd.assemble import Assembly, assemble
from fastkd.checkpoint import Checkpoints
from fastkd.console import Reporter
from fastkd.data import BlockStream
from fastkd.engine import Ranks
from fastkd.errors import Interrupted, UserError
from fastkd.evaluate import as_inputs, evaluate_assembly, peak_memory, tokens_per_second
from fastkd.export import export_student
from fastkd.introduction import introduce
from fastkd.layer_map import Moment
from fastkd.objective import Inputs
from fastkd.recipe import Recipe
from fastkd.run_folder import RunFolder


def distill(recipe: Recipe, ranks: Ranks, *, resume: bool, reporter: Reporter) -> dict[str, Any]:
    """Run a recipe from start to end, or continue it, and return its summary.

    Args:
        recipe: what to do.
        ranks: from `start_ranks`; every rank calls this.
        resume: continue the run in `run.output` where there is one; a finished one is left alone.
        reporter: what the user sees; silent on ranks other than 0.

    Raises:
        UserError: anything that the user can mend.
        Interrupted: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    run = RunFolder(recipe.run.output)
    finished = ranks.from_main(lambda: _check(run, recipe, resume))
    if finished is not None:
        reporter.say(f"{run.path} is finished; remove it to run again")
        return finished
    started = time.perf_counter()
    assembly = assemble(recipe, ranks, progress=not reporter.console.quiet)
    ranks.from_main(lambda: None if run.holds_run else run.create(recipe))
    introduce(assembly, reporter)
    checkpoints = Checkpoints(run.checkpoints, ranks, recipe.train.keep_checkpoints)
    stream = assembly.corpus.stream(recipe.train.batch_size, recipe.train.seed)
    step = _restore(assembly, checkpoints, stream, run, reporter)
    if step == 0:
        _evaluate(assembly, run, 0, reporter)
    with _signals() as stop, reporter.steps(step, recipe.train.steps):
        _train(assembly, stream, checkpoints, run, step, reporter, stop)
    summary = _summarise(assembly, run, time.perf_counter() - started)
    export_student(
        assembly.engine,
        recipe.teacher,
        assembly.teacher.model.config,
        assembly.tokenizer,
        run,
        ranks,
    )
    if ranks.is_main:
        # last, because it is what makes the run finished
        run.write_summary(summary)
    return summary


def train_step(assembly: Assembly, stream: BlockStream) -> Tensor:
    """One optimiser step over all micro-batches of this rank.

    Returns:
        fp32 [2, labels] on the device: this rank's part of the step's raw and weighted losses; the
        sum over ranks is the mean over the global batch.
    """
    plan, ranks, engine = assembly.plan, assembly.ranks, assembly.engine
    objective = assembly.objective
    batch = as_inputs(stream.next_batch(), assembly.masking, objective.moment.step)
    micro_batches: list[Inputs] = [
        {
            name: tensor[plan.rows(ranks.rank, number)].to(ranks.device, non_blocking=True)
            for name, tensor in batch.items()
        }
        for number in range(plan.accumulation)
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
    stream: BlockStream,
    checkpoints: Checkpoints,
    run: RunFolder,
    step: int,
    reporter: Reporter,
    stop: list[int],
) -> None:
    train, ranks = assembly.recipe.train, assembly.ranks
    window = _Window(assembly, step)
    while step < train.steps:
        assembly.objective.at(Moment(step, stream.epoch))
        window.add(train_step(assembly, stream))
        step += 1
        reporter.advance(step)
        last = step == train.steps
        due = last or bool(train.checkpoint_every and step % train.checkpoint_every == 0)
        logged = step % train.log_every == 0 or due
        if logged:
            record, stopping = window.close(step, bool(stop))
            if ranks.is_main:
                run.append_metrics(record)
                _write_events(assembly, record)
            reporter.metrics(step, train.steps, _parts(record))
        else:
            # ranks can only agree on a stop where they talk anyway
            stopping = bool(stop) and ranks.world_size == 1
        paused = time.perf_counter()
        # before the checkpoint: a run that is resumed from it has this evaluation behind it
        if last or (train.evaluate_every and step % train.evaluate_every == 0):
            _evaluate(assembly, run, step, reporter)
        if due or stopping:
            position = {
                "step": step,
                "stream": stream.state_dict(),
                "objective": assembly.objective.feedback(),
            }
            checkpoints.save(assembly.engine, step, position)
        if stopping and not last:
            raise Interrupted(f"stopped after step {step}; continue with --resume")
        window.exclude(time.perf_counter() - paused)


class _Window:
    """Losses since the last line of metrics, kept on the device."""

    def __init__(self, assembly: Assembly, step: int) -> None:
        self.assembly = assembly
        self._restart(step)

    def _restart(self, step: int) -> None:
        labels, device = self.assembly.objective.labels, self.assembly.ranks.device
        self.sum = torch.zeros(2, len(labels), device=device)
        self.start = step
        self.time = time.perf_counter()

    def add(self, losses: Tensor) -> None:
        """Add one step's losses."""
        self.sum += losses

    def exclude(self, seconds: float) -> None:
        """Leave time that was not spent on steps out of the throughput."""
        self.time += seconds

    def close(self, step: int, stop: bool) -> tuple[dict[str, Any], bool]:
        """Means since the last call, over all ranks, and whether any rank wants to stop.

        Raises:
            UserError: a loss is not finite.
        """
        assembly, steps = self.assembly, step - self.start
        flag = self.sum.new_tensor([float(stop)])
        *sums, stops = assembly.ranks.sum(torch.cat([self.sum.flatten(), flag])).tolist()
        labels = assembly.objective.labels
        means = [value / steps for value in sums]
        losses = dict(zip(labels, means[: len(labels)], strict=True))
        weighted = dict(zip(labels, means[len(labels) :], strict=True))
        broken = [label for label, value in losses.items() if value != value or abs(value) > 1e30]
        if broken:
            raise UserError(
                f"{', '.join(broken)} not finite between steps {self.start + 1} and {step}; "
                "continue from the last checkpoint with a smaller train.learning_rate, in "
                "another run.output"
            )
        train, data = assembly.recipe.train, assembly.recipe.data
        seconds = time.perf_counter() - self.time
        norm = assembly.engine.get_global_grad_norm()
        record = {
            "kind": "train",
            "step": step,
            "loss": sum(weighted.values()),
            "losses": losses,
            "weighted": weighted,
            "learning_rate": assembly.engine.get_lr()[0],
            "gradient_norm": None if norm is None else float(norm),
            "tokens_per_second": steps * train.batch_size * data.block_size / seconds,
        }
        self._restart(step)
        return record, stops > 0


def _check(run: RunFolder, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """Check that this recipe starts or continues the run; the summary if it is finished."""
    if not (resume and run.holds_run):
        run.check_free()
        return None
    run.check_continues(recipe)
    return run.read_summary()


def _restore(
    assembly: Assembly,
    checkpoints: Checkpoints,
    stream: BlockStream,
    run: RunFolder,
    reporter: Reporter,
) -> int:
    """Load the newest whole checkpoint, if there is one; return the step it stands at."""
    step = 0
    tag = checkpoints.newest()
    if tag is not None:
        state = checkpoints.load(assembly.engine, tag)
        stream.load_state_dict(state["stream"])
        # checkpoints of fastkd 0.1 have none, and their recipes no weight that follows losses
        if "objective" in state:
            assembly.objective.load_feedback(state["objective"], assembly.ranks.device)
        step = state["step"]
        reporter.say(f"continuing from {run.checkpoints / tag}")
    if assembly.ranks.is_main:
        if step:
            run.rewind_metrics(step)
        else:
            run.metrics.unlink(missing_ok=True)
    return step


def _evaluate(assembly: Assembly, run: RunFolder, step: int, reporter: Reporter) -> None:
    result = evaluate_assembly(assembly)
    if assembly.ranks.is_main:
        run.append_metrics({"kind": "heldout", "step": step, **result.as_dict()})
    cosine = "" if result.sentence_cosine is None else f"  cosine {result.sentence_cosine:.4f}"
    reporter.say(f"held out at step {step}  loss {result.total:.4g}{cosine}")


def _summarise(assembly: Assembly, run: RunFolder, seconds: float) -> dict[str, Any]:
    recipe, ranks, corpus = assembly.recipe, assembly.ranks, assembly.corpus
    rows = corpus.heldout[: assembly.plan.micro_batch_size].to(ranks.device)
    inputs = {"input_ids": rows}
    assembly.engine.eval()
    teacher_speed = tokens_per_second(assembly.teacher.embed, inputs, ranks)
    student_speed = tokens_per_second(assembly.engine, inputs, ranks)
    heldout = [r for r in run.read_metrics() if r["kind"] == "heldout"] if ranks.is_main else []
    kept = ("losses", "total", "sentence_cosine", "blocks", "tokens")
    before, after = ({key: heldout[at][key] for key in kept} if heldout else None for at in (0, -1))
    return {
        "run": str(run.path),
        "steps": recipe.train.steps,
        "train_tokens": recipe.train.steps * recipe.train.batch_size * recipe.data.block_size,
        "corpus_tokens": corpus.train_tokens,
        "layer_map": assembly.layers.rows(),
        "before": before,
        "after": after,
        "parameters": {
            "teacher": assembly.teacher_parameters,
            "student": assembly.initialisation.total,
        },
        "forward_tokens_per_second": {"teacher": teacher_speed, "student": student_speed},
        "peak_memory_bytes": peak_memory(ranks),
        "peak_memory_of": "GPU" if ranks.device.type == "cuda" else "process",
        "world_size": ranks.world_size,
        "seconds": seconds,
    }


def _parts(record: dict[str, Any]) -> list[str]:
    """The loss and what each term adds to it."""
    terms: dict[str, float] = {}
    for label, value in record["weighted"].items():
        term = label.split("/")[0]
        terms[term] = terms.get(term, 0.0) + value
    parts = [f"loss {record['loss']:.4g}"]
    parts += [f"{term} {value:.4g}" for term, value in terms.items()]
    return [*parts, f"{record['tokens_per_second']:,.0f} tokens/s"]


def _write_events(assembly: Assembly, record: dict[str, Any]) -> None:
    step = record["step"]
    events = [("train/loss", record["loss"], step), ("train/lr", record["learning_rate"], step)]
    events += [(f"train/{label}", value, step) for label, value in record["losses"].items()]
    assembly.engine.monitor.write_events(events)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM while the context is open; a second SIGINT ends at once."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
