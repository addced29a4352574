"""Tables that carry many tensors to one launch: addresses and strides, no stacked copy.

A table is copied to the device once and found again by what it says: a table that says the same is
the same, whichever tensors lie there now.
"""

from array import array
from collections.abc import Callable, Hashable, Sequence
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import alignment
from .remembered import Recent, keeps, place


class Addressed(NamedTuple):
    """The table of a call's tensors, the alignment of each column, and what the table points at."""

    table: Tensor
    alignments: tuple[int, ...]
    tensors: Sequence[Tensor]


class Layout(NamedTuple):
    """What tensors of the same shapes and strides share in a table, wherever they lie.

    `entries` lack the addresses, which belong at `places`. `number` is that of no other layout.
    `copied` makes those of the table from tensors that kernels cannot read as they are.
    """

    number: int
    pairs: int
    alignments: tuple[int, ...]
    entries: list[int]
    places: list[int]
    copied: Callable[[Tensor], Tensor] | None

    def addressed(self, tensors: Sequence[Tensor]) -> Addressed:
        """The table of tensors of this layout, pair by pair.

        The caller keeps the result until its kernels are launched.
        """
        if self.copied is not None:
            tensors = [*map(self.copied, tensors)]
        addresses = [*map(Tensor.data_ptr, tensors)]
        device = tensors[0].device

        def made() -> Tensor:
            entries = self.entries.copy()
            for entry, address in zip(self.places, addresses, strict=True):
                entries[entry] = address
            # takes an array as it is; a list is looked through
            table = torch.frombuffer(array("q", entries), dtype=torch.int64)
            return _copied(table.view(self.pairs, -1), device)

        table = _found(_addressed, (self.number, *addresses), device, made)
        return Addressed(table, self.alignments, tensors)


_tables: Recent[Tensor] = Recent()
_addressed: Recent[Tensor] = Recent()
_layouts: Recent[Layout] = Recent()
_numbers = count()
# bytes of pinned memory taken at once
PINNED_BYTES = 1 << 18


def unit_stride(tensor: Tensor) -> Tensor:
    """`tensor` with neighbours of the last dimension next to each other; a copy only if not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def to_device(rows: Sequence[Sequence[int | float]], dtype: torch.dtype, on: Tensor) -> Tensor:
    """Host numbers on the device of `on`; whoever gets them only reads them."""
    device = on.device

    def made() -> Tensor:
        return _copied(torch.tensor(rows, dtype=dtype, device="cpu"), device)

    return _found(_tables, (dtype, *map(tuple, rows)), device, made)


def _found(
    tables: Recent[Tensor],
    what: tuple[Hashable, ...],
    device: torch.device,
    make: Callable[[], Tensor],
) -> Tensor:
    """The table that says `what` on `device`."""
    if not keeps(device):
        return make()
    key = (place(device), *what)
    table = tables.get(key)
    if table is None:
        table = make()
        tables.put(key, table)
    return table


def _copied(table: Tensor, device: torch.device) -> Tensor:
    """Copied from pinned memory, without waiting."""
    if device.type != "cuda":
        return table.to(device)
    if torch.cuda.is_current_stream_capturing():
        pinned = _lasting.copy(table)
    else:
        _lasting.fill()
        pinned = table.pin_memory()
    return pinned.to(device, non_blocking=True)


class _Lasting:
    """Pinned memory that is never freed: a captured graph copies from it whenever it is replayed.

    It is taken between captures, which may not allocate.
    """

    def __init__(self) -> None:
        self.left: Tensor | None = None
        self.full: list[Tensor] = []

    def fill(self, least: int = PINNED_BYTES // 2) -> None:
        """Let there be so many bytes."""
        if self.left is None or self.left.numel() < least:
            # a view keeps the whole of its memory
            self.full += [] if self.left is None else [self.left]
            self.left = torch.empty(
                max(least, PINNED_BYTES), dtype=torch.uint8, device="cpu", pin_memory=True
            )

    def copy(self, table: Tensor) -> Tensor:
        size = -(-table.nbytes // 16) * 16
        self.fill(size)
        assert self.left is not None, "it was filled"
        place, self.left = self.left[: table.nbytes], self.left[size:]
        return place.view(table.dtype).view(table.shape).copy_(table)


_lasting = _Lasting()


def addressed(
    rows: Sequence[Sequence[Tensor]], readable: Callable[[Tensor], Tensor] = unit_stride
) -> Addressed:
    """The table of `rows[pair][column]`; the tensors of a column share shape and dtype.

    `readable` gives a tensor, or a copy if kernels cannot read its strides. The caller keeps the
    result until its kernels are launched.
    """
    tensors = [tensor for row in rows for tensor in row]
    return layout_of(tensors, len(rows), readable).addressed(tensors)


def layout_of(
    tensors: Sequence[Tensor], pairs: int, readable: Callable[[Tensor], Tensor] = unit_stride
) -> Layout:
    """The layout of the table that `addressed` makes, of tensors pair by pair."""
    # an address says as much of alignments as its lowest bits do
    key = (
        pairs,
        readable,
        *[(tensor.shape, tensor.dtype) for tensor in tensors[: len(tensors) // pairs]],
        *[tensor.stride() for tensor in tensors],
        *[tensor.data_ptr() % 16 for tensor in tensors],
    )
    layout = _layouts.get(key)
    if layout is None:
        layout = _laid_out(tensors, pairs, readable)
        _layouts.put(key, layout)
    return layout


def _laid_out(
    tensors: Sequence[Tensor], pairs: int, readable: Callable[[Tensor], Tensor]
) -> Layout:
    given = tensors
    tensors = [*map(readable, given)]
    fits = all([read is tensor for read, tensor in zip(tensors, given, strict=True)])
    entries: list[int] = []
    places = []
    for tensor in tensors:
        places.append(len(entries))
        entries += (0, *tensor.stride()[:-1])
    columns = len(tensors) // pairs
    alignments = tuple([alignment(tensors[column::columns]) for column in range(columns)])
    copied = None if fits else readable
    return Layout(next(_numbers), pairs, alignments, entries, places, copied)
