"""What a step holds in memory, by part, counted while one is made.

Weights, gradients and moments are counted from the tensors that hold them, and so is what was
captured of the teacher. Activations are what lies between before and after the student's forward
pass: on a GPU the allocator says so, on a CPU the tensors are counted that autograd keeps for the
backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.losses.objective import DistilledStudent
from fastkd.training.dry_pass import Storages, bytes_of, tensors_of
from fastkd.training.local_engine import LocalEngine

CAPTURED, ACTIVATIONS = "captured of the teacher", "activations"


class StepMemory:
    """Bytes by part, of the step with the largest micro-batch so far."""

    def __init__(
        self,
        module: DistilledStudent,
        teacher: nn.Module | None,
        engine: Any,
        device: torch.device,
        computed: Mapping[str, int],
        *,
        captured: int = 1,
    ) -> None:
        """Listen.

        Args:
            module: what trains.
            teacher: the other model, where there is one.
            engine: around the module.
            device: whose memory is meant.
            computed: bytes as `memory_parts` has them, of the parts that lie on the device. Those
                of gradients stay what they are under DeepSpeed, which keeps them to itself.
            captured: micro-batches whose states of the teacher are there at a time.
        """
        self.parts = dict(computed)
        """Bytes by part."""
        self._module = module
        self._teacher = teacher
        self._engine = engine
        self._device = device
        self._captured = captured
        self._largest = 0
        self._looking = False
        self._start = 0
        self._saved: Storages | None = None
        self._hooks = ExitStack()
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def look_at_gradients(self) -> None:
        """Count them once they are there, if this step is looked at."""
        if self._looking and isinstance(self._engine, LocalEngine):
            groups = self._engine.optimizer.param_groups
            updated = [p for group in groups for p in group["params"]]
            # one that the step doesn't reach gets a gradient of zeros with the update
            self._count("gradients", [p if p.grad is None else p.grad for p in updated])

    def looked(self) -> bool:
        """Whether the step that is done was looked at; then weights and moments are counted."""
        looking, self._looking = self._looking, False
        if looking:
            weights = [*map(_shard, self._module.parameters())]
            self._count("student weights", weights)
            self._count("model weights", weights)
            if self._teacher is not None:
                self._count("teacher weights", map(_shard, self._teacher.parameters()))
            self._count("optimiser", _updated(self._engine, weights))
        return looking

    def _before(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        inputs, teacher, *_ = given
        size = inputs["input_ids"].numel()
        if size <= self._largest:
            return
        self._largest, self._looking = size, True
        if self._teacher is not None:
            self.parts[CAPTURED] = self._captured * bytes_of(tensors_of(teacher))
        if self._device.type == "cuda":
            self._start = torch.cuda.memory_allocated(self._device)
            return
        weights = list(self._module.parameters())
        if any(hasattr(weight, "ds_tensor") for weight in weights):
            # what ZeRO-3 gathers for a moment can't be told from what stays
            return
        known = [*weights, *tensors_of(teacher)]
        self._saved = Storages({tensor.untyped_storage()._cdata for tensor in known})
        hooks = torch.autograd.graph.saved_tensors_hooks(self._saved.note, lambda tensor: tensor)
        self._hooks.enter_context(hooks)

    def _after(self, module: nn.Module, given: Any, output: Any) -> None:
        if self._saved is not None:
            self._hooks.close()
            self.parts[ACTIVATIONS] = self._saved.bytes
            self._saved = None
        elif self._start:
            self.parts[ACTIVATIONS] = torch.cuda.memory_allocated(self._device) - self._start
            self._start = 0

    def _count(self, part: str, tensors: Iterable[Tensor]) -> None:
        if part in self.parts:
            here = [t for t in tensors if t.device.type == self._device.type]
            self.parts[part] = sum(t.numel() * t.element_size() for t in here)


def _shard(parameter: Tensor) -> Tensor:
    """What this rank keeps of a parameter between passes."""
    shard: Tensor = getattr(parameter, "ds_tensor", parameter)
    return shard


def _updated(engine: Any, weights: Iterable[Tensor]) -> list[Tensor]:
    """What an optimiser keeps: its moments, and the numbers it updates where those are not the
    weights themselves."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    own = {weight.data_ptr() for weight in weights}
    found = []
    for number, state in optimizer.state.items():
        found += [value for value in state.values() if isinstance(value, Tensor)]
        found += [] if number.data_ptr() in own else [number]
    return found
