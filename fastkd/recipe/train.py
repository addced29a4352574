"""The sections of the loop and of the run folder."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fastkd.section import (
    LONGEST_RUN,
    MOST_ROWS,
    Name,
    Place,
    Section,
    Seed,
)

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class EarlyStopping(Section):
    """The end of a run whose evaluations become no better."""

    metric: Name
    """Number of an evaluation that decides: `total`, `score` of a task, `sentence_cosine`,
    `perplexity`, the name of a set of pairs, or the label of a loss; whether more or less is better
    is known."""
    patience: int = Field(gt=0, le=LONGEST_RUN)
    """Evaluations without a better number after which the run ends."""
    minimum_change: float = Field(default=0.0, ge=0)
    """By how much a better number is better, at least."""


class Train(Section):
    """The loop: length, batch, optimiser, precision, and what is written when."""

    steps: int = Field(default=1000, ge=0, le=LONGEST_RUN)
    """Optimiser steps; 0 where `epochs` says how many. A run can be resumed with more of them where
    `schedule` is constant and nothing else is stretched over the run: it ends as if it had been
    given them at once. Otherwise the steps that were made depend on it, and it is refused."""
    epochs: float | None = Field(default=None, gt=0, le=1e6)
    """Passes over the data, in place of `steps`."""
    batch_size: int = Field(default=32, gt=0, le=MOST_ROWS)
    """Blocks, or examples of a task, in an optimiser step, over all ranks and micro-batches:
    results don't depend on how it is cut."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Blocks or examples in one forward pass of one rank; the whole share of the rank where not
    given. A run can be resumed with another one, as when memory runs out."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """What updates the student: AdamW, or Muon (momentum that is made orthogonal, scaled to the
    size of AdamW's updates) for the matrices of its blocks and AdamW for all else: embeddings,
    heads, projections, biases, norms, stacked experts."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate, of either optimiser."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay, not applied to biases and normalisation weights."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """AdamW's decay rates."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up, the first of them at a rate of 0."""
    warmup_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps, in place of `warmup_steps`."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up. `linear` and `cosine` come to zero at the step after the last, so
    that the last one still learns: with `linear` at the peak divided by the steps that follow the
    warm-up."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm is clipped to this; 0 switches clipping off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the student's forward and backward; master weights are fp32. `auto` is bf16 on a
    GPU that computes in it, fp32 elsewhere, with `zero_stage` 0, and of a model that keeps some
    parameters in fp32."""
    tf32: bool = True
    """Whether products of fp32 matrices in the models read TF32 on a GPU, where the process has not
    said otherwise; those of the kernels never do."""
    compile: bool = False
    """Whether both models run under `torch.compile`, each as one graph, in the steps of the
    training, of which the first ones compile. It needs a C++ compiler, on a GPU one of C."""
    cuda_graph: bool = False
    """Whether forward and backward of a micro-batch are recorded in a CUDA graph, one for each of
    its first 32 shapes; of a run on one GPU, whose losses no number of Python changes from step to
    step."""
    profile: bool = False
    """Whether time and memory of the steps are measured by phase and by part, for the summary and
    the report."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage of the student. Stages 2 and 3 reduce gradients at every micro-batch,
    0 and 1 once a step."""
    seed: Seed = 0
    """Seed of weights that are drawn and, unless they have one of their own, of the order of the
    data, of dropout and of layer maps that are drawn."""
    order_seed: Seed | None = None
    """Seed of the order of the data and of the words that are masked; `seed` where not given."""
    dropout_seed: Seed | None = None
    """Seed of dropout; `seed` where not given."""
    log_every: int = Field(default=10, gt=0)
    """Steps between two lines of metrics."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between held-out evaluations; 0 is before and after only."""
    early_stopping: EarlyStopping | None = None
    """When the run ends before its last step; never where not given."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 is at the end only."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints that are kept."""

    @property
    def order(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.order_seed is None else self.order_seed

    @property
    def dropping(self) -> int:
        """The seed of dropout."""
        return self.seed if self.dropout_seed is None else self.dropout_seed

    @property
    def number_bytes(self) -> int:
        """Bytes of a number of the student as it computes; `auto` is settled before."""
        return 2 if self.precision == "bf16" else 4

    @model_validator(mode="before")
    @classmethod
    def _without_steps(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("epochs") is not None and not tree.get("steps"):
            return {**tree, "steps": 0}
        return tree

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.epochs is not None and self.steps:
            raise ValueError(
                f"steps is {self.steps} and epochs {self.epochs:g}; give one of them and set the "
                "other to null"
            )
        if self.epochs is None and not self.steps:
            raise ValueError("steps is 0, expected more, or epochs in its place")
        if self.warmup_steps and self.warmup_share:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and warmup_share {self.warmup_share:g}; give "
                "one of them and set the other to 0"
            )
        return self


def check_steering(train: Train, run: RunOutput) -> None:
    """Refuse evaluations that shall decide, but are not made while the run trains.

    Raises:
        ValueError: naming what they shall decide.
    """
    for field, given in (
        ("train.early_stopping", train.early_stopping),
        ("run.keep_best", run.keep_best),
    ):
        if given is not None and not train.evaluate_every:
            raise ValueError(
                f"{field} is given, but train.evaluate_every is 0, so nothing is evaluated before "
                "the last step; set it to a number of steps"
            )


def check_train(train: Train) -> None:
    """Refuse numbers of the loop that don't go together.

    Raises:
        ValueError: naming them.
    """
    if train.precision == "bf16" and train.zero_stage == 0:
        raise ValueError(
            "train.precision is bf16 and train.zero_stage 0, where DeepSpeed takes one "
            "spurious optimiser step; use zero_stage 1"
        )
    if train.profile and train.cuda_graph:
        raise ValueError(
            "train.profile and train.cuda_graph are on, and the phases of a step that is recorded "
            "as one can't be told apart; leave one of them out"
        )
    if train.compile and train.zero_stage == 3:
        raise ValueError(
            "train.compile is on and train.zero_stage 3, which gathers weights between the layers "
            "of a graph; use zero_stage 2, or leave compile out"
        )
    if train.optimizer == "muon" and train.zero_stage == 3:
        raise ValueError(
            "train.optimizer is muon and train.zero_stage 3, which cuts every matrix into pieces, "
            "where Muon needs whole ones; use zero_stage 2, or adamw"
        )
    if train.steps and train.warmup_steps >= train.steps:
        raise ValueError(
            f"train.warmup_steps is {train.warmup_steps}, expected fewer than "
            f"train.steps ({train.steps})"
        )


def resolve_steps(train: Train, rows: int | None) -> Train:
    """The section with its numbers of steps written out.

    Args:
        train: as the recipe has it.
        rows: blocks or examples in one pass over the data; `None` where they are not counted.

    Raises:
        ValueError: `epochs` of data that is not counted, or a warm-up as long as the run.
    """
    found: dict[str, int] = {}
    if train.epochs is not None:
        if rows is None:
            raise ValueError("train.epochs: the data is streamed and not counted; give train.steps")
        found["steps"] = max(1, round(train.epochs * rows / train.batch_size))
        if found["steps"] > LONGEST_RUN:
            raise ValueError(
                f"train.epochs: {train.epochs:g} passes over {rows:,} rows are "
                f"{found['steps']:,} steps, expected at most {LONGEST_RUN:,}"
            )
    steps = found.get("steps", train.steps)
    if train.warmup_share:
        # 0.29 of 100 is a little less than 29 in binary
        found["warmup_steps"] = int(train.warmup_share * steps + 1e-6)
    resolved = train.model_copy(update=found)
    check_train(resolved)
    return resolved


class RunOutput(Section):
    """Where a run is written and who is told."""

    output: Place
    """Folder of the run; it must not hold another run."""
    keep_best: Name | None = None
    """Number of an evaluation, as in `train.early_stopping.metric`: the student that is exported is
    the one of the step with the best. That of the last step where not given."""
    predictions: bool = False
    """Whether the folder holds `predictions.npz`, of a task with a class or score for each example:
    of every set that is scored `SET/outputs` [examples, outputs] of the exported student, and
    `SET/teacher` of the teacher, fp32 in the order of the set's file, `SET/labels` [examples], and
    the student's `step`. While the run trains, they are those of its best or last evaluation."""
    lean: bool = False
    """Whether a run leaves out what only people read: the evaluation before the first step, the
    speed of the models and of a teacher's cache, `report.html` and the model card. For many runs
    that are compared."""
    monitor: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Tracker that is told every number of `metrics.jsonl` by its name and step; its package is an
    extra of fastkd's."""
