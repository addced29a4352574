"""How many heads a student has, how wide they are, and what follows their width.

Heads of another width share the hidden state otherwise: two heads of the teacher would be one of
the student's, with other rotary frequencies. Weights of attention mean nothing there, also where
their shapes agree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig

from fastkd.errors import UserError
from fastkd.recipe import Student

# norms that read the stream beside attention, not its queries, keys or outputs
_OUTER_NORM = re.compile(r"^(self_attn_)?layer_?norm", re.IGNORECASE)


def head_size(config: PreTrainedConfig) -> int:
    """How wide the heads of a configuration are."""
    size: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return size


def set_head_size(config: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Let the width of heads follow a student's hidden width and number of heads.

    Args:
        config: the student's, with both.
        teacher: the teacher's.

    Raises:
        UserError: an odd width under rotary embeddings.
    """
    if hasattr(teacher, "qk_rope_head_dim"):
        # latent attention: its widths are settings that follow no other
        return
    size = config.hidden_size // config.num_attention_heads
    before = teacher.hidden_size // teacher.num_attention_heads
    computed = isinstance(getattr(type(config), "head_dim", None), property)
    if size != before and getattr(teacher, "head_dim", None) and not computed:
        config.head_dim = size
    if size != before and getattr(teacher, "d_head", None) == before:
        # XLNet
        config.d_head = size
    _set_scale(config, teacher)
    if size % 2 and getattr(config, "rope_parameters", None):
        raise UserError(
            f"student heads are {size} wide, but rotary embeddings need an even width; "
            "change student.hidden_size or student.heads"
        )


def keep_head_size(config: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Give heads the teacher's width, whatever the hidden width."""
    config.head_dim = teacher.head_dim
    _set_scale(config, teacher)


def _set_scale(config: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Let a scale of scores that is the width of heads in other words follow it."""
    scalar = getattr(teacher, "query_pre_attn_scalar", None)
    if scalar is not None:
        same = scalar == head_size(teacher)
        config.query_pre_attn_scalar = head_size(config) if same else scalar
    multiplier = getattr(teacher, "attention_multiplier", None)
    if multiplier is not None:
        before = head_size(teacher)
        powers = (p for p in (-1.0, -0.5) if math.isclose(multiplier, before**p, rel_tol=1e-6))
        power = next(powers, None)
        config.attention_multiplier = multiplier if power is None else head_size(config) ** power


def set_kv_heads(config: PreTrainedConfig, teacher: PreTrainedConfig, student: Student) -> None:
    """Give a configuration the key and value heads of the student's section, or as many on each
    as the teacher has.

    Raises:
        UserError: an architecture without, or numbers that don't divide.
    """
    grouped = getattr(teacher, "num_key_value_heads", None)
    if grouped is None:
        if student.kv_heads is not None:
            raise UserError(
                f"student.kv_heads: {type(config).__name__} has no grouped-query attention; "
                "leave it out"
            )
        return
    heads = config.num_attention_heads
    kv_heads = student.kv_heads or max(1, heads * grouped // teacher.num_attention_heads)
    if heads % kv_heads:
        raise UserError(
            f"student has {heads} heads and {kv_heads} key-value heads, expected a multiple; "
            "set student.kv_heads"
        )
    config.num_key_value_heads = kv_heads


def weights_of_heads(model: nn.Module) -> Iterator[str]:
    """Names of the parameters whose channels belong to heads."""
    for path, module in model.named_modules():
        last = path.rpartition(".")[2]
        # SqueezeBERT's output projection stands beside its attention
        if not path or not ("Attention" in type(module).__name__ or last == "post_attention"):
            continue
        for name, _ in module.named_parameters(remove_duplicate=False):
            owner = name.rpartition(".")[0].rpartition(".")[2]
            if not _OUTER_NORM.search(owner):
                yield f"{path}.{name}"
