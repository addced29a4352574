"""One vector a sequence from the states of its tokens: pooling, and what stands behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

Pooling = Literal["mean", "cls", "last"]
"""What a recipe may say."""
PoolingMode = Literal["mean", "cls", "last", "max", "weighted_mean", "mean_sqrt_len"]
"""What a model's own modules may do besides: the largest number of each channel, a mean weighted by
positions from 1 on, and the sum over the square root of the length."""


def pool_tokens(states: Tensor, mask: Tensor | None, pooling: PoolingMode) -> Tensor:
    """One vector of the tokens that are no padding: their mean, the first of them, the last, ...

    Args:
        states: [batch, tokens, width].
        mask: bool [batch, tokens], `None` where nothing is padded; padding may be on either side.
        pooling: which.

    Returns:
        [batch, width], in fp32 or better.
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    if mask is None:
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if pooling == "max":
        return states.masked_fill(~mask.unsqueeze(-1), -torch.inf).max(dim=1).values
    if pooling == "cls":
        return first_tokens(states, mask)
    if pooling == "last":
        places = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        chosen = places.masked_fill(~mask, 0).max(dim=1).values
        return states[torch.arange(len(states), device=states.device), chosen]
    weights = mask.unsqueeze(-1).to(states.dtype)
    if pooling == "weighted_mean":
        # positions are counted from the first token that is no padding
        weights = weights * mask.cumsum(dim=1).unsqueeze(-1)
    divisors = weights.sum(dim=1).clamp(min=1)
    if pooling == "mean_sqrt_len":
        divisors = divisors.sqrt()
    return (states * weights).sum(dim=1) / divisors


def first_tokens(states: Tensor, mask: Tensor | None) -> Tensor:
    """State of each row's first token that is no padding, [batch, width], of states [batch, tokens,
    width] and a mask as of `pool_tokens`."""
    if mask is None:
        return states[:, 0]
    places = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    chosen = places.masked_fill(~mask, mask.shape[1] - 1).min(dim=1).values
    return states[torch.arange(len(states), device=states.device), chosen]


class Dense(nn.Module):
    """A frozen linear layer and its activation, on vectors of any float dtype."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: nn.Module | None = None,
        learned_by: str = "",
    ) -> None:
        """Take weights over.

        Args:
            weight: [out, in].
            bias: [out].
            activation: without weights of its own.
            learned_by: the loss that trains what this is a copy of, for people.
        """
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.activation = activation
        self.learned_by = learned_by

    def forward(self, vectors: Tensor) -> Tensor:
        """[batch, in] to [batch, out]."""
        bias = None if self.bias is None else self.bias.to(vectors)
        made = linear(vectors, self.weight.to(vectors), bias)
        return made if self.activation is None else self.activation(made)


class LayerNorm(nn.Module):
    """A frozen layer norm."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """Take weights over, both [width]."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """[batch, width], each to mean 0 and variance 1, scaled and shifted."""
        weight, bias = self.weight.to(vectors), self.bias.to(vectors)
        return nn.functional.layer_norm(vectors, weight.shape, weight, bias)


class Normalize(nn.Module):
    """Every vector to length one."""

    def forward(self, vectors: Tensor) -> Tensor:
        """[batch, dim]."""
        return normalize(vectors, dim=-1)


class Truncate(nn.Module):
    """The first numbers of every vector."""

    def __init__(self, size: int) -> None:
        """Keep `size` of them, or all of fewer."""
        super().__init__()
        self.size = size

    def forward(self, vectors: Tensor) -> Tensor:
        """[batch, dim] to [batch, size]."""
        return vectors[:, : self.size]


Step = Dense | LayerNorm | Normalize | Truncate
"""What may stand behind the pooling."""


BEGUN = ", begun as that of student.init"
"""What is said of a projection that goes on where another run ended."""


class EmbeddingModules(nn.Module):
    """What makes one vector a sequence of a model's final states, as the model's user gets it.

    Nothing in it trains. It holds no parameters, so that engines and checkpoints leave it alone,
    and follows the states that it is given to their device.
    """

    def __init__(
        self,
        width: int,
        pooling: Sequence[PoolingMode] = ("mean",),
        steps: Sequence[Step] = (),
        projection: Dense | None = None,
        *,
        alone: bool = False,
    ) -> None:
        """Put modules behind each other.

        Args:
            width: of the states.
            pooling: what the pooled vector is made of, one after the other.
            steps: what stands behind it.
            projection: what stands between the two.
            alone: whether the steps are those of no one teacher, so that a student of several
                carries none of a teacher's folder.

        Raises:
            ValueError: weights for vectors of another width than they would be given.
        """
        super().__init__()
        self.width = width
        self.pooling = tuple(pooling)
        self.projection = projection
        self.alone = alone
        self.steps = nn.ModuleList(steps)
        self.dim = self.pooled_dim
        for step in (*([] if projection is None else [projection]), *steps):
            if isinstance(step, Normalize):
                continue
            if isinstance(step, Truncate):
                self.dim = min(self.dim, step.size)
                continue
            kind, taken = type(step).__name__, step.weight.shape[-1]
            if taken != self.dim:
                raise ValueError(f"{kind} is for vectors of {taken}, but is given {self.dim}")
            self.dim = step.weight.shape[0]

    @property
    def pooled_dim(self) -> int:
        """Numbers in a pooled vector."""
        return self.width * len(self.pooling)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """The embeddings.

        Args:
            states: after the final norm, [batch, tokens, width].
            mask: bool [batch, tokens], `None` where nothing is padded.

        Returns:
            [batch, dim], in fp32 or better.
        """
        vectors = self.pool(states, mask)
        return self.finish(vectors if self.projection is None else self.projection(vectors))

    def pool(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """The pooled vectors alone, [batch, pooled_dim]."""
        self._follow(states)
        return torch.cat([pool_tokens(states, mask, mode) for mode in self.pooling], dim=-1)

    def finish(self, vectors: Tensor) -> Tensor:
        """What stands behind pooling and projection, from such vectors to [batch, dim]."""
        for step in self.steps:
            vectors = step(vectors)
        return vectors

    def given(self) -> list[Step]:
        """The steps behind pooling and projection."""
        return [step for step in self.steps if isinstance(step, Step)]

    @property
    def linear_map(self) -> Dense | None:
        """The linear layer right behind the pooling, which may be a projection that a run learned;
        `None` where something else stands there."""
        first = next(iter(self.given()), None)
        return first if isinstance(first, Dense) and first.activation is None else None

    def pooled_by(self, pooling: Sequence[PoolingMode]) -> EmbeddingModules:
        """These modules with another pooling.

        Raises:
            ValueError: what stands behind it takes vectors of another width.
        """
        return EmbeddingModules(self.width, pooling, self.given(), self.projection)

    def of_student(
        self,
        width: int,
        projection: Dense | None = None,
        pooling: Sequence[PoolingMode] | None = None,
    ) -> EmbeddingModules:
        """The modules of a student of this model, a teacher.

        Args:
            width: of the student's states.
            projection: from its pooled vectors to the teacher's, behind which stands all that the
                teacher has; without one weights for another width are left out.
            pooling: of the student; the teacher's where not given.
        """
        pooling = self.pooling if pooling is None else pooling
        fits = projection is not None or width * len(pooling) == self.pooled_dim
        free = (Normalize, Truncate)
        kept = [step for step in self.given() if fits or isinstance(step, free)]
        return EmbeddingModules(width, pooling, kept, projection, alone=self.alone)

    def describe(self) -> str:
        """The modules, for people."""
        modes = " and ".join(self.pooling).replace("_", " ")
        parts = [f"{modes} pooling of {self.width} numbers"]
        if self.projection is not None:
            size, given = self.projection.weight.shape
            parts.append(f"Dense {given} to {size} from losses.{self.projection.learned_by}")
        for step in self.given():
            kind, sizes = type(step).__name__, ""
            if isinstance(step, Dense):
                sizes = " {1} to {0}".format(*step.weight.shape)
            elif isinstance(step, Truncate):
                sizes = f" to {step.size}"
            parts.append(kind + sizes)
        return ", ".join(parts)

    def _follow(self, states: Tensor) -> None:
        buffer = next(self.buffers(), None)
        if buffer is not None and buffer.device != states.device:
            self.to(states.device)
