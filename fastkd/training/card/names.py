"""Names in place of paths: what is published says nothing of the machine that it was made on."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from fastkd.data.text.readers import by_name
from fastkd.files.home import home_or_none

_WRITTEN_AS_PATHS = ("/", "~", "./", "../")


def is_path(text: str) -> bool:
    """Whether a value of a recipe names a file or folder of this machine.

    A hub name that is a folder here, seen from the working folder, is that folder: transformers
    takes it for one, too. So is what stands behind the name of a registered reader, where it has
    folders: only the reader knows what it says, as in `sqlite:FOLDER/FILE?TABLE`.
    """
    form, place = _taken_apart(text)
    if form:
        return "/" in place or place.startswith(_WRITTEN_AS_PATHS)
    if "\n" in text or "\0" in text or len(text) > 4096:
        return False
    if text.startswith(_WRITTEN_AS_PATHS):
        return True
    return "/" in text and (glob.has_magic(text) or os.path.lexists(text))


def public_name(text: str) -> str:
    """A value of a recipe as others may read it: of a path its last part, all else as it is.

    A run's `student` folder is called as its run, and the name of a reader stays.
    """
    if not is_path(text):
        return text
    form, place = _taken_apart(text)
    return form + _last_part(place)


def _last_part(text: str) -> str:
    path = PurePath(text)
    if path.name == "student" and Path(os.path.expanduser(text)).with_name("recipe.yaml").is_file():
        path = path.parent
    # a root, or the way to a parent, has no name
    return path.name if path.name not in ("", "..", "~") else "folder"


def public_tree(tree: Any) -> Any:
    """A recipe's values with names in place of paths."""
    if isinstance(tree, Mapping):
        return {key: public_tree(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [public_tree(value) for value in tree]
    return public_name(tree) if isinstance(tree, str) else tree


class PublicText:
    """Writes sentences that may quote paths: those of a recipe, the working folder and the home.

    Args:
        tree: values of the recipe, whose paths are known by this.
    """

    def __init__(self, tree: Any) -> None:
        found = [text for text in _strings(tree) if is_path(text)]
        # a sentence may quote what a reader read without the reader's name
        places = [place for form, place in map(_taken_apart, found) if form]
        paths = {place: _last_part(place) for place in places}
        paths |= {text: public_name(text) for text in found}
        for folder, name in ((Path.cwd(), "."), (home_or_none(), "~")):
            # a root would be found in every path
            if folder is not None and len(folder.parts) > 1:
                paths.setdefault(str(folder), name)
        # the longest first: one path may begin another
        self._paths = sorted(paths.items(), key=lambda item: -len(item[0]))

    def __call__(self, text: str) -> str:
        for path, name in self._paths:
            text = text.replace(path, name)
        return text


def _taken_apart(text: str) -> tuple[str, str]:
    """`FORMAT:` and what stands behind it, where a registered reader has the name of the format;
    else nothing and all of it."""
    if by_name(text) is None:
        return "", text
    form, colon, place = text.partition(":")
    return form + colon, place


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _strings(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _strings(value)
