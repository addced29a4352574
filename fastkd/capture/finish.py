"""What a language model makes of its last layer's output before it hands it on as logits.

Most models make nothing of it. Granite, Cohere and Falcon-H1 multiply it by a number, Gemma 2 and
3n put a soft cap on it (arXiv 2408.00118, section 2). Configurations name these numbers each in its
own way, and the logits of a model that has not learned are too small to show a cap. So a model is
asked: its last layer is made to give known numbers of every size, and what comes of them is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.errors import UserError

_REMEDY = "leave losses.logits and student.head out"

# the smallest shows the factor under any cap, the largest shows the cap under any factor
_SMALL, _LARGE, _LARGER = 2.0**-40, 2.0**39, 2.0**40
_BETWEEN = torch.arange(-39.0, 39.0, dtype=torch.float64).exp2()
# in a small vocabulary the first ones have to do
_PROBES = torch.cat([torch.tensor([_SMALL, _LARGE, _LARGER], dtype=torch.float64), -1.5 * _BETWEEN])


class Finish(NamedTuple):
    """`scale * z` of the last layer's output z, or `softcap * tanh(scale * z / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def of(self, given: Tensor) -> Tensor:
        """Logits, in at least fp32 where anything is made of them."""
        if self == Finish():
            return given
        scaled = given.to(torch.promote_types(given.dtype, torch.float32)) * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


_FOUND: WeakKeyDictionary[nn.Module, Finish] = WeakKeyDictionary()
"""Of models that were asked."""


def known_finish(model: PreTrainedModel) -> Finish | None:
    """What `find_finish` last found of a model; `None` where nobody asked."""
    return _FOUND.get(model)


@torch.no_grad()
def find_finish(model: PreTrainedModel, layer: nn.Module, inputs: Mapping[str, Any]) -> Finish:
    """Ask a language model what it makes of its last layer's output, and keep the answer.

    Args:
        model: in eval mode.
        layer: that makes its logits.
        inputs: of a few tokens.

    Raises:
        UserError: it does not run that layer, or makes something else of it than a factor and a
            soft cap, or what can't be told exactly.
    """
    name = type(model).__name__
    with _giving(layer) as given:
        logits = model(**inputs).logits
    if not given:
        raise UserError(
            f"{name} does not run its last layer as a layer, so fastkd can't compute its logits in "
            f"parts; {_REMEDY}"
        )
    same = logits.shape == given[-1].shape
    found = _told(given[-1].flatten(), logits.flatten()) if same else None
    if found is None:
        raise UserError(
            f"{name} makes more of its last layer's output than a factor and a soft cap do, so "
            f"fastkd can't compute its logits in parts; {_REMEDY}"
        )
    _FOUND[model] = found
    return found


@contextmanager
def _giving(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Let a layer give probes in the place of its products, and note them."""
    given: list[Tensor] = []
    held = {name: kept for name, kept in layer.__dict__.items() if name == "forward"}

    def forward(self: nn.Linear, hidden: Tensor) -> Tensor:
        shape = (*hidden.shape[:-1], self.weight.shape[0])
        places = torch.arange(hidden[..., 0].numel() * shape[-1]) % len(_PROBES)
        given.append(_PROBES[places].view(shape).to(hidden.device))
        return given[-1]

    layer.__dict__["forward"] = MethodType(forward, layer)
    try:
        yield given
    finally:
        del layer.__dict__["forward"]
        layer.__dict__.update(held)


def _told(given: Tensor, logits: Tensor) -> Finish | None:
    """What makes `logits` of `given`, both [n]; `given` is fp64."""
    ends = [logits[given == size].double() for size in (_SMALL, _LARGE, _LARGER)]
    if not all(len(end) for end in ends):
        return None
    small, large, larger = (float(end[0]) for end in ends)
    rounding = torch.finfo(logits.dtype).eps
    found = Finish()
    # half precision has too few digits to tell a number by
    if rounding < 1e-6:
        scale = _exact(small / _SMALL, rounding)
        found = Finish(scale, abs(larger) if large == larger else None)
    if not found.scale or found.softcap == 0.0:
        return None
    expected = found.of(given).to(logits.dtype)
    # infinite in both where a dtype has no such number
    same = torch.isclose(logits, expected, rtol=8 * rounding, atol=0.0)
    return found if bool(same.all()) else None


def _exact(scale: float, rounding: float) -> float:
    """1 where a factor of 1 was rounded: models divide by their cap, and multiply by it again."""
    return 1.0 if abs(scale - 1.0) <= 8 * rounding else scale
