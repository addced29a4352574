"""Commands in processes of their own that need no imports: forked from a server, see
`warm_server.py`. One server for each environment, for as long as the tests run."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SERVER = Path(__file__).with_name("warm_server.py")
# what no import reads, and what imports leave behind: a server serves commands that differ in these
_READ_LATE = ("PYTEST_", "FASTKD_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
_READ_LATE += ("TORCHELASTIC_", "DS_ACCELERATOR", "KMP_", "PYTHONPATH")
# where servers look for what they import; what a command's has more is added in its child
_PATH = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}


class Server:
    """Forks commands; its imports are made once.

    Args:
        environment: of the server; a child's may differ in what imports don't read.
        modules: to import, or all that a run does.
    """

    def __init__(self, environment: dict[str, str], *modules: str) -> None:
        self._socket, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER), *modules],
            stdin=end.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=environment,
            preexec_fn=no_signal_ignored,
        )
        end.close()

    def start(self, arguments: list[str], environment: dict[str, str]) -> WarmProcess:
        """Start a command: `-m MODULE ...` or `SCRIPT ...`."""
        mask = os.umask(0o077)
        os.umask(mask)
        asked = {
            "arguments": arguments,
            "environment": environment,
            "folder": os.getcwd(),
            "umask": mask,
        }
        pipes = [os.pipe() for _ in range(3)]
        with contextlib.suppress(BrokenPipeError):
            socket.send_fds(self._socket, [json.dumps(asked).encode()], [end for _, end in pipes])
        for _, end in pipes:
            os.close(end)
        answers, stdout, stderr = (os.fdopen(source) for source, _ in pipes)
        first = answers.readline()
        if not first:
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"the server ended, {code}: {self._errors.read().decode()[-3000:]}")
        return WarmProcess(int(first), answers, stdout, stderr)

    def close(self) -> None:
        """End the server; what it started goes on."""
        self._socket.close()
        self._process.wait()
        self._errors.close()


class WarmProcess:
    """A command that was started, in the manner of `subprocess.Popen`."""

    def __init__(self, pid: int, answers: object, stdout: object, stderr: object) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._answers, self._said = answers, ["", ""]
        self._readers = [
            threading.Thread(target=self._read, args=(number, source), daemon=True)
            for number, source in enumerate((stdout, stderr))
        ]
        self._waiting = threading.Thread(target=self._wait, daemon=True)
        for thread in (*self._readers, self._waiting):
            thread.start()

    def _read(self, number: int, source) -> None:
        with source:
            self._said[number] = source.read()

    def _wait(self) -> None:
        with self._answers as answers:
            self.returncode = int(answers.readline())

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end; stdout and stderr.

        Raises:
            subprocess.TimeoutExpired: it takes longer than this many seconds.
        """
        deadline = time.monotonic() + timeout
        for thread in (self._waiting, *self._readers):
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self._said[0], self._said[1]

    def send(self, number: int) -> None:
        """Send it a signal, if it still lives."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it, if it still lives."""
        self.send(signal.SIGKILL)
        self.communicate(timeout=30)


_servers: dict[frozenset[tuple[str, str]], Server] = {}


def start(arguments: list[str], environment: dict[str, str]) -> WarmProcess:
    """Start a command from the server of an environment."""
    read = frozenset(item for item in environment.items() if not item[0].startswith(_READ_LATE))
    if read not in _servers:
        _servers[read] = Server({**dict(read), **_PATH})
        atexit.register(_servers[read].close)
    return _servers[read].start(arguments, environment)


def start_ranks(
    arguments: list[str], environment: dict[str, str], ranks: int, port: int | None = None
) -> list[WarmProcess]:
    """Start ranks that know of each other, without a launcher; at a free port if none is given."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [
        start(arguments, {**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def run(
    arguments: list[str],
    environment: dict[str, str],
    *,
    ranks: int = 1,
    port: int | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, on several ranks as torchrun does: one that fails ends the others.

    The exit code of several ranks is torchrun's: 1 where one of them failed.
    """
    if ranks == 1:
        started = [start(arguments, environment)]
    else:
        started = start_ranks(arguments, environment, ranks, port)
    try:
        if ranks > 1:
            _until_one_fails(started, timeout)
        said = [process.communicate(timeout) for process in started]
    finally:
        for process in started:
            process.end()
    code = started[0].returncode if ranks == 1 else int(any(p.returncode for p in started))
    stdout = "".join(out for out, _ in said)
    # what is shown of it is its end: there stands why a rank failed that the others were ended for
    ended = (0, -signal.SIGTERM)
    whose = sorted(zip(started, said, strict=True), key=lambda of: of[0].returncode not in ended)
    stderr = "".join(err for _, (_, err) in whose)
    return subprocess.CompletedProcess(arguments, code or 0, stdout, stderr)


def _until_one_fails(started: list[WarmProcess], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(process.returncode is None for process in started):
        if any(process.returncode for process in started) or time.monotonic() > deadline:
            for process in started:
                process.send(signal.SIGTERM)
            return
        time.sleep(0.05)


def no_signal_ignored() -> None:
    """Where the tests run in the background or under nohup, some are."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
