"""A forward pass that costs little, of which all but its numbers is that of the model.

Nearly all of a pass is products of matrices and attention. What a query sees follows from masks and
lengths, never from the numbers in between: with products that add up a few terms, and an attention
that says of every query which keys it was let see, a model of billions of parameters reads
thousands of tokens on one core in seconds. All of its own code runs. The road not taken is tensors
without numbers (`meta`): nobody could read a mask of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# terms that a product adds up
_TERMS = 32
_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten.baddbmm.default,
}
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu.default


class CheapProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products add up their first terms only, and attention on a CPU is a sum of what is visible,
    while the context is open. On another device attention is what it is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._exact = False

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Let all be computed as it is while the context is open."""
        self._exact = True
        try:
            yield
        finally:
            self._exact = False

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if not self._exact:
            if func is _ATTENTION:
                return _visible_sum(*args, **given)
            if func in _PRODUCTS and args[-1].shape[-2] > _TERMS:
                *before, left, right = args
                args = (*before, left[..., :_TERMS], right[..., :_TERMS, :])
        return func(*args, **given)


def _visible_sum(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The value of each query's own token times a number of the keys that the query sees; as the
    op [batch, heads, tokens, head_dim], with its [batch, heads, tokens]."""
    tokens, keys = query.shape[2], key.shape[2]
    # no two sets of keys add up to the same, as far as it can be told
    weights = torch.linspace(0.5, 1.5, keys, device=query.device).sin()
    if attn_mask is not None:
        shares = attn_mask.exp() if attn_mask.is_floating_point() else attn_mask
        seen = (shares.float() * weights).mean(dim=-1, keepdim=True)
    elif is_causal:
        seen = (weights.cumsum(dim=0) / keys)[:tokens, None]
    else:
        seen = weights.mean().expand(tokens, 1)
    heads = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    made = (heads[:, :, torch.arange(tokens).clamp(max=keys - 1)] * seen).to(query.dtype)
    # laid out as the op's output
    made = made.transpose(1, 2).contiguous().transpose(1, 2)
    return made, query.new_zeros(query.shape[:3], dtype=torch.float32)
