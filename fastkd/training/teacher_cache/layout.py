"""What is stored of a row: one file of plain numbers for each tensor of a `Capture`.

Of attention either queries, keys and values are stored, or the hidden states below its blocks, from
which the teacher's own blocks make them again.

A row is stored at its own length, without padding: its tokens follow each other in each file, and
those of the next row follow them. What a head that classifies texts gives is one entry a row, and
so is an embedding, in whose place no states of tokens are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastkd.capture import Capture, RecomputedAttention
from fastkd.errors import UserError
from fastkd.packed_row import PackedRow
from fastkd.types import Inputs

# numbers of these sizes are stored, whatever they stand for
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# what stands behind the numbers of an entry in int8: its scale, fp32
_SCALE_BYTES = 4
_LARGEST = 127


@dataclass(frozen=True)
class Field:
    """One tensor of a capture, as it is stored."""

    name: str
    """Name of its file, such as `query-2`."""
    token_dim: int | None
    """Which dimension of the tensor counts tokens; `None` where a row has one entry."""
    shape: tuple[int, ...]
    """Shape of an entry."""
    dtype: torch.dtype
    """Type in which the teacher gives it."""
    stored: torch.dtype
    """Type in which it lies on disk."""

    @property
    def numbers(self) -> int:
        """Numbers of one entry."""
        return int(torch.Size(self.shape).numel())

    @property
    def stored_numbers(self) -> int:
        """Numbers of one entry on disk, with the bytes of its scale."""
        return self.numbers + (_SCALE_BYTES if self.stored == torch.int8 else 0)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry on disk."""
        return self.stored_numbers * self.stored.itemsize

    def encoded(self, numbers: Tensor) -> Tensor:
        """Numbers of entries [..., numbers] as they are stored, [..., stored_numbers].

        In int8 they are counted in steps of an entry's own, its largest number over 127: none is
        off by more than half a step.
        """
        if self.stored != torch.int8:
            return numbers.to(self.stored)
        largest = numbers.float().abs().amax(dim=-1, keepdim=True)
        scales = largest.clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        counted = (numbers.float() / scales).round().to(torch.int8)
        return torch.cat([counted, scales.view(torch.int8)], dim=-1)

    def decoded(self, stored: Tensor) -> Tensor:
        """What `encoded` was given, up to rounding."""
        if self.stored != torch.int8:
            return stored.to(self.dtype)
        # a copy: one entry alone is contiguous where it lies, at a byte that no fp32 begins at
        last = stored[..., self.numbers :].clone(memory_format=torch.contiguous_format)
        scales = last.view(torch.float32)
        return (stored[..., : self.numbers] * scales).to(self.dtype)

    def as_dict(self) -> dict[str, Any]:
        """What decides its bytes, for the key of a cache."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": str(self.dtype),
            "stored": str(self.stored),
        }


@dataclass(frozen=True)
class Layout:
    """What is stored of each row, and what steps are given of it."""

    fields: tuple[Field, ...]
    recorded: Mapping[str, Any]
    """Keyword arguments of `capture` for the pass that fills it."""
    template: Capture
    """One batch's capture: what is the same for all rows, such as scales and the weights of a
    head."""
    recomputed: RecomputedAttention | None = None
    """What makes queries, keys and values, where they are not stored."""

    def names(self, wanted: Mapping[str, Any]) -> list[str]:
        """Names of the fields that are read for keyword arguments of `capture`; layers beyond these
        are left on the disk."""
        kept = {f"hidden-{n}" for n in self._below(wanted) | set(wanted["hidden"])}
        if self.recomputed is None:
            parts = ("query", "key", "value")
            kept |= {f"{part}-{layer}" for part in parts for layer in wanted["attention"]}
        names = [field.name for field in self.fields]
        return [name for name in names if name in kept or not is_of_block(name)]

    def rebuilt(
        self, inputs: Inputs, wanted: Mapping[str, Any], read: Callable[[str], Tensor]
    ) -> Capture:
        """What `capture` would have recorded.

        Args:
            inputs: of the micro-batch, on the teacher's device.
            wanted: keyword arguments of `capture`.
            read: the tensor of a field.
        """
        hidden = {n: read(f"hidden-{n}") for n in self._below(wanted) | set(wanted["hidden"])}
        head = self.template.logits
        if isinstance(head, Tensor):
            head = read("logits")
        elif head is not None:
            head = head._replace(hidden=read("logits"))
        return replace(
            self._attention(inputs, wanted["attention"], hidden, read),
            hidden={n: state for n, state in hidden.items() if n in wanted["hidden"]},
            logits=head,
            outputs=None if self.template.outputs is None else read("outputs"),
            modules={path: read(f"module-{path}") for path in self.template.modules},
            embedding=None if self.template.embedding is None else read("embedding"),
        )

    def _below(self, wanted: Mapping[str, Any]) -> set[int]:
        """Layers whose states attention is made of."""
        return set() if self.recomputed is None else {n - 1 for n in wanted["attention"]}

    def _attention(
        self,
        inputs: Inputs,
        layers: Collection[int],
        hidden: Mapping[int, Tensor],
        read: Callable[[str], Tensor],
    ) -> Capture:
        """A capture of attention alone."""
        template = self.template.attention
        if self.recomputed is not None and layers:
            made = self.recomputed(inputs, hidden, layers)
        else:
            made = {
                layer: template[layer]._replace(
                    query=read(f"query-{layer}"),
                    key=read(f"key-{layer}"),
                    value=None if template[layer].value is None else read(f"value-{layer}"),
                )
                for layer in layers
            }
        without = {layer for layer, state in template.items() if state.value is None}
        return Capture({n: s._replace(value=None) if n in without else s for n, s in made.items()})


def is_of_block(name: str) -> bool:
    """Whether a field of that name is of embeddings or blocks, by their numbers."""
    return name.startswith(("query-", "key-", "value-", "hidden-"))


def fields_of(
    states: Capture, tokens: tuple[int, int], stored: torch.dtype | None
) -> tuple[Field, ...]:
    """What there is to store of a capture.

    Args:
        states: from a pass over inputs of that shape.
        tokens: [batch, tokens] of the inputs, if need be padded.
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


def with_padded_modules(states: Capture, inputs: Inputs) -> Capture:
    """A capture of a micro-batch whose submodules give padded states also where it is packed, as
    what stands above the blocks does anyway."""
    row = PackedRow.of(inputs)
    if row is None:
        return states
    modules = {path: row.padded_module(given) for path, given in states.modules.items()}
    return replace(states, modules=modules)


def without_values(states: Capture) -> Capture:
    """A capture whose attention holds queries and keys alone."""
    kept = {layer: state._replace(value=None) for layer, state in states.attention.items()}
    return replace(states, attention=kept)


def constant_part(states: Capture) -> Capture:
    """A capture as a template: what is of a single batch is left without numbers."""

    def empty(tensor: Tensor) -> Tensor:
        return tensor.new_empty(0)

    head = states.logits
    if isinstance(head, Tensor):
        head = empty(head)
    elif head is not None:
        head = head._replace(hidden=empty(head.hidden))
    return Capture(
        attention={
            layer: state._replace(
                query=empty(state.query),
                key=empty(state.key),
                value=None if state.value is None else empty(state.value),
            )
            for layer, state in states.attention.items()
        },
        logits=head,
        outputs=None if states.outputs is None else empty(states.outputs),
        modules={path: empty(given) for path, given in states.modules.items()},
        embedding=None if states.embedding is None else empty(states.embedding),
    )


def to_store(states: Capture, field: Field) -> Tensor:
    """A field of a capture as it is stored, on the CPU: bits [batch, entries, numbers]."""
    tensor = next(t for name, t, _ in _tensors(states) if name == field.name)
    entries = tensor[:, None] if field.token_dim is None else tensor.movedim(field.token_dim, 1)
    flat = field.encoded(entries.flatten(2)).contiguous().cpu()
    return flat.view(BITS[field.stored.itemsize])


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
        yield "logits", states.logits, 1 if states.logits.ndim == 3 else None
    elif states.logits is not None:
        # of a language model what stands before its head: logits of all tokens have no room
        yield "logits", states.logits.hidden, 1
    if states.outputs is not None:
        yield "outputs", states.outputs, 1
    for path, given in sorted(states.modules.items()):
        yield f"module-{path}", given, 1
    if states.embedding is not None:
        yield "embedding", states.embedding, None
