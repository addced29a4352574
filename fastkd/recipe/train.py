"""The sections of the loop and of the run folder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastkd.recipe.section import Name, Section

DecayRate = Annotated[float, Field(ge=0, lt=1)]


class Train(Section):
    """The loop: length, batch, optimiser, precision, and what is written when."""

    steps: int = Field(default=1000, gt=0)
    """Optimiser steps."""
    batch_size: int = Field(default=32, gt=0)
    """Blocks in an optimiser step, over all ranks and micro-batches: results don't depend on
    how it is cut."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Blocks in one forward pass of one rank; the whole share of the rank where not given."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay, not applied to biases and normalisation weights."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """AdamW's decay rates."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up, to zero at the last step."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm is clipped to this; 0 switches clipping off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the student's forward and backward; master weights are fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage of the student."""
    seed: int = Field(default=0, ge=0)
    """Seed of initial weights, data order and dropout."""
    log_every: int = Field(default=10, gt=0)
    """Steps between two lines of metrics."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between held-out evaluations; 0 is before and after only."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 is at the end only."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints that are kept."""


class Run(Section):
    """Where a run is written and who is told."""

    output: Name
    """Folder of the run; it must not hold another run."""
    monitor: Literal["none", "tensorboard", "wandb"] = "none"
    """Tracker that DeepSpeed's monitor writes to."""
