"""Run fastkd as a machine of its own would: in a network namespace, under a host name.

Used as `python on_node.py NAMESPACE distill recipe.yaml ...`, with the variables that torchrun
sets. The namespace is one of `ip netns`; its name becomes that of the host.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from pathlib import Path

from fastkd.cli import main

# of sched.h
NEW_HOST_NAME, NEW_NETWORK = 0x04000000, 0x40000000


def enter(namespace: str) -> None:
    """Leave this machine's network and name; threads that start later come along.

    Raises:
        OSError: it is not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open() as network:
        failed = libc.setns(network.fileno(), NEW_NETWORK) or libc.unshare(NEW_HOST_NAME)
        if failed:
            raise OSError(ctypes.get_errno(), f"{namespace}: {os.strerror(ctypes.get_errno())}")
    socket.sethostname(namespace)


if __name__ == "__main__":
    enter(sys.argv[1])
    sys.argv = ["fastkd", *sys.argv[2:]]
    main()
