"""What each loss of a step is multiplied with, and what losses make of that for the next step.

    weight of the recipe * factor of its schedule * weight of its link * scale of its term

The weight of a link is that of the layer map, or the flow that a many-to-many map has found. Scales
of `uncertainty` are learned, so they belong to the objective's own submodules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.layer_map import LayerMap, Progress, TransportMap, checked_links
from fastkd.losses.base import LossInfo
from fastkd.losses.transports import Mapped, Transports
from fastkd.losses.weighting import Ratio, factor
from fastkd.recipe import Losses


class StepWeights:
    """Weights of all losses at a moment of the run.

    No submodule: an engine in bf16 would round its tensors, and a checkpoint keeps `feedback`.
    """

    def __init__(
        self, losses: Losses, matches: Sequence[LossInfo], maps: Mapping[str, LayerMap]
    ) -> None:
        """Begin at the first step.

        Args:
            losses: section of the recipe.
            matches: every loss, in the order of `Objective.forward`.
            maps: by the term's name.
        """
        self._losses, self._matches, self._maps = losses, matches, maps
        self._moment, self._share = Progress(), 0.0
        self.names = tuple(dict.fromkeys(match.term for match in matches))
        # how many losses each name has, in order
        self._sizes = [len(list(group)) for _, group in itertools.groupby(m.term for m in matches)]
        self.transports = Transports(self._transported())
        balance = losses.balance
        self._ratio = (
            Ratio(self.names, balance.reference, balance.decay) if balance.kind == "ratio" else None
        )
        self._held: Tensor | None = None
        self._factors = torch.empty(0)
        self._factors_of: list[float] = []

    def at(self, moment: Progress, share: float) -> None:
        """Move to a moment of the run, of which that share is done: links and schedules follow."""
        self._moment, self._share = moment, share

    @property
    def adapts(self) -> bool:
        """Whether the losses of a step change the weights of the next: see `observe`."""
        return self._ratio is not None or bool(self.transports.groups)

    @property
    def needs_look(self) -> bool:
        """Whether losses must be observed before the first step."""
        unknown = self._ratio is not None and self._ratio.means is None
        return unknown or not self.transports.observed

    def observe(self, losses: Tensor) -> None:
        """Adapt the weights of the next step.

        Args:
            losses: raw losses [labels] of a whole step, summed over micro-batches and ranks.
        """
        if self.transports.groups:
            # an exact linear program runs on the host: see `transports.py`
            costs = losses.tolist()
            # of costs that are not finite there is none, and the run ends at its next metrics
            if all(map(math.isfinite, costs)):
                self.transports.observe(costs)
        if self._ratio is not None:
            values = losses.double()
            links = torch.tensor(self._link_weights(), dtype=values.dtype)
            links = links.to(values.device, non_blocking=True)
            self._ratio.observe(self.by_term(values * links))

    def feedback(self) -> dict[str, Any]:
        """What `observe` has made, for a checkpoint; plain values."""
        ratio = None if self._ratio is None else self._ratio.state()
        return {"ratio": ratio, "transports": self.transports.state()}

    def load_feedback(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from what `feedback` gave."""
        if self._ratio is not None:
            self._ratio.load(state["ratio"], device)
        self.transports.load(state["transports"])

    def total(self, losses: Mapping[str, float]) -> float:
        """One number for held-out losses that can be compared over a run and between runs.

        The recipe's weights, without schedules and balance; a many-to-many mapping counts with the
        transport that these losses have between equal layers.

        Args:
            losses: raw loss by label.
        """
        values = [losses[match.label] for match in self._matches]
        even = Transports(self._transported())
        if even.groups:
            even.observe(values)
        links = even.weigh(self._own_weights())
        terms = self._losses.terms
        return sum(
            terms[match.term].weight * link * value
            for match, link, value in zip(self._matches, links, values, strict=True)
        )

    def hold(self, like: Tensor) -> None:
        """Keep the weights of steps of the training in one tensor from now on, in the dtype and on
        the device of another: a recorded step reads it, and `refresh` writes it."""
        self._held = torch.zeros(len(self._matches), dtype=like.dtype, device=like.device)
        self.refresh()

    def refresh(self) -> None:
        """Write the weights of the moment where a recorded step reads them."""
        if self._held is not None:
            self._held.copy_(self._now(self._held))

    def of_losses(self, like: Tensor, *, training: bool) -> Tensor:
        """The weights of the moment, [labels], in the dtype and on the device of another tensor.

        Args:
            like: the other tensor.
            training: whether a step of the training reads them, see `hold`.
        """
        if self._held is not None and training:
            return self._held
        return self._now(like)

    def _now(self, like: Tensor) -> Tensor:
        """Weight, schedule, link and ratio of every loss, [labels]; copied where they changed."""
        terms, share = self._losses.terms, self._share
        of = {name: terms[name].weight * factor(terms[name].schedule, share) for name in terms}
        links = self._link_weights()
        found = [of[m.term] * link for m, link in zip(self._matches, links, strict=True)]
        kept = self._factors
        same = (kept.dtype, kept.device) == (like.dtype, like.device)
        # a tensor of inference mode is of no use to a step that trains
        same &= torch.is_inference_mode_enabled() or not kept.is_inference()
        if found != self._factors_of or not same:
            self._factors = torch.tensor(found, dtype=like.dtype).to(like.device, non_blocking=True)
            self._factors_of = found
        scales = None if self._ratio is None else self._ratio.scales()
        return self._factors if scales is None else self._factors * self.spread(scales).to(like)

    def by_term(self, values: Tensor) -> Tensor:
        """Sums over the losses of each term, [terms], of one value a loss."""
        return torch.stack([part.sum() for part in torch.split(values, self._sizes)])

    def spread(self, scales: Tensor) -> Tensor:
        """One value a term to one a loss."""
        parts = zip(scales.unbind(), self._sizes, strict=True)
        return torch.cat([scale.expand(size) for scale, size in parts])

    def _link_weights(self) -> list[float]:
        return self.transports.weigh(self._own_weights())

    def _own_weights(self) -> list[float]:
        """Of the links in force, one a loss."""
        weights: list[float] = []
        for _, members in itertools.groupby(self._matches, key=lambda match: match.group):
            first, *rest = members
            links = checked_links(self._maps[first.term], self._moment) if first.mapped else ()
            weights += [link.weight for link in links] or [1.0] * (1 + len(rest))
        return weights

    def _transported(self) -> list[Mapped]:
        groups: list[Mapped] = []
        start = 0
        for group, members in itertools.groupby(self._matches, key=lambda match: match.group):
            same = list(members)
            stop = start + len(same)
            layer_map = self._maps[same[0].term]
            if same[0].mapped and isinstance(layer_map, TransportMap):
                groups.append(Mapped(group, layer_map, start, stop))
            start = stop
        return groups
