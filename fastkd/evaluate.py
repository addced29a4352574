"""Held-out numbers: every loss of every layer pair, and how close sentence embeddings are."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.assemble import Assembly, make_masking, make_objective, share_corpus
from fastkd.deepspeed_config import plan_batches
from fastkd.engine import DistilledStudent, Ranks, TeacherRunner
from fastkd.errors import UserError
from fastkd.export import load_projections
from fastkd.layer_map import Moment, make_layer_map
from fastkd.masking import Masking
from fastkd.models import load_student, load_teacher, load_tokenizer
from fastkd.objective import Inputs, Objective
from fastkd.recipe import load_recipe
from fastkd.run_folder import RunFolder

# a step's forward: (inputs) or (inputs, teacher's capture, shares)
Forward = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """Means over the held-out blocks."""

    losses: dict[str, float]
    """Raw loss by label: the term, or `term/student layer-teacher layer`."""
    total: float
    """Weighted sum of the losses, see `Objective.total`."""
    sentence_cosine: float | None
    """Cosine of mean-pooled last hidden states; `None` where the widths differ."""
    blocks: int
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate(
    student: Forward,
    teacher: TeacherRunner,
    objective: Objective,
    heldout: Inputs,
    micro_batch_size: int,
    ranks: Ranks,
) -> Evaluation:
    """Evaluate on held-out blocks, split over the ranks.

    Args:
        student: a `DistilledStudent` or the engine around one, in eval mode.
        teacher: on the same device.
        objective: whose losses are reported.
        heldout: `input_ids` [blocks, tokens] int64 and what goes with them, the same on every rank.
        micro_batch_size: blocks in one forward pass.
        ranks: a forward pass may be collective, so every rank makes equally many.
    """
    blocks = heldout["input_ids"]
    starts = list(range(0, len(blocks), micro_batch_size))
    rounds = -(-len(starts) // ranks.world_size)
    whole = objective.divisors(heldout).clamp(min=1).to(ranks.device)
    losses = torch.zeros(len(objective.labels), dtype=torch.float64, device=ranks.device)
    cosine = torch.zeros((), dtype=torch.float64, device=ranks.device)
    comparable = True
    for number in range(rounds):
        index = number * ranks.world_size + ranks.rank
        # a rank without a batch of its own repeats one that doesn't count
        start = starts[min(index, len(starts) - 1)]
        counts = float(index < len(starts))
        rows = slice(start, start + micro_batch_size)
        inputs = {name: tensor[rows].to(ranks.device) for name, tensor in heldout.items()}
        with torch.no_grad():
            shares = (objective.divisors(inputs) / whole).float()
            losses += counts * student(inputs, teacher.capture(inputs), shares)[1][0]
            mine, theirs = student(inputs)[0], teacher.embed(inputs)
            comparable = mine.shape[-1] == theirs.shape[-1]
            if comparable:
                cosine += counts * _cosines(mine, theirs).sum()
    results = ranks.sum(torch.cat([losses, cosine.reshape(1)])).tolist()
    by_label = dict(zip(objective.labels, results[:-1], strict=True))
    total = objective.total(by_label)
    mean_cosine = results[-1] / len(blocks) if comparable else None
    return Evaluation(by_label, total, mean_cosine, len(blocks), blocks.numel())


def as_inputs(ids: Tensor, masking: Masking | None, draw: int | str) -> Inputs:
    """What both models read of blocks [blocks, tokens], masked where a term needs that."""
    return {"input_ids": ids} if masking is None else masking(ids, draw)


def evaluate_assembly(assembly: Assembly) -> Evaluation:
    """Evaluate a run's student on its held-out blocks."""
    assembly.engine.eval()
    # the same layers every time, also where a mapping is drawn anew
    assembly.objective.at(Moment())
    result = evaluate(
        assembly.engine,
        assembly.teacher,
        assembly.objective,
        as_inputs(assembly.corpus.heldout, assembly.masking, "heldout"),
        assembly.plan.micro_batch_size,
        assembly.ranks,
    )
    assembly.engine.train()
    return result


def evaluate_run(run: RunFolder, overrides: Sequence[str], ranks: Ranks) -> Evaluation:
    """Evaluate the student that a run exported, on its own held-out text or on another.

    Args:
        run: a finished run.
        overrides: dotted keys of `data`, `teacher` or `train` that replace the run's.
        ranks: from `start_ranks`.

    Raises:
        UserError: the run is not finished, or an override does not fit.
    """
    if not run.student.is_dir():
        raise UserError(
            f"{run.path} holds no finished run; give the folder of one, or finish it with "
            "fastkd distill --resume"
        )
    recipe = load_recipe(run.recipe, overrides)
    if overrides:
        # a stream reads no more of the text than it needs
        data = recipe.data.model_copy(update={"streaming": True})
        recipe = recipe.model_copy(update={"data": data})
    teacher = load_teacher(recipe.teacher, recipe.student.head)
    tokenizer = load_tokenizer(recipe.teacher, teacher.get_input_embeddings().num_embeddings)
    student = load_student(run.student, recipe.student)
    layers = make_layer_map(
        recipe.layer_map, recipe.student.layers, teacher.config.num_hidden_layers
    )
    objective = make_objective(recipe, layers, student, teacher)
    load_projections(objective, run)
    corpus = share_corpus(recipe, tokenizer, ranks, progress=False)
    module = DistilledStudent(student, objective).to(ranks.device).eval()
    runner = TeacherRunner(teacher, recipe, objective, ranks)
    plan = plan_batches(recipe, ranks.world_size)
    heldout = as_inputs(corpus.heldout, make_masking(recipe, tokenizer), "heldout")
    return evaluate(module, runner, objective, heldout, plan.micro_batch_size, ranks)


def tokens_per_second(run: Callable[[Inputs], object], inputs: Inputs, ranks: Ranks) -> float:
    """Forward throughput of one rank: the median of five passes after a warm-up."""
    times = []
    with torch.no_grad():
        for _ in range(6):
            _synchronise(ranks)
            start = time.perf_counter()
            run(inputs)
            _synchronise(ranks)
            times.append(time.perf_counter() - start)
    return inputs["input_ids"].numel() / sorted(times[1:])[2]


def peak_memory(ranks: Ranks) -> int:
    """Peak bytes of this rank so far: of the GPU where there is one, else of the process."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the mean over tokens, [batch] fp64."""
    means = a.double().mean(dim=1), b.double().mean(dim=1)
    return torch.nn.functional.cosine_similarity(*means, dim=-1)


def _synchronise(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
