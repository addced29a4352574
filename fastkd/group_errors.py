"""What a process group lacks to begin, in one line, and what names its network interface."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from fastkd.errors import RankError

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@contextmanager
def start_errors() -> Iterator[None]:
    """Say in one line what gloo lacks, which looks for an interface also for one process."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        name = os.environ.get(INTERFACES[0])
        if os.strerror(errno.EAGAIN) in text:
            limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
            raise RankError(
                f"the process group could start no thread ({os.strerror(errno.EAGAIN)}); raise "
                f"the limit of processes and threads (ulimit -u is {limit})"
            ) from error
        # also of ranks that are there and can't be reached, gloo names its files
        if "Unable to find" not in text:
            raise
        then = "bring the loopback interface up (ip link set lo up)"
        if name is not None:
            then = f"{INTERFACES[0]} is {name!r}: give an interface of this machine, or unset it"
        said = text.rpartition("] ifa != nullptr. ")[2]
        raise RankError(
            f"the process group found no network interface ({said.strip()}); {then}"
        ) from error
