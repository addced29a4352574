"""How wide a student's feed-forward layers are, and whether the one number says it.

Families of experts give them a width of their own, and keep the usual number for blocks without
any, or for nothing. A student whose blocks don't follow the number is another one than was asked
for, so what follows is seen on models without weights.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from fastkd.capture import find_blocks
from fastkd.errors import UserError
from fastkd.models.load import auto_model

# one idea, four names
_NAMES = ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim")
# the matrices of feed-forward layers and experts, without their routers
_MATRIX = re.compile(
    r"(^|\.)(\w*mlp|feed_forward|experts|shared_experts?)\.(\d+\.)?"
    r"(\w*_proj|\w+_linear|w[123]|fc[12])(\.weight)?$"
)
_OTHER = re.compile(r"attention|attn|norm")
_WIDTH = re.compile(r"intermediate_size|ffn_hidden_size|ff_dim")


def feed_forward_name(config: PreTrainedConfig) -> str | None:
    """What a configuration calls the width of its feed-forward layers, if it says it."""
    return next((name for name in _NAMES if hasattr(config, name)), None)


def set_feed_forward(config: PreTrainedConfig, width: int) -> None:
    """Give the feed-forward layers of a configuration another width.

    Raises:
        UserError: it doesn't say how wide they are.
    """
    name = feed_forward_name(config)
    if name is None:
        raise UserError(
            f"student.intermediate_size: {type(config).__name__} has no such number; leave it out"
        )
    by_layer = isinstance(getattr(config, name), list | tuple)
    setattr(config, name, [width] * config.num_hidden_layers if by_layer else width)


def check_feed_forward(config: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """See that every block has the width that a student's configuration says.

    Args:
        config: the student's.
        teacher: the teacher's, whose width may be another one.

    Raises:
        UserError: a block that is as wide as with the teacher's number.
    """
    name = feed_forward_name(config)
    if name is None:
        return
    here, there = _highest(getattr(config, name)), _highest(getattr(teacher, name))
    if here == there or here is None or there is None:
        return
    before = copy.deepcopy(config)
    set_feed_forward(before, there)
    own, kept = _shapes(config), _shapes(before)
    same = [path for path, shape in own.items() if shape == kept[path]]
    found = next((path for path in same if _MATRIX.search(path) and not _OTHER.search(path)), None)
    given = f"student.intermediate_size {here}"
    if found is not None:
        number, _, path = found.partition(".")
        raise UserError(
            f"{given}: {path} of block {int(number) + 1} stays {list(own[found])}, as "
            f"{type(config).__name__} gives it {_reason(config, name, own[found])}; leave "
            "student.intermediate_size out"
        )
    if len(same) == len(own):
        raise UserError(
            f"{given}: no block of {type(config).__name__} follows its {name}; leave "
            "student.intermediate_size out"
        )


def _highest(width: Any) -> int | None:
    """A width, or the largest of those of several layers."""
    found: int | None = max(width) if isinstance(width, list | tuple) else width
    return found


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in blocks, without making them."""
    with no_init_weights(), torch.device("meta"):
        model = auto_model("none").from_config(config)
    return {name: tuple(weight.shape) for name, weight in find_blocks(model).named_parameters()}


def _reason(config: PreTrainedConfig, name: str, shape: tuple[int, ...]) -> str:
    """Which setting says a width that `name` doesn't."""
    settings = {n: v for n, v in vars(config).items() if _WIDTH.search(n) and n != name}
    widths = {*shape, *(size // 2 for size in shape if size % 2 == 0)}
    said = [n for n, value in settings.items() if value in widths]
    return f"the width {' or '.join(said)}" if said else "a width of its own"
