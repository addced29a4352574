"""Many-to-many mappings while a run goes on: flows from costs (BERT-EMD, arXiv 2010.06133).

The flow of a step is computed from the costs of the step before (the first one from a look at its
own batch), summed over micro-batches and ranks: results do not depend on how a step is cut, and
all ranks solve the same small program. It takes one copy of the costs to the host a step, which an
exact linear program cannot do without; nothing else in a step waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastkd.layer_map import Transport, TransportMap


@dataclass
class Mapped:
    """A group of losses over all pairs of one many-to-many map: places start to stop of all."""

    group: str
    layer_map: TransportMap
    start: int
    stop: int
    flow: list[float] = field(default_factory=list)


class Transports:
    """The flows of all groups; groups of one mapping share the weights of its layers."""

    def __init__(self, groups: list[Mapped]) -> None:
        self.groups = groups
        self.observed = not groups
        self.shared: dict[TransportMap, Transport] = {
            g.layer_map: Transport.even(g.layer_map.student_layers, g.layer_map.teacher_layers)
            for g in groups
        }

    def observe(self, losses: list[float]) -> None:
        """Solve for the flows of the next step, and move the weights of the layers."""
        for layer_map, transport in self.shared.items():
            members = [group for group in self.groups if group.layer_map == layer_map]
            shape = layer_map.student_layers, layer_map.teacher_layers
            costs = [np.array(losses[g.start : g.stop]).reshape(shape) for g in members]
            flows = [transport.flow(cost) for cost in costs]
            for group, flow in zip(members, flows, strict=True):
                group.flow = (layer_map.total * flow).ravel().tolist()
            if layer_map.layer_weights == "cost":
                transport.attend(costs, flows)
            elif layer_map.layer_weights == "softmax":
                transport.attend(costs, flows, layer_map.temperature)
        self.observed = True

    def weigh(self, weights: list[float]) -> list[float]:
        """The weights of all losses with the flows in place of the links' own."""
        found = list(weights)
        for group in self.groups:
            if group.flow:
                found[group.start : group.stop] = group.flow
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "observed": self.observed,
            "flows": [group.flow for group in self.groups],
            "layers": [(t.student.tolist(), t.teacher.tolist()) for t in self.shared.values()],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.observed = state["observed"]
        for group, flow in zip(self.groups, state["flows"], strict=True):
            group.flow = flow
        for transport, (student, teacher) in zip(
            self.shared.values(), state["layers"], strict=True
        ):
            transport.student, transport.teacher = np.array(student), np.array(teacher)
