"""What `losses.hidden` and `losses.embedding` share: their section, projections and calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from fastkd_kernels import hidden_cosine, hidden_mse, hidden_normalized_mse
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.layer_map import AttentionMap, LayerMap
from fastkd.losses.base import Batch, Loss, LossConfig, LossGroup, Shared
from fastkd.losses.counts import Divisor

if TYPE_CHECKING:
    from fastkd.capture import Capture

Tokens = Literal["all", "cls", "mean"]


class StateConfig(LossConfig):
    """States of two layers, compared token by token or example by example."""

    kind: Literal["mse", "normalized_mse", "cosine"] = "mse"
    """Squared difference after the projection, the same of states scaled to length one (PKD, arXiv
    1908.09355, eq. 7), or one minus the cosine (DistilBERT, arXiv 1910.01108)."""
    tokens: Tokens = "all"
    """Every token, the first one, or the mean over all."""


class StateLoss(Loss):
    """A member of a `StateGroup`."""

    config: StateConfig

    @property
    def mean_over(self) -> Divisor:  # type: ignore[override]
        return "tokens" if self.config.tokens == "all" else "examples"


class StateGroup(LossGroup):
    """Hidden states and embeddings of all mapped layers, in one call where their kinds agree.

    The projections are parameters of this module itself, so that ZeRO-3 gathers them for its
    `forward`: `weight_0`, or `weight_0`, `weight_1`, ... with one a pair; [teacher, student] width.
    """

    def __init__(self, members: Sequence[Loss], shared: Shared) -> None:
        """Make the projections.

        Raises:
            UserError: no projection is asked for, but the widths differ.
        """
        super().__init__(members, shared)
        self.losses: list[StateLoss] = [loss for loss in members if isinstance(loss, StateLoss)]
        self.starts: list[int] = []
        count = 0
        for loss in self.losses:
            self.starts.append(count)
            count += len(loss.labels)
        self.projections = _projections(shared, count)
        self.bias = shared.projection_bias and self.projections > 0
        for index in range(self.projections):
            linear = nn.Linear(*shared.pair.widths, bias=shared.projection_bias)
            for kind, parameter in linear.named_parameters():
                self.register_parameter(f"{kind}_{index}", parameter)

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """Losses [matches], fp32."""
        groups: dict[tuple[str, Tokens], list[int]] = {}
        for number, loss in enumerate(self.losses):
            groups.setdefault((loss.config.kind, loss.config.tokens), []).append(number)
        losses: dict[int, Tensor] = {}
        for (kind, tokens), members in groups.items():
            found = self._compare(student, teacher, batch, kind, tokens, members)
            sizes = [len(self.losses[m].links) for m in members]
            losses |= dict(zip(members, torch.split(found, sizes), strict=True))
        return torch.cat([losses[number] for number in range(len(self.losses))])

    def _compare(
        self,
        student: Capture,
        teacher: Capture,
        batch: Batch,
        kind: str,
        tokens: Tokens,
        members: list[int],
    ) -> Tensor:
        """Losses of all links of some members, which share kind and tokens."""
        places = [
            (self.starts[m] + offset, link, self.losses[m].layer_map)
            for m in members
            for offset, link in enumerate(self.losses[m].links)
        ]
        mask = batch.mask if tokens == "all" else None
        student_states, teacher_states = [], []
        for place, link, layer_map in places:
            state = pooled(student.hidden[link.student], tokens, batch.mask)
            targets = [pooled(teacher.hidden[t], tokens, batch.mask) for t in link.teachers]
            student_states.append(state)
            teacher_states.append(self._target(place, state, targets, layer_map))
        weight, bias = (self._chosen(name, [place for place, _, _ in places]) for name in _NAMES)
        if kind == "mse":
            return hidden_mse(
                student_states,
                teacher_states,
                weight=weight,
                bias=bias,
                mask=mask,
                reduction=self.shared.reduction if tokens == "all" else "valid",
            )
        op = hidden_normalized_mse if kind == "normalized_mse" else hidden_cosine
        return op(student_states, teacher_states, weight=weight, bias=bias, mask=mask)

    @torch.no_grad()
    def _target(
        self, place: int, state: Tensor, targets: list[Tensor], layer_map: LayerMap | None
    ) -> Tensor:
        """The state that a link learns from: a layer's, or a blend of several layers'."""
        if len(targets) == 1:
            return targets[0]
        if not isinstance(layer_map, AttentionMap):
            return torch.stack(targets).mean(dim=0)
        weight, bias = (self._chosen(name, [place]) for name in _NAMES)
        if isinstance(weight, Tensor):
            state = nn.functional.linear(state, weight, bias if isinstance(bias, Tensor) else None)
        # a token's own weights: softmax over layers of <student state, teacher state>; the weights
        # are detached, so the target does not move with the student (ALP-KD, arXiv 2012.14022)
        dtype = torch.promote_types(state.dtype, torch.float32)
        scores = torch.stack([(state * t).sum(dim=-1, dtype=dtype) for t in targets])
        shares = (scores / layer_map.temperature).softmax(dim=0)
        mixed = sum(
            (share.unsqueeze(-1) * t for share, t in zip(shares, targets, strict=True)),
            torch.zeros((), device=state.device),
        )
        return mixed.to(targets[0].dtype)

    def _chosen(self, name: str, places: list[int]) -> Tensor | list[Tensor] | None:
        if not self.projections or (name == "bias" and not self.bias):
            return None
        if self.projections == 1:
            return self.get_parameter(f"{name}_0")
        found: list[Tensor] = [self.get_parameter(f"{name}_{place}") for place in places]
        return found[0] if len(found) == 1 else found


_NAMES = ("weight", "bias")


def pooled(state: Tensor, tokens: Tokens, mask: Tensor | None) -> Tensor:
    """All of [batch, tokens, width], or one vector an example: [batch, 1, width]."""
    if tokens == "all":
        return state
    if tokens == "cls":
        return state[:, :1]
    if mask is None:
        return state.mean(dim=1, keepdim=True)
    valid = mask.unsqueeze(-1).to(state.dtype)
    return (state * valid).sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp(min=1)


def _projections(shared: Shared, pairs: int) -> int:
    student, teacher = shared.pair.widths
    if shared.projection == "none" and student != teacher:
        raise UserError(
            f"losses.projection is none, but the student is {student} wide and the teacher "
            f"{teacher}; set it to shared or per_pair"
        )
    identity = shared.projection == "none" or (shared.projection == "auto" and student == teacher)
    return 0 if identity else pairs if shared.projection == "per_pair" else 1
