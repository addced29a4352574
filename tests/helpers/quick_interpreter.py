"""Triton's interpreter without what it repeats for every call and every value.

Triton replaces the functions of `triton.language` for a launch, and once more whenever a kernel
calls another function: that took half the time of the kernel tests. Of the rest, it spends a third
on types: each value gets a new one, checked and described anew, of the few that a kernel has. What
is computed is the same.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

# what kernels and Triton's own device functions see of the language
LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
# Triton's own
patch_language = interpreter._patch_lang
call_and_patch = interpreter.InterpretedFunction.__call__
describe_block = tl.block_type.__init__
describe_tensor = tl.tensor.__init__
compare_types = tl.dtype.__eq__
broadcast_both = TritonSemantic.broadcast_impl_value
numpy_type = interpreter._get_np_dtype

# attributes of block types by element type and shape, and those that tensors of a type share
_blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
_scalars: dict[str, dict[str, Any]] = {}


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a device function within a launch, which has replaced the language."""
    try:
        return function.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def block_type(block: Any, element_ty: Any, shape: Any) -> None:
    """Describe a block of plain numbers as the first one of its kind was."""
    if type(element_ty) is not tl.dtype:
        describe_block(block, element_ty, shape)
        return
    key = (element_ty.name, *shape)
    known = _blocks.get(key)
    if known is None:
        describe_block(block, element_ty, shape)
        known = _blocks[key] = {**vars(block), "shared": {}}
    vars(block).update(known)


def tensor(value: Any, handle: Any, kind: Any) -> None:
    """Describe a tensor as the first one of its type was."""
    if type(kind) is tl.dtype:
        shared = _scalars.setdefault(kind.name, {})
    else:
        shared = vars(kind).get("shared")
    if not shared:
        describe_tensor(value, handle, kind)
        if shared is not None:
            shared.update(vars(value), handle=None, type=None)
        return
    vars(value).update(shared)
    value.handle, value.type = handle, kind


def equal(one: Any, other: Any) -> Any:
    if type(other) is tl.dtype:
        return one.name == other.name
    return compare_types(one, other)


def broadcast(semantic: Any, one: Any, other: Any) -> tuple[Any, Any]:
    """Blocks of one shape as they are."""
    kind, like = one.type, other.type
    if kind.is_block() and like.is_block() and kind.shape.values == like.shape.values:
        return one, other
    return broadcast_both(semantic, one, other)


@cache
def _numpy_type_of(name: str) -> Any:
    return numpy_type(tl.dtype(name))


def numpy_type_again(of: Any) -> Any:
    scalar = of.scalar
    return _numpy_type_of(scalar.name) if type(scalar) is tl.dtype else numpy_type(of)


def patch_once_a_launch() -> None:
    """Replace the whole language where a kernel is launched, and nothing where it calls another;
    describe every type once."""
    interpreter._patch_lang = lambda launched: patch_language(LANGUAGE)
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = numpy_type_again
    tl.block_type.__init__ = block_type
    tl.tensor.__init__ = tensor
    tl.dtype.__eq__ = equal
    TritonSemantic.broadcast_impl_value = broadcast
