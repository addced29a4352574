"""The process group: which process this is, how long ranks wait, and which of them is gone.

A rank that dies leaves the others in a collective that fails with a trace of gloo or NCCL. What its
user needs is which rank it was and how to go on. Some never fail: kernels of NCCL wait on the GPU
for a rank of their machine until the time is up, which is hours where ranks may wait for a corpus
to be tokenised, and who works alone meanwhile learns of it at the next collective. So ranks also
look whether the processes of the others on their machine are there; between machines connections
break.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NoReturn, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from fastkd.errors import LostRank, RankError, SharedError, UserError, some_of
from fastkd.group_errors import INTERFACES, start_errors
from fastkd.rank_timeout import TIMEOUT, default_timeout
from fastkd.signals import Signalled, stop_signals

T = TypeVar("T")

# of this process, one after the other
_groups = count()
# environment variables that `start_ranks` may change
_CHANGED = ("LOCAL_RANK", "DS_ACCELERATOR", *INTERFACES)
# a process that was killed closes its sockets a moment before it is gone
_GONE_WITHIN_SECONDS = 2.0
# characters of what a library says of it
_SAID = 200
_ALL_CALL = "every rank must make the same call, outside of any `if rank == 0`"
SLOW_SECONDS = 20.0
"""That a rank waits to meet the others before it says so."""
LOOK_SECONDS = 1.0
"""Between two looks at the processes of the others."""
GRACE_SECONDS = 15.0
"""For a rank to end by itself, as gloo lets it, or by its launcher, once another one is gone."""


@dataclass(frozen=True)
class Peer:
    """The process of a rank."""

    rank: int
    pid: int
    host: str
    namespace: str = field(default_factory=lambda: _pid_namespace())
    """What its number stands in: containers of one host may count their own."""

    @property
    def is_gone(self) -> bool | None:
        """Whether its process has ended; `None` of another host, where that can't be seen."""
        if (self.host, self.namespace) != (socket.gethostname(), _pid_namespace()):
            return None
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        # not Linux
        return ""


def meet() -> tuple[Peer, ...]:
    """The processes of all ranks; collective."""
    mine = Peer(dist.get_rank(), os.getpid(), socket.gethostname())
    found: list[Peer | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return tuple(peer for peer in found if peer is not None)


@contextmanager
def lost_ranks(
    peers: Sequence[Peer], rank: int, then: str = "start all ranks again with --resume to continue"
) -> Iterator[None]:
    """Say in one line which rank was lost where a collective failed.

    Args:
        peers: from `meet`; nobody can be lost where there are none.
        rank: this one.
        then: how to go on.

    Raises:
        LostRank: naming the rank as far as it is known, and how to go on.
    """
    others = [peer for peer in peers if peer.rank != rank]
    try:
        yield
    except RuntimeError as error:
        if not others or not _is_of_group(error):
            raise
        # the launcher now ends all ranks, this one too
        with stop_signals(lambda _number: None):
            raise LostRank(_said(others, rank, str(error), then)) from error
    except Signalled as error:
        # the launcher may be the first to see that a rank is gone
        with stop_signals(lambda _number: None):
            if not any(peer.is_gone for peer in others):
                raise
            raise LostRank(_said(others, rank, "", then)) from error


@contextmanager
def watched_ranks(peers: Sequence[Peer], rank: int, then: str) -> Iterator[None]:
    """End this process, with one line and exit code 1, if another is gone and that ends nothing.

    Args:
        peers: from `meet`.
        rank: this one.
        then: how to go on.
    """
    others = [peer for peer in peers if peer.rank != rank and peer.is_gone is False]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_SECONDS):
            if any(peer.is_gone for peer in others) and not done.wait(GRACE_SECONDS):
                _end(_said(others, rank, "", then))

    if others:
        threading.Thread(target=watch, name="fastkd-watch", daemon=True).start()
    try:
        yield
        if others:
            # who leaves while others have something to do would be taken for lost
            dist.barrier(device_ids=_own_gpu())
    finally:
        done.set()


def _end(line: str) -> NoReturn:
    """End a process whose main thread may hear nothing."""
    _say(line)
    # workers would wait for it for ever
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


def _say(line: str) -> None:
    print(f"fastkd: {line}", file=sys.stderr, flush=True)


def _is_of_group(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo/" in text or "NCCL" in text


def _said(others: Sequence[Peer], rank: int, error: str, then: str) -> str:
    of = f"rank {rank} of {len(others) + 1}"
    deadline = time.monotonic() + _GONE_WITHIN_SECONDS
    gone = [peer for peer in others if peer.is_gone]
    while not gone and time.monotonic() < deadline:
        time.sleep(0.05)
        gone = [peer for peer in others if peer.is_gone]
    there = ", ".join(map(str, others))
    if not gone and ("timed out" in error.lower() or "timeout" in error.lower()):
        return (
            f"{of}: no answer in time from {there}; end what hangs and {then}, or raise {TIMEOUT}"
        )
    # gloo's says no more than that; NCCL's may be of something else
    said = f" ({' '.join(error.split())[:_SAID]})" if error and "gloo/" not in error else ""
    lost = f"the connection to another rank was lost ({there}){said}"
    if gone:
        lost = f"{', '.join(map(str, gone))} {'are' if len(gone) > 1 else 'is'} gone"
    # a mistake of that rank would be met again
    return f"{of}: {lost}; if it says why itself, mend that; {then}"


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    world_size: int
    device: torch.device
    peers: tuple[Peer, ...] = ()
    """The processes of all, where there are several."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def here(self) -> int:
        """Ranks on this machine, this one included."""
        host = socket.gethostname()
        return sum(peer.host == host for peer in self.peers) or 1

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            dist.barrier(device_ids=_own_gpu())

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.world_size > 1:
            # NCCL adds up on GPUs alone
            moved = tensor if _own_gpu() is None else tensor.cuda()
            dist.all_reduce(moved)
            if moved is not tensor:
                tensor.copy_(moved)
        return tensor

    def sum_to(self, rank: int, tensor: Tensor) -> None:
        """Add a tensor up over all ranks, in place on one of them; of no use on the others."""
        if self.world_size > 1:
            dist.reduce(tensor, dst=rank)

    def rows_of_all(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of every rank after each other, in the order of ranks; n and all other
        sizes are the same on all of them. Without gradient."""
        if self.world_size == 1:
            return rows
        found = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(found, rows.contiguous())
        return torch.cat(found)

    def from_main(self, function: Callable[[], T], what: str | None = None) -> T:
        """Run a function on rank 0 and give every rank its result, or what it raises.

        Args:
            function: which talks to no other rank.
            what: of rank 0's is called, for the other ranks, where that is the user's own code.

        Raises:
            SharedError: its `UserError`, on every rank; of anything else, or of code of the user's,
                the ranks after the first, while the first raises it as it is.
        """
        if self.is_main:
            try:
                result = function()
            except Signalled:
                # who was asked to end as well may not come here
                raise
            except BaseException as error:
                said, shared = self._told(error, what)
                self._sent((None, said))
                if shared:
                    raise SharedError(said) from error
                raise
            self._sent((result, None))
            return result
        received, told = self._sent((None, None))
        if told is not None:
            raise SharedError(told)
        result = received
        return result

    def on_each(self, function: Callable[[], T]) -> T:
        """Run a function on every rank and give each its own result, or what the first of those
        raises that raise something.

        Args:
            function: which talks to no other rank.

        Raises:
            SharedError: on every rank; but who met another kind than a `UserError` raises it.
        """
        try:
            result = function()
        except Signalled:
            # as above
            raise
        except BaseException as error:
            said, shared = self._told(error)
            told = self._first_told(said)
            if shared:
                raise SharedError(told or said) from error
            raise
        told = self._first_told(None)
        if told is not None:
            raise SharedError(told)
        return result

    def _told(self, error: BaseException, what: str | None = None) -> tuple[str, bool]:
        """What other ranks are told of an error, and whether every rank raises it: a `UserError`,
        unless it is of the user's own code, which is named by `what`."""
        of = f"rank {self.rank}"
        if what is None and isinstance(error, UserError):
            return str(error) if self.is_main else f"{of}: {error}", True
        return f"{what or of} raised {type(error).__name__}: {error}", False

    def _first_told(self, said: str | None) -> str | None:
        return next((told for told in self.gather(said) if told is not None), None)

    def _sent(self, outcome: tuple[Any, str | None]) -> tuple[Any, str | None]:
        """What rank 0 has, on every rank."""
        if self.world_size == 1:
            return outcome
        found: list[Any] = [outcome]
        dist.broadcast_object_list(found, src=0)
        received: tuple[Any, str | None] = found[0]
        return received

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank."""
        found: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, value)
        return found

    def require_same(self, parts: Callable[[], Mapping[str, str]], then: str) -> None:
        """See that all ranks were given the same; collective, and nothing on one rank.

        Args:
            parts: gives digests, by what they are of.
            then: what to do where one differs.

        Raises:
            SharedError: naming the first rank whose digest isn't that of rank 0.
        """
        if self.world_size == 1:
            return
        first, *others = self.gather(parts())
        for name, digest in first.items():
            for rank, found in enumerate(others, start=1):
                if found.get(name) != digest:
                    raise SharedError(
                        f"{name}: {self.called(rank)} has another than rank 0; {then}"
                    )

    def called(self, rank: int) -> str:
        """A rank, for people."""
        return next((str(peer) for peer in self.peers if peer.rank == rank), f"rank {rank}")


def start_ranks() -> Ranks:
    """Join the process group of the launcher, or make one of a single process.

    `torchrun` and `deepspeed` set RANK; without a launcher an in-memory store needs no port.

    Raises:
        UserError: the environment gives a timeout that is none, see `fastkd.rank_timeout`.
        RankError: this rank has no GPU where the first has one, or shares one with another rank;
            or gloo finds no network interface, or may start no thread.
        LostRank: another rank is gone, or doesn't come.
    """
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if gpu and torch.cuda.device_count() == 1:
        # a scheduler may show each rank one GPU, and that to each as its first
        os.environ["LOCAL_RANK"] = "0"
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu and local_rank >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise RankError(
            f"rank {local_rank} of this machine has no GPU of its own, of which there are {found}; "
            f"start one rank a GPU (--nproc-per-node={found}), or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= to run on CPUs"
        )
    if gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if gpu else "gloo"
        if "RANK" in os.environ:
            _check_launcher()
            timeout = default_timeout()
            _let_groups_wait(timeout)
            with _meeting(os.environ["RANK"], os.environ["WORLD_SIZE"]):
                store, rank, size = _launchers_store(timeout)
                store = _all_here(store, rank, size, timeout)
                if gpu:
                    _check_gpus(store, rank, size, device)
                with start_errors():
                    dist.init_process_group(
                        backend, store=store, rank=rank, world_size=size, timeout=timeout
                    )
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            for name in INTERFACES:
                # those of another node, perhaps, and this process has nobody to talk to
                os.environ.pop(name, None)
            with start_errors():
                dist.init_process_group(backend, store=store, rank=0, world_size=1)
    elif dist.get_world_size() > 1:
        # or a collective of the script's own could meet the first one of fastkd's
        with _meeting(dist.get_rank(), dist.get_world_size()):
            own = distributed_c10d._get_default_store()
            _all_here(own, dist.get_rank(), dist.get_world_size(), default_timeout())
    rank, size = dist.get_rank(), dist.get_world_size()
    with _meeting(rank, size):
        peers = meet() if size > 1 else ()
    return Ranks(rank, size, device, peers)


@contextmanager
def _meeting(rank: int | str, size: int | str) -> Iterator[None]:
    """Say in one line that the ranks can't meet.

    Raises:
        LostRank: another one is gone, or can't be reached.
    """
    try:
        yield
    except RuntimeError as error:
        if str(size) == "1" or not _is_of_group(error):
            raise
        raise LostRank(
            f"rank {rank} of {size}: the ranks can't meet ({' '.join(str(error).split())[:_SAID]});"
            " if another one says why itself, mend that; start all ranks again"
        ) from error


def _launchers_store(timeout: datetime.timedelta) -> tuple[Any, int, int]:
    """The store that ranks meet at, this one's number and how many they are.

    Where no launcher keeps the store, rank 0 does, and is waited for, as it waits for all.
    """
    of = f"rank {os.environ['RANK']} waits for others of {os.environ['WORLD_SIZE']} ranks"
    slow = threading.Timer(SLOW_SECONDS, _say, [f"{of}; {_ALL_CALL}"])
    slow.daemon = True
    slow.start()
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        return store, rank, size
    finally:
        slow.cancel()


def _all_here(store: Any, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """Wait until every rank is here; what of a store is theirs for this one time.

    Raises:
        LostRank: one doesn't come in time.
    """
    # a store outlives a call, and the next one would read what this one wrote
    store = dist.PrefixStore(f"fastkd-{next(_groups)}", store)  # type: ignore[attr-defined]
    keys = [f"here/{each}" for each in range(size)]
    store.set(keys[rank], "")
    begun, pause, is_said = time.monotonic(), 0.001, False
    while not store.check(keys):
        time.sleep(pause)
        waited = time.monotonic() - begun
        late = waited > timeout.total_seconds()
        if late or (waited > SLOW_SECONDS and not is_said):
            missing = [each for each in range(size) if not store.check([keys[each]])]
            names = some_of([f"rank {each}" for each in missing])
            if late and missing:
                raise LostRank(
                    f"rank {rank} of {size}: {names} not there after {waited:.0f} s; {_ALL_CALL}; "
                    f"end what hangs and start all ranks again, or raise {TIMEOUT}"
                )
            # one speaks for all that are here
            if missing and missing[:rank] == list(range(rank)):
                _say(f"rank {rank} waits for {len(missing)} of {size} ranks ({names}); {_ALL_CALL}")
            is_said = True
        pause = min(2 * pause, 0.1)
    return store


def _check_launcher() -> None:
    missing = [n for n in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise UserError(
            f"RANK is set in the environment, but not {', '.join(missing)}; start ranks with "
            "torchrun or deepspeed, or unset RANK to run alone"
        )


def _check_gpus(store: Any, rank: int, size: int, device: torch.device) -> None:
    """See that each rank has a GPU of its own, before NCCL does: collective.

    Raises:
        RankError: another rank has the same one.
    """
    gpu = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    store.set(f"gpu/{rank}", gpu)
    same = [other for other in range(size) if store.get(f"gpu/{other}").decode() == gpu]
    if len(same) > 1:
        raise RankError(
            f"ranks {', '.join(map(str, same))} have one GPU of {socket.gethostname()}, expected "
            "one for each; start as many ranks as GPUs, with LOCAL_RANK set as torchrun does, or "
            "show each rank one of its own"
        )


def _own_gpu() -> list[int] | None:
    """The GPU of this rank, where ranks talk by NCCL."""
    return [torch.cuda.current_device()] if dist.get_backend() == "nccl" else None


def _let_groups_wait(timeout: datetime.timedelta) -> None:
    """Let the groups that DeepSpeed makes wait as long as the first one: it gives them no time of
    their own, and torch takes its default then."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, timeout)


def stop_ranks() -> None:
    """Leave the process group; gloo may abort the process at exit otherwise."""
    if dist.is_initialized():
        _forget_groups()
        dist.destroy_process_group()


def _leaves_together() -> bool:
    """Whether a group is left by all ranks or by none: NCCL waits for those that are still at work,
    and what ended this rank would never be said."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return several and _own_gpu() is not None


def _forget_groups() -> None:
    """Let DeepSpeed look anew next time: it would take the groups of this one for those."""
    comm: Any = sys.modules.get("deepspeed.comm.comm")
    groups: Any = sys.modules.get("deepspeed.utils.groups")
    if comm is not None and groups is not None:
        comm.cdb = None
        groups._release_process_group_references()


def _uses_deepspeed() -> bool:
    comm: Any = sys.modules.get("deepspeed.comm.comm")
    return comm is not None and comm.cdb is not None


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks while the context is open; a process that had a group keeps it, and no more.

    What ends one of several ranks on GPUs leaves its group to the end of the process.

    Raises:
        UserError: as `start_ranks`, and so `LostRank`.
    """
    had_group, had_deepspeed = dist.is_initialized(), _uses_deepspeed()
    environment = {name: os.environ.get(name) for name in _CHANGED}
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
    hook = of_group = sys.excepthook
    ended = False
    try:
        ranks = start_ranks()
        of_group = sys.excepthook
        yield ranks
        ended = True
    finally:
        # torch's, which writes the rank before each line; another one is the caller's
        if sys.excepthook is of_group:
            sys.excepthook = hook
        if had_group:
            if not had_deepspeed:
                _forget_groups()
        elif ended or not _leaves_together():
            stop_ranks()
        if gpu is not None:
            torch.cuda.set_device(gpu)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
