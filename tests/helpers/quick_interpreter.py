"""Triton's interpreter without what it repeats for every call of a device function.

Triton replaces the functions of `triton.language` for a launch, and once more whenever a kernel
calls another function: that took half the time of the kernel tests. What is computed is the same.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

# what kernels and Triton's own device functions see of the language
LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
# Triton's own
patch_language = interpreter._patch_lang
call_and_patch = interpreter.InterpretedFunction.__call__


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a device function within a launch, which has replaced the language."""
    try:
        return function.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def patch_once_a_launch() -> None:
    """Replace the whole language where a kernel is launched, and nothing where it calls another."""
    interpreter._patch_lang = lambda launched: patch_language(LANGUAGE)
    interpreter.InterpretedFunction.__call__ = call
