"""A process that has made the imports of a run, and forks a child for every command.

Imports take ten times as long as a tiny run. Started by `warm_processes.py`, with a socket as its
stdin; a request is JSON with three descriptors: what answers, stdout and stderr of the child. The
answer is two lines: the process id, and the exit code once it has ended, negative for a signal.

What such a child does not show is what a fresh interpreter might: another seed of its hashes, what
imports print, that a module imports what it uses, and modules that are taken down at the end, which
would copy all that the server holds. Some tests ask for a fresh one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

LOSSES = ("attention", "embedding", "fsp", "hidden", "labels", "logits", "mlm", "relations", "rkd")
LOSSES += ("contrastive", "embedding_output", "score", "similarity")
# what a run imports, also late
MODULES = (
    "fastkd.cli",
    *(f"fastkd.losses.{name}" for name in LOSSES),
    "fastkd.training.session",
    "fastkd.training.stages",
    "fastkd.training.doctor",
    "fastkd.reporting.report",
    "fastkd.study",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "datasets",
    "sklearn.metrics",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
)


def serve(modules: list[str]) -> dict[str, Any] | None:
    """Import, then fork; returns what is asked in the child, and `None` at the end."""
    connection = socket.socket(fileno=os.dup(0))
    # what `start_ranks` says before DeepSpeed is imported; here there is no GPU
    os.environ["DS_ACCELERATOR"] = "cpu"
    gc.disable()
    for module in modules:
        importlib.import_module(module)
    # the rules of names that a process makes before it reads its first model
    names = sys.modules.get("transformers.conversion_mapping")
    if names is not None:
        names.get_checkpoint_conversion_mapping("bert")
    # a child that collected garbage would copy all of it
    gc.collect()
    gc.freeze()
    gc.enable()
    # a Ctrl-C is for the children, whose terminal this is too
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        content, descriptors, _, _ = socket.recv_fds(connection, 1 << 18, 3)
        if not content:
            return None
        sys.stdout.flush()
        if os.fork() == 0:
            connection.close()
            return _supervise(json.loads(content), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _supervise(asked: dict[str, Any], answers: int, stdout: int, stderr: int) -> dict[str, Any]:
    """Fork the child, in which this returns, and wait for its end."""
    child = os.fork()
    if child:
        os.close(stdout)
        os.close(stderr)
        os.write(answers, f"{child}\n".encode())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(answers, f"{code}\n".encode())
        os._exit(0)
    os.close(answers)
    for number, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, stdout), (2, stderr)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    return asked


def become(asked: dict[str, Any]) -> None:
    """Be what a fresh interpreter with these arguments is: `-m MODULE ...` or `SCRIPT ...`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(asked["folder"])
    os.umask(asked["umask"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    first, *rest = asked["arguments"]
    given = asked["environment"].get("PYTHONPATH", "").split(os.pathsep)
    more = [os.path.abspath(path) for path in given if path]
    sys.path[1:1] = [path for path in more if path not in sys.path]
    if first == "-m":
        # a fresh interpreter looks there first
        sys.path[0] = os.getcwd()
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def end(asked: dict[str, Any]) -> NoReturn:
    """Run what is asked and end as an interpreter does, but for taking down its modules."""
    leave(lambda: become(asked))


def leave(work: Callable[[], None]) -> NoReturn:
    """Do a piece of work and end the process so.

    Threads are waited for, functions of `atexit` run, and output that can't be written is an error.
    """
    code: Any = 0
    interrupted = False
    try:
        work()
    except SystemExit as left:
        code = left.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        interrupted = isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    request = serve(sys.argv[1:] or list(MODULES))
    if request is not None:
        end(request)
