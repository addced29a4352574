"""Arrays of tokens that ranks give each other, in a group of their own.

The training group is no place for it: a thread prepares batches while the main thread trains, and a
group's collectives must come in one order. So it is gloo's, between CPUs, also where models are on
GPUs. Who comes to an exchange waits for all the others: every rank must come to the same ones.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd.data.text.packing import IntArray
from fastkd.distributed import Ranks
from fastkd.errors import UserError
from fastkd.rank_timeout import default_timeout

MEETING = datetime.timedelta(seconds=120)
"""For the connections to be made: ranks are called at the same moment."""
_MISSING = -1
# public from torch 2.15, which warns of the name before
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout


class Exchange:
    """An all-gather of arrays of any length; made and closed by all ranks at the same moment.

    Raises:
        UserError: the ranks do not reach each other.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.rank = ranks.rank
        self.world_size = ranks.world_size
        try:
            self._group = dist.new_group(backend="gloo", timeout=MEETING)
        except RuntimeError as error:
            raise UserError(
                f"data.streaming: the ranks share the tokenising by gloo, and rank {ranks.rank} "
                "does not reach the others; name the network interface between the machines in "
                "GLOO_SOCKET_IFNAME, or set data.streaming to false"
            ) from error
        _set_timeout(default_timeout(), self._group)

    def __call__(self, arrays: Sequence[IntArray | None]) -> list[list[IntArray | None]]:
        """What every rank has given, in the order of ranks; collective.

        Args:
            arrays: of this rank, as many as every other one gives; `None` for what it does not
                have.
        """
        given = [_MISSING if array is None else array.size for array in arrays]
        sizes = self._gathered(torch.tensor(given, dtype=torch.int64)).tolist()
        longest = max(_held(row) for row in sizes)
        mine = torch.zeros(longest, dtype=torch.int32)
        start = 0
        for array in arrays:
            if array is not None:
                mine[start : start + array.size] = torch.from_numpy(array)
                start += array.size
        found = self._gathered(mine)
        return [_cut(row, lengths) for row, lengths in zip(found, sizes, strict=True)]

    def _gathered(self, mine: Tensor) -> Tensor:
        """[ranks, *mine.shape]."""
        found = mine.new_empty(self.world_size, len(mine))
        if len(mine):
            dist.all_gather(list(found), mine, group=self._group)
        return found

    def close(self) -> None:
        """Leave the group, once this rank has come to all of its exchanges."""
        dist.destroy_process_group(self._group)


def _held(sizes: Sequence[int]) -> int:
    return sum(size for size in sizes if size != _MISSING)


def _cut(row: Tensor, sizes: Sequence[int]) -> list[IntArray | None]:
    arrays: list[IntArray | None] = []
    start = 0
    for size in sizes:
        if size == _MISSING:
            arrays.append(None)
            continue
        arrays.append(row[start : start + size].numpy())
        start += size
    return arrays
