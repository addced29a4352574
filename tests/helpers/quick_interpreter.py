"""Triton's interpreter without what it repeats for every call and every value.

Triton replaces the functions of `triton.language` for a launch, and once more whenever a kernel
calls another function; it describes a block's type anew for each value; it computes integers a
second time in 64 bits, for an assertion on overflow that it then leaves out; and it asks for each
operation what types allow (`replayed_calls.py`). That took nine tenths of the time of a launch.
What is computed is the same.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from replayed_calls import replaying, token, truth_of
from triton.runtime import interpreter

# what kernels and Triton's own device functions see of the language
LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
# Triton's own, by owner and name
REPLACED: dict[tuple[Any, str], Any] = {}

patch_language = interpreter._patch_lang
block_init, tensor_init = tl.block_type.__init__, tl.tensor.__init__
equal_dtypes, np_dtype = tl.dtype.__eq__, interpreter._get_np_dtype
unwrap_constexpr = tl.core._unwrap_if_constexpr


class Builder(interpreter.InterpreterBuilder):
    """Triton's operations, by the shortest way to numpy."""

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        left, right = lhs.data, rhs.data
        # booleans
        if left.itemsize == 1:
            return super().binary_op(lhs, rhs, op)
        made = op(left, right)
        if made.itemsize > left.itemsize:
            return super().binary_op(lhs, rhs, op)
        return interpreter.TensorHandle(made, lhs.dtype.scalar)

    def create_expand_dims(self, arg: Any, axis: int) -> Any:
        made = arg.data[(slice(None),) * axis + (None,)]
        return interpreter.TensorHandle(made, arg.dtype.scalar)

    def create_splat(self, ret_ty: Any, arg: Any) -> Any:
        made = np.empty(ret_ty.shape, known_np_dtype(arg.dtype))
        made[...] = arg.data
        return interpreter.TensorHandle(made, arg.dtype.scalar)

    def create_broadcast(self, arg: Any, shape: Any) -> Any:
        data = arg.data
        if not data.flags.c_contiguous:
            return super().create_broadcast(arg, shape)
        strides = [
            0 if size == 1 else step for size, step in zip(data.shape, data.strides, strict=True)
        ]
        made = np.ndarray(shape, data.dtype, data, 0, strides)
        return interpreter.TensorHandle(made, arg.dtype.scalar)


class Semantic(interpreter.TritonSemantic):
    """Triton's rules, for values that need none of them."""

    def binary_op_sanitize_overflow_impl(self, *args: Any, **kwargs: Any) -> None:
        # `device_assert` asks the same, but last
        if self.builder.options.debug:
            super().binary_op_sanitize_overflow_impl(*args, **kwargs)

    def to_tensor(self, x: Any, check_type: bool = True) -> Any:
        return x if type(x) is tl.tensor else super().to_tensor(x, check_type)


SEMANTIC = Semantic(Builder())
# functions of the language, by Triton's own
KNOWN: dict[Any, Any] = {}


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a device function within a launch, which has replaced the language."""
    try:
        return function.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Replace a function of the language by one that knows what its rules came to."""
    if member not in KNOWN:
        KNOWN[member] = replaying(member, SEMANTIC)
    scope.set_attr(owner, name, KNOWN[member])


@cache
def changes() -> list[tuple[Any, str, Any, Any]]:
    """What a launch replaces: owner, name, Triton's own and what stands in for it."""
    scope = patch_language(LANGUAGE)
    scope.set_attr(tl.tensor, "__bool__", truth_of(SEMANTIC))
    # what was replaced twice was Triton's own at first
    own = {(owner, name): value for owner, name, value in scope._changes[::-1]}
    found = [(*place, value, vars(place[0])[place[1]]) for place, value in own.items()]
    scope.restore()
    return found


class Scope:
    """The language replaced, for a launch."""

    def __init__(self, launched: Any) -> None:
        for owner, name, _, known in changes():
            setattr(owner, name, known)

    def restore(self) -> None:
        for owner, name, own, _ in changes():
            if own is interpreter._MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def init_handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
    self.data, self.dtype, self.attr = data, dtype, {}


def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """Share all that describes a block with others of its kind."""
    sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
    kinds = vars(element_ty).setdefault("_blocks", {})
    known = kinds.get(sizes)
    # 16.0 finds what 16 left, but is none
    if known is not None and {*map(type, sizes)} == {int}:
        self.__dict__ = known
        return
    block_init(self, element_ty, shape)
    kinds[sizes] = vars(self)


def init_tensor(self: Any, handle: Any, type: Any) -> None:
    """Share all but the values with others of its type."""
    known = vars(type).get("_tensor")
    if known is None:
        tensor_init(self, handle, type)
        known = type._tensor = {**vars(self), "token": token(type)}
        del known["handle"]
    self.__dict__.update(known)
    self.handle = handle


def same_dtype(self: Any, other: Any) -> bool:
    return self is other or equal_dtypes(self, other)


def known_np_dtype(tt_dtype: Any) -> Any:
    known = vars(tt_dtype).get("_np_dtype")
    if known is None:
        known = tt_dtype._np_dtype = np_dtype(tt_dtype)
    return known


def unwrap(value: Any) -> Any:
    return value if type(value) in (tl.tensor, int) else unwrap_constexpr(value)


def replace(owner: Any, name: str, value: Any) -> None:
    if hasattr(owner, name):
        REPLACED[owner, name] = getattr(owner, name)
        setattr(owner, name, value)


def make_quick() -> None:
    """Replace the whole language where a kernel is launched, and nothing where it calls another."""
    replace(interpreter, "_patch_lang", Scope)
    replace(interpreter.TensorHandle, "__init__", init_handle)
    replace(interpreter.InterpretedFunction, "__call__", call)
    replace(interpreter, "_patch_attr", patch_attr)
    replace(interpreter, "interpreter_semantic", SEMANTIC)
    replace(interpreter, "interpreter_builder", SEMANTIC.builder)
    replace(interpreter, "_get_np_dtype", known_np_dtype)
    replace(tl.core, "_unwrap_if_constexpr", unwrap)
    replace(tl.block_type, "__init__", init_block_type)
    replace(tl.tensor, "__init__", init_tensor)
    replace(tl.dtype, "__eq__", same_dtype)
