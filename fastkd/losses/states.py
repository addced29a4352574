"""What `losses.hidden` and `losses.embedding` share: their section, projections and calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from fastkd_kernels import hidden_cosine, hidden_mse, hidden_normalized_mse
from pydantic import Field, model_validator
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.layer_map import AttentionMap, LayerMap, Progress
from fastkd.losses.base import Batch, Loss, LossConfig, LossGroup, Shared
from fastkd.losses.counts import Divisor
from fastkd.losses.pooling import BEGUN, Dense, EmbeddingModules, first_tokens

if TYPE_CHECKING:
    from fastkd.capture import Capture

Tokens = Literal["all", "cls", "mean"]


class StateConfig(LossConfig):
    """States of two layers, compared token by token or example by example."""

    kind: Literal["mse", "normalized_mse", "cosine"] = "mse"
    """Squared difference after the projection, the same of states scaled to length one (PKD, arXiv
    1908.09355, eq. 7), or one minus the cosine (DistilBERT, arXiv 1910.01108)."""
    average: bool = False
    """Whether `normalized_mse` is divided by the width of the teacher and the number of layer
    pairs, as PKD's own code has it, where its paper has sums."""
    tokens: Tokens = "all"
    """Every token, the first one that is no padding, or the mean over all."""
    projection: Literal["none", "shared", "own", "per_pair"] | None = None
    """From student to teacher width: none, the one that all losses share, one for this loss, or one
    a pair; as `losses.projection` says where not given."""
    projection_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of projections that are this loss's alone; `train.learning_rate` where not
    given."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.average and self.kind != "normalized_mse":
            raise ValueError(
                f"average is of normalized_mse, but kind is {self.kind}; leave average out"
            )
        given = self.projection_learning_rate is not None
        if given and self.projection not in ("own", "per_pair"):
            raise ValueError(
                "projection_learning_rate is of projections that no other loss has; give "
                "projection: own or per_pair, or losses.projection_learning_rate for all"
            )
        return self


class StateLoss(Loss):
    """A member of a `StateGroup`."""

    config: StateConfig

    @property
    def mean_over(self) -> Divisor:  # type: ignore[override]
        return "tokens" if self.config.tokens == "all" else "examples"

    @property
    def last_place(self) -> int | None:
        """Place of the link that alone ties the student's last layer to the teacher's last, by
        squared differences and at any time; `None` where there is none."""
        layers = self.layer_map
        if layers is None or layers.moves or self.config.kind != "mse" or not self.config.weight:
            return None
        links = enumerate(self.links_at(Progress()))
        last = [(n, link) for n, link in links if link.student == layers.student_layers]
        tied = len(last) == 1 and last[0][1].teachers == (layers.teacher_layers,)
        return last[0][0] if tied else None

    def states(self, student: Capture, teacher: Capture) -> list[tuple[Tensor, list[Tensor]]]:
        """The student's state of every label, and the teacher's that make its target."""
        return [
            (student.hidden[link.student], [teacher.hidden[t] for t in link.teachers])
            for link in self.links
        ]


class StateGroup(LossGroup):
    """Hidden states and embeddings of all mapped layers, in one call where their kinds agree.

    The projections are parameters of this module itself, so that ZeRO-3 gathers them for its
    `forward`: `weight_0`, `weight_1`, ... in the order in which they are first used, and `bias_0`,
    ...; [teacher, student] width.
    """

    # of all tokens no padding has to be told apart
    reads_packed: ClassVar[bool] = True

    def __init__(self, members: Sequence[Loss], shared: Shared) -> None:
        """Make the projections.

        Raises:
            UserError: no projection is asked for, but the widths differ.
        """
        super().__init__(members, shared)
        self.losses: list[StateLoss] = [loss for loss in members if isinstance(loss, StateLoss)]
        self.modes = [_mode(loss) for loss in self.losses]
        self.starts: list[int] = []
        # of every pair of all members, the number of its projection
        self.projection_of: list[int | None] = []
        self.rates: list[float | None] = []
        self._begun = ""
        common: int | None = None
        for loss, mode in zip(self.losses, self.modes, strict=True):
            self.starts.append(len(self.projection_of))
            rate = loss.config.projection_learning_rate or shared.projection_learning_rate
            if mode == "shared" and common is None:
                common = self._project(rate)
            one = common if mode == "shared" else self._project(rate) if mode == "own" else None
            for _ in loss.labels:
                self.projection_of.append(self._project(rate) if mode == "per_pair" else one)

    def _project(self, rate: float | None) -> int:
        """The number of a new projection."""
        index = len(self.rates)
        linear = nn.Linear(*self.shared.pair.widths, bias=self.shared.projection_bias)
        for kind, parameter in linear.named_parameters():
            self.register_parameter(f"{kind}_{index}", parameter)
        self.rates.append(rate)
        return index

    def parameter_rates(self) -> dict[str, float]:
        return {
            name: rate
            for name, _ in self.named_parameters()
            if (rate := self.rates[int(name.rpartition("_")[2])]) is not None
        }

    def student_modules(self) -> EmbeddingModules | None:
        """The embedding through the projection of the last layer. A linear map may stand before or
        behind a pooling whose weights add up to one; so it is exported as Dense behind it."""
        found, known = self._of_embedding(), self.shared.pair.embeddings
        if found is None or known is None:
            return None
        loss, weight, bias = found
        copies = weight.detach().clone(), None if bias is None else bias.detach().clone()
        made = Dense(*copies, learned_by=loss.name + self._begun)
        return known[1].of_student(self.shared.pair.widths[0], made)

    def _of_embedding(self) -> tuple[StateLoss, nn.Parameter, nn.Parameter | None] | None:
        """The projection that the student is exported with, weight and bias, and whose it is."""
        pair = self.shared.pair
        if pair.embeddings is None or not pair.last_is_output:
            return None
        pooling = pair.embeddings[1].pooling
        if len(pooling) > 1 or pooling[0] in ("max", "mean_sqrt_len"):
            return None
        for loss, start in zip(self.losses, self.starts, strict=True):
            place = loss.last_place
            number = None if place is None else self.projection_of[start + place]
            if number is not None:
                own = dict(self.named_parameters())
                return loss, own[f"weight_{number}"], own.get(f"bias_{number}")
        return None

    def begin_from(self, start: EmbeddingModules) -> bool:
        found, known, first = self._of_embedding(), self.shared.pair.embeddings, start.linear_map
        if found is None or known is None or first is None or start.pooling != known[1].pooling:
            return False
        _, weight, bias = found
        if first.weight.shape != weight.shape:
            return False
        with torch.no_grad():
            weight.copy_(first.weight)
            if bias is not None:
                bias.copy_(torch.zeros_like(bias) if first.bias is None else first.bias)
        self._begun = BEGUN
        return True

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """Losses [matches], fp32."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for number, (loss, mode) in enumerate(zip(self.losses, self.modes, strict=True)):
            # an op takes one projection for all pairs, or a list with one for each
            which = mode if mode == "per_pair" else self.projection_of[self.starts[number]]
            key = loss.config.kind, loss.config.tokens, which, _is_packed(loss, batch)
            groups.setdefault(key, []).append(number)
        losses: dict[int, Tensor] = {}
        for members in groups.values():
            found = self._compare(student, teacher, batch, members)
            sizes = [len(self.losses[m].labels) for m in members]
            losses |= dict(zip(members, torch.split(found, sizes), strict=True))
        width = self.shared.pair.widths[1]
        for number, loss in enumerate(self.losses):
            if loss.config.average:
                losses[number] = losses[number] / (width * len(loss.labels))
        return torch.cat([losses[number] for number in range(len(self.losses))])

    def _compare(
        self, student: Capture, teacher: Capture, batch: Batch, members: list[int]
    ) -> Tensor:
        """Losses of all links of some members, which share kind, tokens and way of projecting."""
        kind, tokens = (getattr(self.losses[members[0]].config, key) for key in ("kind", "tokens"))
        packed = _is_packed(self.losses[members[0]], batch)
        mask = batch.mask if tokens == "all" and not packed else None
        places, student_states, teacher_states = [], [], []
        for m in members:
            loss = self.losses[m]
            for place, (state, states) in enumerate(loss.states(student, teacher), self.starts[m]):
                reduced, *targets = (
                    one if packed else pooled(_padded(one, batch), tokens, batch.mask)
                    for one in (state, *states)
                )
                places.append(place)
                student_states.append(reduced)
                teacher_states.append(self._target(place, reduced, targets, loss.layer_map))
        weight, bias = (self._chosen(name, places) for name in _NAMES)
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
            # a student in half precision, whose projections are not
            state = state.to(weight.dtype)
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
        numbers = [self.projection_of[place] for place in places]
        if numbers[0] is None or (name == "bias" and not self.shared.projection_bias):
            return None
        found: dict[int | None, Tensor] = {
            number: self.get_parameter(f"{name}_{number}") for number in set(numbers)
        }
        return found[numbers[0]] if len(found) == 1 else [found[number] for number in numbers]


_NAMES = ("weight", "bias")


def pooled(state: Tensor, tokens: Tokens, mask: Tensor | None) -> Tensor:
    """All of [batch, tokens, width], or one vector an example: [batch, 1, width], a mean of them in
    fp32 or better."""
    if tokens == "all":
        return state
    if tokens == "cls":
        return first_tokens(state, mask).unsqueeze(1)
    state = state.to(torch.promote_types(state.dtype, torch.float32))
    if mask is None:
        return state.mean(dim=1, keepdim=True)
    valid = mask.unsqueeze(-1).to(state.dtype)
    return (state * valid).sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp(min=1)


def _is_packed(loss: StateLoss, batch: Batch) -> bool:
    """Whether a loss compares tokens in one row; a module's output may be padded already."""
    whole = loss.config.tokens == "all" and loss.captures.modules is None
    return batch.row is not None and whole


def _padded(state: Tensor, batch: Batch) -> Tensor:
    return state if batch.row is None else batch.row.padded_module(state)


def _mode(loss: StateLoss) -> str:
    """How a loss's states are projected: none, shared, own or per_pair."""
    student, teacher = loss.shared.pair.widths
    given = loss.config.projection
    mode = given or loss.shared.projection
    if mode == "none" and student != teacher:
        field = "losses.projection" if given is None else f"losses.{loss.name}.projection"
        raise UserError(
            f"{field} is none, but the student is {student} wide and the teacher {teacher}; set it "
            "to shared or per_pair"
        )
    if mode == "auto":
        return "none" if student == teacher else "shared"
    return mode
