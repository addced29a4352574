"""The term that compares hidden states and embeddings, and its projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastkd_kernels import hidden_cosine, hidden_mse, hidden_normalized_mse
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.layer_map import AttentionMap, LayerMap, Link, Progress
from fastkd.losses.base import (
    Batch,
    LossInfo,
    ModelPair,
    Term,
)
from fastkd.losses.counts import Reduction
from fastkd.recipe.losses import EmbeddingLoss, Losses
from fastkd.types import Side

EMBEDDINGS = Link(0, (0,))


@dataclass(frozen=True)
class _Part:
    """The links of one section of the recipe, and where they start among all."""

    name: str
    loss: EmbeddingLoss
    layer_map: LayerMap | None
    start: int

    def links(self, moment: Progress) -> tuple[Link, ...]:
        return (EMBEDDINGS,) if self.layer_map is None else self.layer_map.links(moment)

    @property
    def labels(self) -> tuple[str, ...]:
        return ("0-0",) if self.layer_map is None else self.layer_map.labels()


class StateTerm(Term):
    """Hidden states and embeddings of all mapped layers, in one call where their kinds agree.

    The projections are parameters of this module itself, so that ZeRO-3 gathers them for its
    `forward`: `weight_0`, or `weight_0`, `weight_1`, ... with one a pair; [teacher, student] width.
    """

    def __init__(self, losses: Losses, layer_map: LayerMap | None, pair: ModelPair) -> None:
        """Make the projections.

        Args:
            losses: section of the recipe.
            layer_map: of the hidden states, where they are compared.
            pair: of models.

        Raises:
            UserError: no projection is asked for, but the widths differ.
        """
        super().__init__()
        self.reduction: Reduction = losses.reduction
        self.parts: list[_Part] = []
        count = 0
        for name, loss, mapping in (
            ("hidden", losses.hidden, layer_map),
            ("embedding", losses.embedding, None),
        ):
            if loss is not None:
                self.parts.append(_Part(name, loss, mapping, count))
                count += len(self.parts[-1].labels)
        self.matches = tuple(
            LossInfo(
                part.name, part.name, label, "tokens" if part.loss.tokens == "all" else "examples"
            )
            for part in self.parts
            for label in part.labels
        )
        self.projections = _projections(losses, count, pair.widths)
        self.bias = losses.projection_bias and self.projections > 0
        for index in range(self.projections):
            linear = nn.Linear(*pair.widths, bias=losses.projection_bias)
            for kind, parameter in linear.named_parameters():
                self.register_parameter(f"{kind}_{index}", parameter)
        self.at(Progress())

    def at(self, moment: Progress) -> None:
        self.links = [list(part.links(moment)) for part in self.parts]

    def layers(self, side: Side) -> dict[str, set[int]]:
        links = [link for part in self.links for link in part]
        if side == "student":
            return {"hidden": {link.student for link in links}}
        return {"hidden": {t for link in links for t in link.teachers}}

    def forward(self, batch: Batch) -> Tensor:
        """Losses [matches], fp32."""
        groups: dict[tuple[str, str], list[int]] = {}
        for number, part in enumerate(self.parts):
            groups.setdefault((part.loss.kind, part.loss.tokens), []).append(number)
        losses: dict[int, Tensor] = {}
        for (kind, tokens), members in groups.items():
            found = self._compare(batch, kind, tokens, members)
            sizes = [len(self.links[m]) for m in members]
            losses |= dict(zip(members, torch.split(found, sizes), strict=True))
        return torch.cat([losses[number] for number in range(len(self.parts))])

    def _compare(self, batch: Batch, kind: str, tokens: str, members: list[int]) -> Tensor:
        """Losses of all links of some parts, which share kind and tokens."""
        places = [
            (self.parts[m].start + offset, link, self.parts[m].layer_map)
            for m in members
            for offset, link in enumerate(self.links[m])
        ]
        mask = batch.mask if tokens == "all" else None
        student, teacher = [], []
        for place, link, layer_map in places:
            own = _reduced(batch.student.hidden[link.student], tokens, batch.mask)
            targets = [_reduced(batch.teacher.hidden[t], tokens, batch.mask) for t in link.teachers]
            student.append(own)
            teacher.append(self._target(place, own, targets, layer_map))
        weight, bias = (self._chosen(name, [place for place, _, _ in places]) for name in _NAMES)
        if kind == "mse":
            reduction = self.reduction if tokens == "all" else "valid"
            return hidden_mse(
                student, teacher, weight=weight, bias=bias, mask=mask, reduction=reduction
            )
        op = hidden_normalized_mse if kind == "normalized_mse" else hidden_cosine
        return op(student, teacher, weight=weight, bias=bias, mask=mask)

    @torch.no_grad()
    def _target(
        self, place: int, own: Tensor, targets: list[Tensor], layer_map: LayerMap | None
    ) -> Tensor:
        """The state that a link learns from: a layer's, or a blend of several layers'."""
        if len(targets) == 1:
            return targets[0]
        if not isinstance(layer_map, AttentionMap):
            return torch.stack(targets).mean(dim=0)
        weight, bias = (self._chosen(name, [place]) for name in _NAMES)
        if isinstance(weight, Tensor):
            own = nn.functional.linear(own, weight, bias if isinstance(bias, Tensor) else None)
        # a token's own weights: softmax over layers of <student state, teacher state>; the weights
        # are detached, so the target does not move with the student (ALP-KD, arXiv 2012.14022)
        dtype = torch.promote_types(own.dtype, torch.float32)
        scores = torch.stack([(own * t).sum(dim=-1, dtype=dtype) for t in targets])
        shares = (scores / layer_map.temperature).softmax(dim=0)
        mixed = sum(
            (share.unsqueeze(-1) * t for share, t in zip(shares, targets, strict=True)),
            torch.zeros((), device=own.device),
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


def _reduced(state: Tensor, tokens: str, mask: Tensor | None) -> Tensor:
    """All of [batch, tokens, width], or one vector an example: [batch, 1, width]."""
    if tokens == "all":
        return state
    if tokens == "cls":
        return state[:, :1]
    if mask is None:
        return state.mean(dim=1, keepdim=True)
    valid = mask.unsqueeze(-1).to(state.dtype)
    return (state * valid).sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp(min=1)


def _projections(losses: Losses, pairs: int, widths: tuple[int, int]) -> int:
    student, teacher = widths
    if losses.projection == "none" and student != teacher:
        raise UserError(
            f"losses.projection is none, but the student is {student} wide and the teacher "
            f"{teacher}; set it to shared or per_pair"
        )
    identity = losses.projection == "none" or (losses.projection == "auto" and student == teacher)
    return 0 if identity else pairs if losses.projection == "per_pair" else 1
