"""torchdistill's row: its `DistillationBox`, with hooks on the modules that are compared.

It has no loss of attention and no masks, so both are written for it, as it wants them: losses and
the wrapper of the student are registered under names that its configuration then gives.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.layers import (
    PROBABILITIES,
    attention_scores,
    make_pair,
    mean_of_pairs,
    mean_of_tokens,
)
from benchmarks.peers.rows import LEARNING_RATE, Case, Step

Found = Mapping[str, Mapping[str, Any]]
PROJECTED, TERM = "projected_student", "masked_mean_square"


class Term(nn.Module):
    """A term of its loss, from what its hooks found of both models."""

    def __init__(self, kind: str, student: str, teacher: str, heads: int) -> None:
        super().__init__()
        self.kind, self.paths, self.heads = kind, (student, teacher), heads

    def forward(self, student: Found, teacher: Found, targets: Tensor, **_: Any) -> Tensor:
        """`targets` is the mask: the one thing of a batch that it hands to losses."""
        found = zip((student, teacher), self.paths, strict=True)
        own, other = (self._read(*one) for one in found)
        mean = mean_of_tokens if self.kind == "states" else mean_of_pairs
        return mean(own - other, targets)

    def _read(self, found: Found, path: str) -> Tensor:
        if self.kind == "scores":
            query, key = (found[f"{path}.{name}"]["output"] for name in ("query", "key"))
            return attention_scores(query, key, self.heads)
        given: Any = found[path]["output"]
        # an eager attention gives its context and its map
        return given[1] if self.kind == "probabilities" else given


@functools.cache
def _registered() -> None:
    """Tell it of the term and of the student with projections."""
    from torchdistill.losses.registry import register_mid_level_loss
    from torchdistill.models.registry import register_auxiliary_model_wrapper
    from torchdistill.models.wrapper import AuxiliaryModelWrapper

    class ProjectedStudent(AuxiliaryModelWrapper):  # type: ignore[misc]
        def __init__(
            self, student_model: nn.Module, projections: nn.ModuleList, paths: list[str], **_: Any
        ) -> None:
            super().__init__()
            self.student_model, self.projections, self.paths = student_model, projections, paths

        def forward(self, **inputs: Tensor) -> Any:
            return self.student_model(**inputs)

        def secondary_forward(self, found: Found) -> None:
            """Hooks find what these give."""
            for linear, path in zip(self.projections, self.paths, strict=True):
                linear(found[path]["output"])

    register_mid_level_loss(key=TERM)(Term)
    register_auxiliary_model_wrapper(key=PROJECTED)(ProjectedStudent)


def torchdistill_row(case: Case, loss: str) -> Step:
    """A step as in its examples: `forward_process`, then `post_forward_process`."""
    from torchdistill.core.distillation import get_distillation_box

    _registered()
    logging.getLogger("torchdistill").setLevel(logging.WARNING)
    pair = make_pair(case, "eager" if loss == PROBABILITIES else "sdpa")
    modules = [f"encoder.layer.{s - 1}.attention.self" for s, _ in pair.links]
    of_teacher = [f"encoder.layer.{t - 1}.attention.self" for _, t in pair.links]
    own = [f"student_model.{name}" for name in modules]
    states, taught = ([_state(ends[side]) for ends in pair.states] for side in (0, 1))
    states = [f"student_model.{name}" for name in states]
    compared = [f"projections.{n}" for n in range(len(pair.projections))] or states
    weight = pair.weight_of_mean(loss)
    terms = [_term(loss, *paths, pair.heads, weight) for paths in zip(own, of_teacher, strict=True)]
    terms += [_term("states", *paths, 1, 1.0) for paths in zip(compared, taught, strict=True)]
    ends = [""] if loss == PROBABILITIES else [".query", ".key"]
    hooked = [[f"{path}{end}" for path in paths for end in ends] for paths in (own, of_teacher)]
    wrapper = {"projections": pair.projections, "paths": states if len(pair.projections) else []}
    forward = "forward_batch_only_as_kwargs"
    box = get_distillation_box(
        pair.teacher,
        pair.student,
        {},
        {
            "num_epochs": 1,
            "teacher": {
                "forward_proc": forward,
                "forward_hook": {"output": [*hooked[1], *taught]},
                "requires_grad": False,
            },
            "student": {
                "forward_proc": forward,
                "forward_hook": {"output": sorted({*hooked[0], *states, *compared})},
                "auxiliary_model_wrapper": {"key": PROJECTED, "kwargs": wrapper},
            },
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {str(n): term for n, term in enumerate(terms)}},
            },
            "optimizer": {"key": "AdamW", "kwargs": {"lr": LEARNING_RATE, "fused": True}},
        },
        torch.device(case.device),
        [],
        False,
        1,
    )
    box.pre_epoch_process(epoch=0)

    def run() -> Tensor:
        total = box.forward_process(pair.inputs, targets=pair.mask)
        box.post_forward_process(loss=total)
        return total.detach()

    return Step(run=run, optimizer=box.optimizer)


def _state(layer: int) -> str:
    """The module that gives the state of a layer."""
    return f"encoder.layer.{layer - 1}" if layer else "embeddings"


def _term(kind: str, student: str, teacher: str, heads: int, weight: float) -> dict[str, Any]:
    options = {"kind": kind, "student": student, "teacher": teacher, "heads": heads}
    return {"criterion": {"key": TERM, "kwargs": options}, "weight": weight}
