"""Arrays of a cache folder in files of plain numbers: appended while built, then memory-mapped."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fastkd.errors import UserError
from fastkd.files.disk import not_allowed


def flat_file(folder: Path, name: str) -> Path:
    """Where the array of a name is."""
    return folder / f"{name}.bin"


def append(file: BinaryIO, values: Iterable[float], dtype: npt.DTypeLike) -> None:
    """Write numbers behind those that are there."""
    np.fromiter(values, dtype=dtype).tofile(file)


def open_flat(
    folder: Path, name: str, dtype: npt.DTypeLike, size: int, field: str
) -> npt.NDArray[Any]:
    """The array of a name, [size], read-only; `field` of the recipe says where the folder is.

    Raises:
        UserError: it is not there, may not be read, or has another size.
    """
    remedy = f"{field}: {folder} is damaged; delete it and run again"
    path = flat_file(folder, name)
    try:
        # an empty file can't be mapped
        stored = np.memmap(path, dtype=dtype, mode="r") if size else np.fromfile(path, dtype)
    except PermissionError as error:
        raise UserError(f"{field}: {not_allowed(path, error)}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{remedy} ({error})") from error
    if len(stored) != size:
        raise UserError(f"{remedy} ({path.name} has {len(stored)} numbers, expected {size})")
    return stored
