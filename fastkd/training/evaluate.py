"""Held-out numbers: every loss of every layer pair, and what the datamodule's evaluator says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NoReturn, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.capture import Capture
from fastkd.capture.lm_head import Overheard, overheard
from fastkd.data.datamodule import EvalBatch, Evaluator
from fastkd.data.tasks.datamodule import ScoreEvaluator
from fastkd.errors import UserError
from fastkd.layer_map import Progress
from fastkd.losses import target_labels
from fastkd.losses.gathering import Gather
from fastkd.losses.objective import Objective
from fastkd.losses.pooling import EmbeddingModules
from fastkd.packed_row import valid_tokens
from fastkd.training.finite import blame, first_broken, teacher_fault
from fastkd.training.gathering import group_gathers
from fastkd.training.judging import judge_embeddings
from fastkd.training.perplexity import heard_perplexity
from fastkd.training.setup import Run
from fastkd.training.teacher import StoredStates, TeacherRunner
from fastkd.types import Inputs, Reading, Side, teacher_inputs

Outputs = dict[str, npt.NDArray[np.float32]]
_Compared = tuple[Tensor, Tensor | None]
"""What an evaluator takes of a batch, of the student and of the teacher."""
_ComparedOf = Callable[[Tensor, Tensor | None, Capture, Inputs], _Compared | None]
"""Finds that from the student's output, the teacher's, what the losses read of the teacher, and the
inputs; `None` where nothing can be compared."""
_REMEDY = "train it with a smaller train.learning_rate, in another run.output"


@dataclass(frozen=True)
class Kept:
    """What a student keeps of its teacher on a task, of what that scores above one answer to
    everything, and the ends of a 95 % interval over the examples."""

    share: float | None
    """1 of a student as good as its teacher; `None` where the teacher is not above one answer by
    two standard errors."""
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Evaluation:
    """Means over the held-out data."""

    losses: dict[str, float]
    """Raw loss by label: the term, or `term/student layer-teacher layer`."""
    total: float
    """Weighted sum of the losses, see `StepWeights.total`."""
    judged: dict[str, Any]
    """Results besides the losses: of text `sentence_cosine` (cosine of both models' embeddings,
    `None` where their lengths differ or fastkd can't make them), `blocks` and `tokens`, of a
    language model `perplexity` or, of masked tokens, `pseudo_perplexity`; of a task `score`,
    `scores` by set and metric, `class_f1` by set and class, `baseline` (the scores of one answer to
    everything), `one_class`, `examples`; of embeddings that are judged `pairs` and `mteb`, scores
    by name."""
    teacher: dict[str, Any] | None = None
    """`judged` of the teacher, where it was asked for."""
    outputs: Outputs = field(default_factory=dict, repr=False, compare=False)
    """What the student gives each example by set, [examples, outputs] in the order of its file, of
    a task with a class or score an example."""
    teacher_outputs: Outputs = field(default_factory=dict, repr=False, compare=False)
    """`outputs` of the teacher, where it was asked for."""
    kept: Kept | None = None
    """Share that the student keeps of its teacher, where that was asked for and the task has a
    class or score an example."""

    def of_student(self) -> dict[str, Any]:
        """Numbers of the student alone, for JSON."""
        return {"losses": self.losses, "total": self.total, **self.judged}

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON; `teacher` and `kept` stand in it where they are known."""
        teacher = {} if self.teacher is None else {"teacher": self.teacher}
        kept = {} if self.kept is None else {"kept": asdict(self.kept)}
        return self.of_student() | teacher | kept


def evaluate(run: Run, *, judge_teacher: bool = False) -> Evaluation:
    """Evaluate a run's student on held-out data, split over the ranks; each model reads it once.

    Args:
        run: of which every rank makes equally many passes, because one may be collective.
        judge_teacher: whether to evaluate the teacher's outputs too, where they have a score.

    Raises:
        UserError: a number that is not finite, with who made it.
    """
    run.engine.eval()
    # the same layers every time, also where a mapping is drawn anew
    run.objective.at(Progress())
    found = _evaluate(run, judge_teacher)
    run.engine.train()
    return found


def _evaluate(run: Run, judge_teacher: bool) -> Evaluation:
    ranks, objective, datamodule, teacher = run.ranks, run.objective, run.datamodule, run.teacher
    # rows that are compared are those of a step, however that is cut
    together = run.plan.pieces if objective.least_rows else 1
    batches = list(datamodule.heldout(run.plan.micro_batch_size, ranks, together))
    whole = ranks.sum(sum_divisors(objective, batches).to(ranks.device)).clamp(min=1)
    losses = torch.zeros(len(objective.labels), dtype=torch.float64, device=ranks.device)
    compares, reads = datamodule.compares, datamodule.reads
    heard: Reading = "states" if reads == "embeddings" else reads
    compared_of = _choose_compared(run)
    evaluator, of_teacher = datamodule.evaluator(ranks), None
    head = objective.pair.head
    with ExitStack() as stack:
        tokens = stack.enter_context(heard_perplexity(run.module.student, head, ranks.device))
        listeners = {"student": tokens}
        student_heard = stack.enter_context(overheard(run.module.student, heard))
        asks = compares or judge_teacher
        reads_teacher = stack.enter_context(_read_teacher(run, heard if asks else None))
        if isinstance(teacher, TeacherRunner) and asks:
            of_teacher = None if compares else datamodule.evaluator(ranks, "teacher")
            if judge_teacher:
                listening = heard_perplexity(teacher.model, head, ranks.device)
                listeners["teacher"] = stack.enter_context(listening)
        stack.enter_context(torch.no_grad())
        for batch, gather in _with_gathers(run, batches, reads_teacher):
            inputs = reads_teacher.inputs(batch.inputs)
            labels = target_labels(inputs, head) if len(batch.rows) else None
            for listener in listeners.values():
                listener.expect(labels)
            loss_scales = (objective.divisors(inputs) / whole).float()
            teacher_states, theirs = reads_teacher(inputs)
            parts = run.student(inputs, teacher_states, loss_scales, gather)[1]
            for listener in listeners.values():
                listener.expect(None)
            losses += float(len(batch.rows) > 0) * parts[0]
            compared = compared_of(student_heard.output, theirs, teacher_states, inputs)
            if compared is not None:
                evaluator.add(batch.rows, *compared)
            if of_teacher and theirs is not None:
                of_teacher.add(batch.rows, theirs, None)
    by_label = dict(zip(objective.labels, ranks.sum(losses).tolist(), strict=True))

    def refuse(name: str) -> NoReturn:
        fault = teacher_fault(teacher, (run.move(batch.inputs) for batch in batches), ranks)
        said = blame(fault, teacher, _REMEDY)
        raise UserError(f"held out: {name} is not finite: {said}")

    if broken := first_broken(by_label):
        refuse(f"loss {broken}")
    of_alone = of_teacher.results(ranks) if of_teacher else {}
    of_alone |= listeners["teacher"].results(ranks) if "teacher" in listeners else {}
    if judge_teacher:
        of_alone |= judge_embeddings(run, "teacher")
    judged = evaluator.results(ranks) | tokens.results(ranks)
    judged |= judge_embeddings(run, "student")
    total, outputs = objective.weights.total(by_label), _outputs_of(evaluator)
    result = Evaluation(by_label, total, judged, of_alone or None, outputs, _outputs_of(of_teacher))
    if broken := first_broken(result.of_student()):
        refuse(broken)
    return result


def _with_gathers(
    run: Run, batches: Sequence[EvalBatch], reads_teacher: _TeacherReading
) -> Iterator[tuple[EvalBatch, Gather]]:
    """Each batch with what brings its losses the rows of its group, which is read twice where it
    has several."""
    group: list[EvalBatch] = []

    def read(gathers: Sequence[Gather]) -> None:
        for batch, gather in zip(group, gathers, strict=True):
            inputs = reads_teacher.inputs(batch.inputs)
            loss_scales = run.objective.divisors(inputs).float()
            run.student(inputs, reads_teacher(inputs)[0], loss_scales, gather)

    ends = [*(batch.begins for batch in batches[1:]), True]
    for batch, is_last in zip(batches, ends, strict=True):
        group.append(batch)
        if is_last:
            gathers = group_gathers([len(one.rows) > 0 for one in group], read)
            yield from zip(group, gathers, strict=True)
            group.clear()


@dataclass(frozen=True)
class _TeacherReading:
    """The teacher in an evaluation: a pass of it, or what is stored of that."""

    run: Run
    stored: StoredStates | None
    heard: Overheard | None
    """What it gives in a pass, where that is asked for and not stored."""
    gives_scores: bool
    """Whether what it gives is asked for and stored."""

    def inputs(self, held_out: Inputs) -> Inputs:
        """A batch on the device, with what is stored of it."""
        if self.stored is not None:
            wanted = self.run.objective.layers("teacher")
            held_out = self.stored.beside(held_out, wanted)
        return self.run.move(held_out)

    def __call__(self, inputs: Inputs) -> tuple[Capture, Tensor | None]:
        """What the losses read of it, and what it gives, where that is asked for."""
        # what it gives needs all of its layers, the losses perhaps not
        states = self.run.teacher(inputs, whole=self.heard is not None)
        if self.gives_scores:
            assert isinstance(states.logits, Tensor), "they are stored"
            return states, states.logits
        return states, None if self.heard is None else self.heard.output


@contextmanager
def _read_teacher(run: Run, asked: Reading | None) -> Iterator[_TeacherReading]:
    """Read a run's teacher while the context is open; `asked`: what of that it gives, if it is."""
    teacher = run.teacher
    if not isinstance(teacher, TeacherRunner):
        yield _TeacherReading(run, None, None, gives_scores=False)
        return
    stored = teacher.stored if teacher.stored and teacher.stored.heldout else None
    # of several teachers their mean is stored, and the first one is judged
    gives_scores = bool(asked and stored and stored.has_scores and not teacher.others)
    if asked is None or gives_scores:
        yield _TeacherReading(run, stored, None, gives_scores)
        return
    with overheard(teacher.model, asked) as heard:
        yield _TeacherReading(run, None, heard, gives_scores=False)


def _outputs_of(evaluator: Evaluator | None) -> Outputs:
    return evaluator.outputs if isinstance(evaluator, ScoreEvaluator) else {}


def _choose_compared(run: Run) -> _ComparedOf:
    """What finds, batch by batch, the tensors that a run's evaluator takes; collective under
    ZeRO-3."""
    data, teacher = run.datamodule, run.teacher
    embeddings: list[EmbeddingModules | None] = []
    if data.reads == "embeddings":
        embeddings = [run.embedding(side) for side in get_args(Side)]
    if isinstance(teacher, TeacherRunner) and teacher.others and data.compares:
        modules = embeddings[0] if embeddings else None
        return _predicted_by_several if modules is None else partial(_embedded_by_several, modules)
    if embeddings:
        return partial(_embedded, embeddings)
    return _given_by_both if data.compares else _given_by_student


def _given_by_both(
    student: Tensor, teacher: Tensor | None, _states: Capture, _inputs: Inputs
) -> _Compared:
    return student, teacher


def _given_by_student(
    student: Tensor, _teacher: Tensor | None, _states: Capture, _inputs: Inputs
) -> _Compared:
    return student, None


def _embedded(
    modules: Sequence[EmbeddingModules | None],
    student: Tensor,
    teacher: Tensor | None,
    _states: Capture,
    inputs: Inputs,
) -> _Compared | None:
    """Embeddings of student and teacher of what both gave; `None` where they aren't known."""
    masks = valid_tokens(inputs), valid_tokens(teacher_inputs(inputs))
    made = [
        embed(given, mask)
        for embed, given, mask in zip(modules, (student, teacher), masks, strict=True)
        if embed is not None and given is not None
    ]
    return (made[0], made[1]) if len(made) == 2 else None


def _embedded_by_several(
    modules: EmbeddingModules,
    student: Tensor,
    _teacher: Tensor | None,
    states: Capture,
    inputs: Inputs,
) -> _Compared:
    """Embeddings: the student's, and what those of several teachers come to."""
    assert states.embedding is not None, "a loss reads embeddings"
    return modules(student, valid_tokens(inputs)), states.embedding


def _predicted_by_several(
    student: Tensor, _teacher: Tensor | None, states: Capture, _inputs: Inputs
) -> _Compared:
    """Predictions: the student's, and what those of several teachers come to."""
    assert isinstance(states.logits, Tensor), "a loss reads scores"
    return student, states.logits


def sum_divisors(objective: Objective, batches: Sequence[EvalBatch]) -> Tensor:
    """What the batches that count hold of every divisor, fp64 [DIVISORS] on the CPU."""
    counts = [float(len(batch.rows) > 0) * objective.divisors(batch.inputs) for batch in batches]
    return torch.stack(counts).sum(dim=0)
