"""What is stored of a row: one file of plain numbers for each tensor of a `Capture`.

A row is stored at its own length, without padding: its tokens follow each other in each file, and
those of the next row follow them. What a head of a classifier gives is one entry a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastkd.capture import Capture
from fastkd.errors import UserError

# numbers of these sizes are stored, whatever they stand for
BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Field:
    """One tensor of a capture, as it is stored."""

    name: str
    """Of its file, such as `query-2`."""
    token_dim: int | None
    """Which dimension of the tensor counts tokens; `None` where a row has one entry."""
    shape: tuple[int, ...]
    """Of an entry."""
    dtype: torch.dtype
    """In which the teacher gives it."""
    stored: torch.dtype
    """In which it lies on disk."""

    @property
    def numbers(self) -> int:
        """Of an entry."""
        return int(torch.Size(self.shape).numel())

    @property
    def entry_bytes(self) -> int:
        """Of an entry, on disk."""
        return self.numbers * self.stored.itemsize

    def as_dict(self) -> dict[str, Any]:
        """What decides its bytes, for the key of a cache."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": str(self.dtype),
            "stored": str(self.stored),
        }


def fields_of(
    states: Capture, tokens: tuple[int, int], stored: torch.dtype | None
) -> tuple[Field, ...]:
    """What there is to store of a capture.

    Args:
        states: from a pass over inputs of that shape.
        tokens: [batch, tokens] of the inputs.
        stored: precision on disk; each tensor's own where not given.

    Raises:
        UserError: a submodule gives something that has no place for each token.
    """
    found = []
    for name, tensor, token_dim in _tensors(states):
        is_module = name.startswith("module-")
        if is_module and (tensor.ndim != 3 or tuple(tensor.shape[:2]) != tokens):
            raise UserError(
                f"teacher.cache: {name.removeprefix('module-')} of the teacher gives "
                f"{list(tensor.shape)}, expected [batch, tokens, width]; leave teacher.cache out"
            )
        shape = tensor.shape if token_dim is None else tensor.movedim(token_dim, 1).shape[1:]
        dtype = tensor.dtype if stored is None else stored
        found.append(Field(name, token_dim, tuple(shape[1:]), tensor.dtype, dtype))
    return tuple(found)


def without_values(states: Capture) -> Capture:
    """A capture whose attention holds queries and keys alone."""
    kept = {layer: state._replace(value=None) for layer, state in states.attention.items()}
    return replace(states, attention=kept)


def to_store(states: Capture, field: Field) -> Tensor:
    """A field of a capture as it is stored, on the CPU: bits [batch, entries, numbers]."""
    tensor = next(t for name, t, _ in _tensors(states) if name == field.name)
    entries = tensor[:, None] if field.token_dim is None else tensor.movedim(field.token_dim, 1)
    flat = entries.flatten(2).to(field.stored).contiguous().cpu()
    return flat.view(BITS[field.stored.itemsize])


def rebuilt(template: Capture, kept: set[str], read: Callable[[str], Tensor]) -> Capture:
    """A capture like another one.

    Args:
        template: has what is the same for all rows: scales, weights of a head.
        kept: names of the fields that it shall have.
        read: the tensor of a field.
    """
    attention = {
        layer: state._replace(
            query=read(f"query-{layer}"),
            key=read(f"key-{layer}"),
            value=None if state.value is None else read(f"value-{layer}"),
        )
        for layer, state in template.attention.items()
        if f"query-{layer}" in kept
    }
    hidden = {n: read(f"hidden-{n}") for n in template.hidden if f"hidden-{n}" in kept}
    head = template.logits
    if isinstance(head, Tensor):
        head = read("logits")
    elif head is not None:
        head = head._replace(hidden=read("logits"))
    return Capture(
        attention=attention,
        hidden=hidden,
        logits=head,
        outputs=None if template.outputs is None else read("outputs"),
        modules={path: read(f"module-{path}") for path in template.modules},
    )


def _tensors(states: Capture) -> Iterator[tuple[str, Tensor, int | None]]:
    """Each tensor of a capture, its name, and which dimension counts tokens."""
    for layer, state in sorted(states.attention.items()):
        yield f"query-{layer}", state.query, 2
        yield f"key-{layer}", state.key, 2
        if state.value is not None:
            yield f"value-{layer}", state.value, 2
    for layer, hidden in sorted(states.hidden.items()):
        yield f"hidden-{layer}", hidden, 1
    if isinstance(states.logits, Tensor):
        yield "logits", states.logits, None
    elif states.logits is not None:
        # of a language model what stands before its head: logits of all tokens have no room
        yield "logits", states.logits.hidden, 1
    if states.outputs is not None:
        yield "outputs", states.outputs, 1
    for path, given in sorted(states.modules.items()):
        yield f"module-{path}", given, 1
