"""What all sections of a recipe share."""

from __future__ import annotations

import difflib
import functools
import math
import os
import reprlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticUndefinedAnnotation,
    TypeAdapter,
    ValidationInfo,
    field_validator,
)

from fastkd.errors import UserError, is_text
from fastkd.plugins import is_module_name, plugin_errors

S = TypeVar("S", bound=BaseModel)

LARGEST = 2**63 - 1
"""Largest value of any number, as of a signed one of 64 bits."""
MOST_HEADS = 10_000
"""Attention heads of a layer."""
LONGEST = 2**20
"""Tokens of a block or an example."""
MOST_ROWS = 2**24
"""Blocks or examples of a batch."""
MOST_TOKENS = 2**40
"""Tokens of a batch."""
LONGEST_RUN = 10_000_000
"""Steps of a run."""
# of a section that is handed on as it is
_DEEPEST = 20
# bytes that file systems take for a part of a path and for all of it, less what fastkd adds
_PART, _PATH = 255, 3800


def short(value: object) -> str:
    """A value as it is quoted in a message."""
    try:
        return reprlib.repr(value)
    # a number of more digits than Python writes
    except ValueError:
        return type(value).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The part of a message that names what is nearest to an unknown name; empty if nothing is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def read_as(section: type[S], name: str, value: object) -> S:
    """Read a value as a section; a complaint says `name` before the field, as it says keys.

    Raises:
        ValidationError: it is none.
        UserError: a plugin's section that fails.
    """
    with plugin_errors(name, section, agreed=ValueError):
        read: S = _reader(section).validate_python({name: value})[name]
    return read


@functools.cache
def _reader(section: type[BaseModel]) -> TypeAdapter[dict[str, Any]]:
    return TypeAdapter(dict[str, section])  # type: ignore[valid-type]


def check_annotations(called: str, section: type[BaseModel]) -> None:
    """See that the types of a plugin's section are known once it is read.

    Raises:
        UserError: naming the first that isn't.
    """
    try:
        section.model_rebuild()
    except PydanticUndefinedAnnotation as error:
        raise UserError(
            f"{called}: {error.name} is not known when Python runs; import or define it above, "
            "outside of TYPE_CHECKING"
        ) from error


def _check_path(text: str) -> str:
    """Refuse text that can name no file or folder.

    Raises:
        ValueError: a NUL, what this system can't write, or a part that is too long.
    """
    if not is_text(text):
        raise ValueError("expected a path, but half a surrogate pair is no text")
    try:
        encoded = text.encode(sys.getfilesystemencoding())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"names of files are written in {error.encoding} here, which can't write "
            f"{text[:100]!r}; set PYTHONUTF8=1"
        ) from error
    if b"\0" in encoded:
        raise ValueError(f"expected a path, which holds no NUL (given {text[:100]!r})")
    longest = max(map(len, encoded.split(os.sep.encode())))
    if longest > _PART or len(encoded) > _PATH:
        raise ValueError(
            f"expected a path of at most {_PATH} bytes, {_PART} a part (given {len(encoded)} "
            f"bytes, {longest} in one part)"
        )
    return text


def check_place(text: str) -> str:
    """Refuse text that can name no file, folder, or model on a hub.

    Raises:
        ValueError: as `_check_path`, or an unknown home.
    """
    if _check_path(text).startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError as error:
            raise ValueError(f"no such home folder (given {text[:100]!r})") from error
    return text


def _check_cache(text: str) -> str:
    # what lies in the user's own home may not be needed, so it is looked for where it is
    return _check_path(text) if text.split(os.sep)[0] == "~" else check_place(text)


def check_plain(value: Any, depth: int = 0) -> Any:
    """Refuse what JSON can't hold, or what is deeper than any configuration.

    Raises:
        ValueError: saying what.
    """
    if depth > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} sections inside each other")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"expected text for a key (given {key!r:.100})")
            check_plain(inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_plain(inner, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number (given {value})")
    elif isinstance(value, int):
        _check_bits(value)
    elif not isinstance(value, str | float | None):
        raise ValueError(f"expected a plain value (given {type(value).__name__})")
    return value


def _check_module(name: str) -> str:
    if not is_module_name(name):
        raise ValueError(
            f"expected the name of a module, as in `import my_losses` (given {name[:100]!r})"
        )
    return name


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _none_or_more(value: object) -> object:
    return [] if value is None else _one_or_many(value)


Name = Annotated[str, Field(min_length=1)]
Place = Annotated[Name, AfterValidator(check_place)]
CachePlace = Annotated[Name, AfterValidator(_check_cache)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_one_or_many), Field(min_length=1)]
Places = Annotated[tuple[Place, ...], BeforeValidator(_one_or_many), Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, le=LARGEST)]
Plugins = Annotated[
    tuple[Annotated[Name, AfterValidator(_check_module)], ...], BeforeValidator(_none_or_more)
]
Extras = Annotated[dict[str, Any], BeforeValidator(check_plain)]


class Section(BaseModel):
    """What all sections share: immutable, strict about keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would read true as 1
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError(
                f"expected a value, not a switch (given {value}); put quotes around a word such as "
                "true"
            )
        if isinstance(value, int):
            _check_bits(value)
        return value


def _check_bits(value: int) -> None:
    if abs(value) > LARGEST:
        raise ValueError(f"expected a number of 64 bits (given one of {value.bit_length()})")
