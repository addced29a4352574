"""Calls of Triton's language by what they come down to: operations of its builder.

Which operations those are, types and constants decide, hardly ever values. So a call is watched
once, and replayed for other tensors of the same types. What it makes of constants alone is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

# operations that make the same of constants in every program
CONSTANT = ("get_", "create_splat", "create_broadcast", "create_make_range", "create_expand_dims")
# larger constants are made anew
LARGEST = 4096
PLAIN = {bool, int, str, type(None), tl.PropagateNan}
TOKENS: dict[tuple[Any, ...], int] = {}
# from tensors to a result
Replay = Callable[[Sequence[Any]], Any]


class NotReplayedError(Exception):
    """A call is not made of types, constants and tensors alone."""


def token(kind: Any) -> int:
    """A number that stands for a type, which is made anew all the time."""
    return TOKENS.setdefault(described(kind), len(TOKENS))


def described(value: Any) -> tuple[Any, ...]:
    """A constant as part of a key."""
    kind = type(value)
    if kind in PLAIN:
        return kind, value
    if kind is float:
        # 0.0 is not -0.0, and NaN is NaN
        return kind, value.hex()
    if kind is slice:
        return value.__reduce__()
    if kind is tl.constexpr:
        return kind, described(value.value)
    if isinstance(value, tl.dtype):
        return kind, str(value), getattr(value.scalar, "address_space", None)
    if kind in (tuple, list, tl.tuple):
        return kind, *map(described, value)
    raise NotReplayedError


@cache
def replayer(counts: tuple[int, int], steps: tuple[tuple[int, ...], ...], last: int) -> Any:
    """What makes a replay of constants, operations and a tensor like the result.

    Constants, tensors and then what steps gave are numbered; a step is the numbers of its operands.
    Written out, because nothing runs as often.
    """
    constants, tensors = counts
    names = [f"c{i}" for i in range(constants)]
    lines = [f"{name} = constants[{i}]" for i, name in enumerate(names)]
    lines += [f"f{i} = operations[{i}]" for i in range(len(steps))]
    lines += ["def replay(tensors):"]
    names += [f"tensors[{i}].handle" for i in range(tensors)]
    for step, operands in enumerate(steps):
        given = ", ".join(names[place] for place in operands)
        lines.append(f" s{step} = f{step}({given})")
        names.append(f"s{step}")
    lines += [" made = new(tensor)"]
    lines += [f" made.__dict__ = {{**like, 'handle': {names[last]}}}"]
    lines += [" return made", "return replay"]
    body = "".join(f"\n {line}" for line in lines)
    scope: dict[str, Any] = {"tensor": tl.tensor, "new": tl.tensor.__new__}
    exec(f"def make(constants, operations, like):{body}", scope)
    return scope["make"]


class Recorder:
    """The interpreter's builder, while it is watched."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        # whether a value was asked for, on which operations may depend
        self.read = False
        self.called: list[tuple[str, tuple[Any, ...], Any]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.builder, name)
        if name.endswith("_ty") or not callable(found):
            return found

        def watched(*args: Any) -> Any:
            made = found(*args)
            self.called.append((name, args, made))
            return made

        return watched

    def replay(self, tensors: Sequence[Any], made: Any) -> Replay:
        """What was watched, for other tensors of the same types."""
        # by its place an operand is known from another; constants are counted below 0
        places = {id(tensor.handle): place for place, tensor in enumerate(tensors)}
        if self.read or type(made) is not tl.tensor or len(places) < len(tensors):
            raise NotReplayedError
        constants: list[Any] = []
        operations: list[Any] = []
        steps: list[list[int]] = []

        def place_of(value: Any) -> int:
            if id(value) not in places:
                if isinstance(value, interpreter.TensorHandle):
                    raise NotReplayedError
                constants.append(value)
                return -len(constants)
            return places[id(value)]

        for name, args, result in self.called:
            operands = [place_of(arg) for arg in args]
            size = result.data.size if isinstance(result, interpreter.TensorHandle) else 0
            if max(operands, default=-1) < 0 and name.startswith(CONSTANT) and size <= LARGEST:
                constants.append(result)
                places[id(result)] = -len(constants)
                continue
            places[id(result)] = len(tensors) + len(steps)
            operations.append(getattr(self.builder, name))
            steps.append(operands)
        last = place_of(made.handle)

        def counted(place: int) -> int:
            return -place - 1 if place < 0 else place + len(constants)

        make = replayer(
            (len(constants), len(tensors)),
            tuple([tuple(map(counted, operands)) for operands in steps]),
            counted(last),
        )
        like = {name: value for name, value in vars(made).items() if name != "handle"}
        return make(constants, operations, like)


def replaying(member: Callable[..., Any], semantic: Any) -> Callable[..., Any]:
    """A function of the language, by the rules of `semantic`."""
    replays: dict[tuple[Any, ...], Replay | None] = {}

    def plain(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return member(*args, **kwargs)

    def watched(key: tuple[Any, ...], tensors: Sequence[Any], args: Any, kwargs: Any) -> Any:
        builder = semantic.builder
        semantic.builder = recorder = Recorder(builder)
        try:
            made = plain(*args, **kwargs)
        finally:
            semantic.builder = builder
        try:
            replays[key] = recorder.replay(tensors, made)
        except NotReplayedError:
            replays[key] = None
        return made

    def known(*args: Any, **kwargs: Any) -> Any:
        # within another that is watched
        if type(semantic.builder) is Recorder:
            return plain(*args, **kwargs)
        tensors, parts = [], []
        try:
            for value in (*args, *kwargs.values()) if kwargs else args:
                kind = type(value)
                if kind is tl.tensor:
                    tensors.append(value)
                    parts.append(value.token)
                elif kind in PLAIN:
                    parts += kind, value
                else:
                    parts.append(described(value))
        except NotReplayedError:
            return plain(*args, **kwargs)
        parts += kwargs
        key = tuple(parts)
        if key not in replays:
            return watched(key, tensors, args, kwargs)
        replay = replays[key]
        return plain(*args, **kwargs) if replay is None else replay(tensors)

    return known


def truth_of(semantic: Any) -> Callable[[Any], bool]:
    """The truth of a tensor, which may decide on an operation."""

    def truth(tensor: Any) -> bool:
        data = tensor.handle.data
        # a block has none
        if data.size != 1:
            return True
        if type(semantic.builder) is Recorder:
            semantic.builder.read = True
        return bool(data)

    return truth
