"""What fastkd's code refuses, in its own words: read from the source, where an ellipsis stands for
what is put in when it is said."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

GAP = "…"
# a message that is less than this is put together elsewhere
_LEAST = 25
_ERRORS = ("UserError", "ValueError", "RankError", "DiskError", "SharedError")
_FOLDERS = ("fastkd.losses", "fastkd.layer_map")


def refusals(roots: Iterable[Any], names: dict[str, str]) -> list[str]:
    """The messages of what classes and functions raise, and of what they call beside them.

    Args:
        roots: classes and functions of fastkd.
        names: what is written for an expression of a message, as `hidden` for `self.name`; for an
            argument's name where a function has it.
    """
    found: dict[str, None] = {}
    waiting, seen = list(roots), set()
    while waiting:
        root = waiting.pop(0)
        if root in seen:
            continue
        seen.add(root)
        tree = ast.parse(textwrap.dedent(inspect.getsource(root)))
        found |= dict.fromkeys(_raised(tree, names))
        waiting += _called(tree, inspect.getmodule(root))
    return [text for text in found if len(text.replace(GAP, "")) >= _LEAST]


def texts(folder: Path) -> set[str]:
    """Every text that stands in the source below a folder, whole."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                found.add(_text(node, {}))
    return found


def _raised(tree: ast.AST, names: dict[str, str]) -> Iterator[str]:
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        # elsewhere a word may be the name of something else
        given = {argument.arg for argument in function.args.args}
        known = {n: said for n, said in names.items() if not n.isidentifier() or n in given}
        for node in ast.walk(function):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                error, arguments = node.exc.func, node.exc.args
                if isinstance(error, ast.Name) and error.id in _ERRORS and arguments:
                    yield _text(arguments[0], known)


def _called(tree: ast.AST, module: Any) -> Iterator[FunctionType]:
    """Functions of losses and layer maps that a source calls by their names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = getattr(module, node.func.id, None)
            if not isinstance(called, FunctionType):
                continue
            place = called.__module__
            # what a decorator refuses is for who writes a class
            if place.startswith(_FOLDERS) and not place.endswith(".registry"):
                yield called


def _text(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value, names) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return names.get(ast.unparse(node.value), GAP)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, names) + _text(node.right, names)
    return GAP
