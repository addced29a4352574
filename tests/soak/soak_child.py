"""A fastkd command with a fault in it, and a server that starts such commands without imports.

    soak_child.py distill recipe.yaml --resume
    soak_child.py --serve MODULES...

Imports take ten times as long as a tiny run, so the server makes them once and forks. Beside the
commands of fastkd there is `cache`, which builds the token cache of a recipe and prints what is in
it. SOAK_CHILD in the environment is JSON, see `Orders`.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from disk_changes import on_change, on_sync
from warm_server import leave

VARIABLE = "SOAK_CHILD"
# a full disk still lets go of what it has
_FREEING = ("os.remove", "os.rmdir", "os.chmod")


@dataclass(frozen=True)
class Orders:
    """What is done to a process, and where it notes things."""

    folder: str
    """Changes below it are counted."""
    notes: str
    """Folder of what processes note: `NAME.count`, `NAME.pid`, `NAME.err`, `struck`."""
    fault: str = ""
    """`kill`, `ENOSPC`, `EROFS`, `size`, or empty where the changes are only counted."""
    name: str = ""
    """The process that is struck: `study`, a run of it, or a rank."""
    number: int = 0
    """Of the change that it strikes at."""
    limit: int = 0
    """Bytes that a file may have from then on, for `size`."""


def process_name(arguments: list[str]) -> str:
    """Who this is among the processes of a command."""
    if arguments[0] == "study":
        return "study"
    parts = Path(arguments[1]).parts
    if "runs" in parts:
        # out/runs/CONDITION/SEED/recipe.yaml
        return ".".join(parts[parts.index("runs") + 1 : -1])
    return os.environ.get("RANK", "0")


class _Struck:
    """Counts the changes of this process and strikes at one of them."""

    def __init__(self, orders: Orders, name: str) -> None:
        self.orders, self.name = orders, name
        self.mine = bool(orders.fault) and orders.name == name
        self.count = 0
        self.pid = os.getpid()
        self.failing = False
        on_change(self._see)
        on_sync(self._see)

    def _see(self, event: str, path: str) -> None:
        # forked workers count their own, and are not struck
        if not path.startswith(self.orders.folder) or os.getpid() != self.pid:
            return
        self.count += 1
        if not self.mine or self.count < self.orders.number:
            return
        if not self.failing:
            self.failing = True
            Path(self.orders.notes, "struck").touch()
            self._strike()
        self._fail(event, path)

    def _strike(self) -> None:
        if self.orders.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.orders.fault == "size":
            # the operating system then fails every writer, whatever library it is in
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.orders.limit, self.orders.limit))

    def _fail(self, event: str, path: str) -> None:
        number = getattr(errno, self.orders.fault, None)
        if number == errno.EROFS or (number and event not in _FREEING):
            raise OSError(number, os.strerror(number), path)

    def note(self) -> None:
        """Write down how many changes there were."""
        self.mine = False
        with suppress(OSError):
            Path(self.orders.notes, f"{self.name}.count").write_text(str(self.count))


def run(arguments: list[str]) -> None:
    """The command in this process."""
    orders = Orders(**json.loads(os.environ[VARIABLE]))
    name = process_name(arguments)
    notes = Path(orders.notes)
    notes.mkdir(exist_ok=True)
    (notes / f"{name}.pid").write_text(str(os.getpid()))
    if "RANK" in os.environ:
        # torchrun adds a trace of its own to what its ranks say
        os.dup2(os.open(notes / f"{name}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    from fastkd import cli

    cli.app.command("cache")(_build_cache)
    struck = _Struck(orders, name)
    sys.argv = ["fastkd", *arguments]
    try:
        if arguments[0] == "study":
            _use_this_program()
        cli.main()
    finally:
        struck.note()


def _use_this_program() -> None:
    """Let the runs of a study be children of this kind."""
    from fastkd import study

    original, program = study.run_study, (sys.executable, __file__)
    study.run_study = lambda *given, **named: original(*given, program=program, **named)


def _build_cache(recipe: Path, overrides: list[str]) -> None:
    """Build or open the token cache of a recipe and print the digest of its blocks."""
    from transformers import AutoTokenizer

    from fastkd.data.factory import text_settings
    from fastkd.data.text import prepare_corpus
    from fastkd.recipe import load_recipe

    chosen = load_recipe(recipe, overrides)
    assert chosen.data is not None
    tokenizer = AutoTokenizer.from_pretrained(chosen.teacher.model)
    corpus = prepare_corpus(text_settings(chosen.data), tokenizer, progress=False)
    digest = hashlib.sha256(corpus.heldout.numpy().tobytes())
    stream = corpus.stream(8, 0)
    for _ in range(20):
        digest.update(stream.next_batch().numpy().tobytes())
    print(digest.hexdigest())


def _serve(modules: list[str]) -> list[str] | None:
    """Import modules, then fork a child for each line of stdin.

    Returns its arguments in the child, `None` at the end. Answers each with two lines: the
    process id, and the status once it has ended.
    """
    # DeepSpeed speaks on stdout as it is imported
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in modules:
        importlib.import_module(module)
    # a child that collected garbage would copy all of it
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        # through pipes: a limit on the size of files is none on what is said
        pipes = [os.pipe(), os.pipe()]
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            answers.close()
            _redirect(pipes)
            os.environ[VARIABLE] = asked["orders"]
            return list(asked["arguments"])
        with suppress(OSError):
            os.setpgid(child, child)
        print(child, file=answers, flush=True)
        copiers = [
            threading.Thread(target=_copy, args=(source, path), daemon=True)
            for (source, _), path in zip(pipes, (asked["output"], asked["errors"]), strict=True)
        ]
        for (_, end), copier in zip(pipes, copiers, strict=True):
            os.close(end)
            copier.start()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for copier in copiers:
            # what a killed process left may hold the other end
            copier.join(10)
        print(code, file=answers, flush=True)
    return None


def _redirect(pipes: list[tuple[int, int]]) -> None:
    sys.stdin = open(os.devnull)  # noqa: SIM115
    os.dup2(sys.stdin.fileno(), 0)
    for number, (source, end) in enumerate(pipes, start=1):
        os.dup2(end, number)
        os.close(source)
        os.close(end)


def _copy(source: int, path: str) -> None:
    with os.fdopen(source, "rb") as said, open(path, "wb") as file:
        shutil.copyfileobj(said, file)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        asked = _serve(sys.argv[2:])
        # modules that a child takes down are copies that it makes first
        leave(lambda: run(asked) if asked is not None else None)
    run(sys.argv[1:])
