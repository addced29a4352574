"""Models whose weights are spread over ranks: where losses still get all of them, and where not.

A model that was sharded reduces the gradients of its own weights. What stands beside a student,
such as projections, is reduced where the module around both is sharded, after the layers inside it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fastkd.capture.blocks import find_blocks
from fastkd.errors import UserError

_MANAGED = "_is_fsdp_managed_module"
"""What both kinds of FSDP set on the modules whose weights they hold."""
_SHARD = "fully_shard(layer) for layers of the student, then fully_shard(distiller)"


def _managed(model: nn.Module) -> bool:
    return any(_MANAGED in module.__dict__ for module in model.modules())


def _spread(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def check_not_sharded(student: PreTrainedModel) -> None:
    """See that a student is whole while its losses are set up.

    Raises:
        UserError: its weights are spread over ranks already.
    """
    if _managed(student) or _spread(student):
        raise UserError(
            "the student is sharded already, and what trains beside it would be left out; give it "
            f"whole to the Distiller, and shard afterwards: {_SHARD}"
        )


def check_whole_heads(teacher: PreTrainedModel) -> None:
    """See that every rank computes all heads of a teacher, as sharded ones do too.

    Raises:
        UserError: its weights are split, as of tensor parallelism.
    """
    if _spread(teacher) and not _managed(teacher):
        raise UserError(
            "the teacher's weights are split over ranks (tensor parallelism), so that each has some"
            " of its heads, but losses read them all; give a teacher that is whole, or was sharded "
            "by fully_shard"
        )


def check_sharding(outer: nn.Module, student: PreTrainedModel, layers: dict[str, Any]) -> None:
    """See that the gradients of a student, and of what trains beside it, are reduced.

    Args:
        outer: the module that holds all that trains.
        student: the model inside it.
        layers: what is captured of the student, see `capture`.

    Raises:
        UserError: the student alone was sharded, or a layer that FSDP would not gather again.
    """
    if not isinstance(outer, FSDPModule):
        alone = _managed(student) or _spread(student)
    else:
        alone = isinstance(student, FSDPModule)
    if alone:
        raise UserError(
            "the student was sharded without the distiller, and gradients of what trains beside it "
            "would stay apart on each rank; shard the distiller, not the student, by FSDP2 "
            f"(torch.distributed.fsdp): {_SHARD}"
        )
    top = max(layers["attention"], default=0)
    behind = layers["outputs"] or layers["logits"] or layers["modules"]
    if not top or behind or max(layers["hidden"], default=0) >= top:
        return
    # gradients of a group are waited for where its output is read
    block = find_blocks(student)[top - 1]
    if any(isinstance(module, FSDPModule) for module in block.modules()):
        raise UserError(
            f"layer {top} of the student was sharded by itself, but losses read its attention "
            "alone and not what it gives, so that FSDP would not gather it for the backward pass; "
            f"leave layer {top} to fully_shard(distiller), or add a loss on its hidden states"
        )
