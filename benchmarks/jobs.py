"""What is known of a kernel that an op launches: what it is compiled for, and how often it runs.

`jobs_<folder>.py` has, for the ops of one folder,

* `WORKLOADS`, the named workloads that they take, and `QUICK`, the names of those that CI
  compiles, few but with every kernel and every form of it;
* `calls(work, dtype, count)`: a `Call` for every kind of loss, forward and backward of `count`
  layer pairs on tensors without memory. What it launches is recorded (`recording.py`), so that no
  launch parameter is repeated;
* `seen(launch, work, dtype, count)`: the `Seen` of one recorded launch.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks.recording import Launch


class Loop(NamedTuple):
    """A loop of a kernel: how often a program turns it (a mean, if programs differ), and the
    loops inside; `branched` is the share of the turns that take what stands behind a branch."""

    times: float
    inside: tuple["Loop", ...] = ()
    branched: float = 1.0


class Call(NamedTuple):
    """One kind of loss of an op; `counted` ones have a floor in `costs.py`."""

    kind: str
    run: Callable[[], None]
    counted: bool = True


class Seen(NamedTuple):
    """What the arguments of a launch do not say.

    `loops` are those of the kernel in order; `read` bytes come through its table of addresses;
    `programs` are those with work, where not all have; `even` says that all take as long; `loads`
    are, of the tiles that a step of a loop reads (all, without loops), pairs of bytes and of those
    that one load of a thread may take.
    """

    name: str
    loops: tuple[Loop, ...]
    read: int
    even: bool = True
    programs: int | None = None
    loads: tuple[tuple[int, int], ...] = ()


class OpJobs(Protocol):
    """What a module `jobs_<folder>.py` has."""

    WORKLOADS: tuple[Any, ...]
    QUICK: tuple[str, ...]

    def calls(self, work: Any, dtype: torch.dtype, count: int) -> Iterator[Call]: ...

    def seen(self, launch: Launch, work: Any, dtype: torch.dtype, count: int) -> Seen: ...


class Run(NamedTuple):
    """One launch: programs with work, the kernel's loops, bytes that it reads and writes once."""

    programs: int
    loops: tuple[Loop, ...]
    bytes: int
    even: bool


class Job(NamedTuple):
    """One kernel, all that its machine code depends on, and the launches of it in one call."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    loads: tuple[tuple[int, int], ...] = ()
    runs: tuple[Run, ...] = ()
    kind: str = ""
    counted: bool = False

    def key(self) -> str:
        """Equal for jobs that give the same machine code: what the launcher keys its cache with."""
        return repr((self.kernel.__name__, self._specialised(), sorted(self.options.items())))

    def _specialised(self) -> list[tuple[str, str]]:
        constants = constants_of(self.kernel.fn)
        return [
            (name, str(value) if name in constants else specialised(value))
            for name, value in self.arguments.items()
        ]

    def digest(self) -> str:
        """Short form of `key`."""
        return short_digest(self.key())

    def source(self) -> str:
        """Digest of the kernel's source and of all that it calls, without comments."""
        return source_digest(self.kernel)


def short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def source_digest(kernel: Any) -> str:
    """Of a kernel and the functions of its own package that it reaches, docstrings left out."""
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop().fn
        name = f"{function.__module__}.{function.__name__}"
        if name in found:
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        (body,) = tree.body
        assert isinstance(body, ast.FunctionDef)
        if ast.get_docstring(body) is not None:
            del body.body[0]
        found[name] = ast.dump(tree)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        reached = (function.__globals__.get(one) for one in sorted(names))
        waiting += [one for one in reached if hasattr(one, "fn")]
    return short_digest(repr(sorted(found.items())))


@cache
def constants_of(function: Any) -> frozenset[str]:
    """Names of a kernel's `tl.constexpr` arguments."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(one.name for one in parameters if "constexpr" in str(one.annotation))


def specialised(value: Any) -> str:
    """What the machine code depends on of an argument that is no constant.

    Triton compiles anew for an integer that is 1 or a multiple of 16, for one beyond 32 bits and,
    on AMD, for a tensor beyond 2 GiB.
    """
    if isinstance(value, Tensor):
        wide = value.untyped_storage().size() >= 2**31
        return f"{value.dtype} beyond 2 GiB" if wide else str(value.dtype)
    if isinstance(value, int):
        wide = "i32" if -(2**31) <= value < 2**31 else "i64"
        return "1" if value == 1 else f"{wide} of 16" if value % 16 == 0 else wide
    return str(value)
