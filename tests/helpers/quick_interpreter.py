"""Triton's interpreter without what it repeats for every call and every value.

Triton replaces the functions of `triton.language` for a launch, and once more whenever a kernel
calls another function; it describes a block's type anew for each value; and it computes integers a
second time in 64 bits, for an assertion on overflow that it then leaves out. That took three
quarters of the time of the kernel tests. What is computed is the same.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

# what kernels and Triton's own device functions see of the language
LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
# Triton's own, by owner and name
REPLACED: dict[tuple[Any, str], Any] = {}
# types whose operations with themselves stay in them
CLOSED = {"int1", "int32", "int64", "fp32", "fp64"}

patch_language = interpreter._patch_lang
block_init, tensor_init = tl.block_type.__init__, tl.tensor.__init__
equal_dtypes, np_dtype = tl.dtype.__eq__, interpreter._get_np_dtype
unwrap_constexpr = tl.core._unwrap_if_constexpr


class Semantic(interpreter.TritonSemantic):
    """Triton's rules, for operands that need none of them."""

    def binary_op_type_checking_impl(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            isinstance(lhs, tl.tensor)
            and isinstance(rhs, tl.tensor)
            and lhs.dtype is rhs.dtype
            and lhs.dtype.name in CLOSED
        ):
            return self.broadcast_impl_value(lhs, rhs)
        return super().binary_op_type_checking_impl(lhs, rhs, *args, **kwargs)

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape:
            return lhs, rhs
        if lhs.type.is_block() and rhs.type.is_block():
            left, right = lhs.type.shape.values, rhs.type.shape.values
            sizes = [b if a == 1 else a for a, b in zip(left, right, strict=False)]
            if len(left) == len(right) and all(
                b in (1, size) for b, size in zip(right, sizes, strict=False)
            ):
                return self._broadcast(lhs, sizes), self._broadcast(rhs, sizes)
        return super().broadcast_impl_value(lhs, rhs)

    def _broadcast(self, value: Any, sizes: list[int]) -> Any:
        if value.type.shape.values == sizes:
            return value
        handle = self.builder.create_broadcast(value.handle, sizes)
        return tl.tensor(handle, tl.block_type(value.dtype, sizes))

    def binary_op_sanitize_overflow_impl(self, *args: Any, **kwargs: Any) -> None:
        # `device_assert` asks the same, but last
        if self.builder.options.debug:
            super().binary_op_sanitize_overflow_impl(*args, **kwargs)


SEMANTIC = Semantic(interpreter.interpreter_builder)


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a device function within a launch, which has replaced the language."""
    try:
        return function.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Replace a function of the language by one that knows its rules."""

    def known(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = SEMANTIC
        return member(*args, **kwargs)

    scope.set_attr(owner, name, known)


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
        known = type._tensor = {**vars(self)}
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
    replace(interpreter, "_patch_lang", lambda launched: patch_language(LANGUAGE))
    replace(interpreter.InterpretedFunction, "__call__", call)
    replace(interpreter, "_patch_attr", patch_attr)
    replace(interpreter, "interpreter_semantic", SEMANTIC)
    replace(interpreter, "_get_np_dtype", known_np_dtype)
    replace(tl.core, "_unwrap_if_constexpr", unwrap)
    replace(tl.block_type, "__init__", init_block_type)
    replace(tl.tensor, "__init__", init_tensor)
    replace(tl.dtype, "__eq__", same_dtype)
