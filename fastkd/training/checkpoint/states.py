"""A state of plain values and tensors in one safetensors file.

A state is a tree of dictionaries, lists, tuples, numbers, texts and tensors. The tensors are those
of the safetensors format, the tree around them is JSON in its header. The file is written here
rather than by `safetensors.save_file`, which would need all tensors on the CPU at once, gives the
file to its owner alone, and would have to be read again for the digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastkd.files.sealed import Written

Tree = Any
"""Dictionaries with text or integer keys, lists, tuples, `None`, bool, int, float, str, tensors."""

SUFFIX = ".safetensors"
_KEY = "fastkd"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PLAIN = (bool, int, float, str, type(None))
_CHUNK = 1 << 24


class NotAState(ValueError):
    """A file that `write_state` has not written."""


def write_state(path: Path, tree: Tree) -> Written:
    """Write a state, durably, with the permissions of the umask; the digest is of what was written.

    A tensor that stands in the tree twice is stored once.

    Raises:
        OSError: the disk is full.
        TypeError: the tree holds something else than a `Tree` may.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(tree, "", tensors, {}))
    header: dict[str, Any] = {"__metadata__": {_KEY: text}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header, ensure_ascii=False).encode()
    # tensors start at multiples of eight
    head += b" " * (-len(head) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in _pieces(head, tensors):
            digest.update(piece)
            size += file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def read_state(path: Path) -> Tree:
    """The state in a file, its tensors on the CPU.

    Raises:
        NotAState: the file is another one.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            # a copy: what is mapped from the file would change with it
            return _decode(_header(file), lambda name: file.get_tensor(name).clone())
    except (SafetensorError, OSError, RecursionError) as error:
        raise NotAState(str(error)) from error


@contextmanager
def opened_state(path: Path) -> Iterator[Tree]:
    """The state in a file, with a function in the place of each tensor that reads it from there:
    for a state that is used a tensor at a time. What was read ends with the context.

    Raises:
        NotAState: the file is another one.
    """
    with ExitStack() as stack:
        try:
            file: Any = stack.enter_context(safe_open(str(path), framework="pt"))
            names = set(file.keys())

            def reader(name: str) -> Callable[[], Tensor]:
                _expect(name in names)
                return partial(file.get_tensor, name)

            tree = _decode(_header(file), reader)
        except (SafetensorError, OSError, RecursionError) as error:
            raise NotAState(str(error)) from error
        yield tree


def check_state(path: Path) -> None:
    """See that a file holds a state, without reading its tensors.

    Raises:
        NotAState: it doesn't.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            _decode(_header(file), lambda name: _expect(name in names))
    except (SafetensorError, OSError, RecursionError) as error:
        raise NotAState(str(error)) from error


def _pieces(head: bytes, tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    yield memoryview(len(head).to_bytes(8, "little"))
    yield memoryview(head)
    for tensor in tensors.values():
        # one at a time on the CPU; numpy knows no bfloat16
        flat = tensor.detach().reshape(-1).cpu().contiguous()
        content = memoryview(flat.view(torch.uint8).numpy().data)
        for begin in range(0, len(content), _CHUNK):
            yield content[begin : begin + _CHUNK]


def _expect(there: bool) -> None:
    if not there:
        raise NotAState("its header names a tensor that it doesn't hold")


def _header(file: Any) -> Any:
    try:
        return json.loads((file.metadata() or {})[_KEY])
    except (LookupError, ValueError, RecursionError) as error:
        raise NotAState("its header holds no state") from error


def _encode(tree: Tree, path: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
    """The tree for JSON, which knows neither tuples nor keys that are numbers."""
    if isinstance(tree, Tensor):
        return {"tensor": _note(tree, path or "/", tensors, seen)}
    if isinstance(tree, dict):
        items = [
            [_checked_key(key), _encode(value, f"{path}/{key}", tensors, seen)]
            for key, value in tree.items()
        ]
        return {"dict": items}
    if isinstance(tree, tuple | list):
        items = [
            _encode(value, f"{path}/{number}", tensors, seen) for number, value in enumerate(tree)
        ]
        return {"tuple": items} if isinstance(tree, tuple) else items
    if isinstance(tree, int) and not isinstance(tree, bool):
        # numbers of an enumeration, too
        return int(tree)
    if isinstance(tree, _PLAIN):
        return tree
    raise TypeError(f"a checkpoint holds no {type(tree).__name__}, but {path} is one")


def _note(tensor: Tensor, path: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> str:
    place = (
        tensor.data_ptr(),
        tensor.device,
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
    )
    # an empty tensor has no place
    name = seen.setdefault(place, path) if tensor.numel() else path
    if name == path:
        assert path not in tensors, f"two tensors are called {path}"
        tensors[path] = tensor
    return name


def _checked_key(key: Any) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"a checkpoint holds no key {key!r}")
    found: str | int = key
    return found


def _decode(tree: Any, tensor: Callable[[str], Any]) -> Tree:
    if isinstance(tree, list):
        return [_decode(value, tensor) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        ((kind, value),) = tree.items()
        if kind == "tensor" and isinstance(value, str):
            return tensor(value)
        if kind == "tuple" and isinstance(value, list):
            return tuple(_decode(one, tensor) for one in value)
        if kind == "dict" and isinstance(value, list) and all(map(_is_item, value)):
            return {key: _decode(one, tensor) for key, one in value}
    raise NotAState("its header holds something else than a state")


def _is_item(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int)
