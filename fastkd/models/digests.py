"""Which models a run was started with, by the digests of their files.

A run that is continued with another teacher would end as neither of two runs. What is noted is what
transformers and sentence-transformers read of a folder: configuration, weights, tokenizer, modules.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from fastkd.errors import UserError
from fastkd.files.disk import disk_errors, write_whole
from fastkd.files.sealed import file_sha256
from fastkd.models.checking import optional_file
from fastkd.models.links import READ
from fastkd.models.locate import locate_model, locate_source
from fastkd.models.modules import ListingError, read_modules
from fastkd.recipe import AnyRecipe, Recipe
from fastkd.types import ModelSource

NOTE = "models.json"
"""File of a run that holds the digests."""
_COMMIT = "commit"
_PUT_BACK = "put back what was there, or give another run.output"


def model_sources(recipe: AnyRecipe) -> dict[str, ModelSource]:
    """The models that a recipe starts from, by the field that names each."""
    if not isinstance(recipe, Recipe):
        return {"model.name": recipe.model.source}
    start = recipe.student.starts_from
    starts = {} if start is None else {"student.init": start}
    others = {
        f"teacher.others.{number}": other.source
        for number, other in enumerate(recipe.teacher.others, start=1)
    }
    return {"teacher.model": recipe.teacher.source, **others, **starts}


def model_digests(source: ModelSource) -> dict[str, str]:
    """sha256 of every file that is read of a model, by its path in the model's folder.

    Of a model of the hub also its commit. About a second a gigabyte for weights that were just
    loaded; several files are read at once.

    Raises:
        UserError: a file can't be read.
    """
    root, commit = _folder(source)
    files = {path.relative_to(root).as_posix(): path for path in _files(root, source)}
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(files, pool.map(_sha256, files.values()), strict=True))
    return {**digests, **({_COMMIT: commit} if commit else {})}


def model_bytes(source: ModelSource) -> int:
    """Bytes of the files that are read of a model: weights, configuration, tokenizer, modules."""
    root, _ = _folder(source)
    files = list(_files(root, source))
    if any(path.suffix == ".safetensors" for path in files):
        # a second copy of the weights, which then nobody reads
        files = [path for path in files if path.suffix != ".bin"]
    return sum(path.stat().st_size for path in files)


def note_models(run: Path, recipe: AnyRecipe, first: Path | None = None) -> None:
    """Note the models of a run that starts, or see that one that continues still has them.

    Args:
        run: its folder.
        recipe: its recipe, the models of which were loaded.
        first: folder of the run whose student this one starts from, as a later stage does: its
            other models are the same.

    Raises:
        UserError: naming the first file that is not what it was.
    """
    found = {field: model_digests(source) for field, source in model_sources(recipe).items()}
    path = run / NOTE
    if path.exists():
        require_same_models(run, recipe, found, _PUT_BACK)
        return
    if first is not None and (first / NOTE).exists():
        teachers = {field: files for field, files in found.items() if field != "student.init"}
        require_same_models(first, recipe, teachers, _PUT_BACK)
    with disk_errors(run):
        write_whole(path, json.dumps(found, indent=2) + "\n")


def require_same_models(
    run: Path, recipe: AnyRecipe, found: Mapping[str, Mapping[str, str]], remedy: str
) -> None:
    """See that models are those that a run was started with.

    Args:
        run: its folder.
        recipe: which names them.
        found: digests of some of them, as `model_digests` gives them, by field.
        remedy: what to do where a file is another.

    Raises:
        UserError: naming the first file that is not what it was.
    """
    for field, noted in noted_models(run).items():
        if field not in found:
            continue
        source, now = model_sources(recipe).get(field), found[field]
        given = f"{field} {source.name}" if source else field
        for name in sorted(noted.keys() | now.keys()):
            # of the hub more files may have come since, of the same commit
            added = name not in noted and _COMMIT in noted
            if noted.get(name) != now.get(name) and not added:
                raise UserError(
                    f"{given}: {name} {_change(name, noted, now)} since {run} was started; {remedy}"
                )


def _change(name: str, noted: Mapping[str, str], now: Mapping[str, str]) -> str:
    if name in noted and name in now:
        return "has changed"
    return "is gone" if name in noted else "was added"


def noted_models(run: Path) -> dict[str, dict[str, str]]:
    """What `note_models` noted in a run's folder.

    Raises:
        UserError: it can't be read.
    """
    path = run / NOTE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(field): dict(digests) for field, digests in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} can't be read, so nothing says which models the run was started with; remove "
            "it if they are the same, or give another run.output"
        ) from error


def _folder(source: ModelSource) -> tuple[Path, str | None]:
    """Where a model lies on this machine, and its commit if it is of the hub."""
    name = locate_source(source.name)
    if Path(name).is_dir():
        return Path(name), None
    config = optional_file(name, "config.json", source.revision)
    config = config or optional_file(name, "modules.json", source.revision)
    assert config is not None, "a model that was loaded has a configuration"
    # the hub's cache names a folder after its commit
    return config.parent, config.parent.name


def _files(root: Path, source: ModelSource) -> Iterator[Path]:
    model = Path(locate_model(source.name))
    folders = [root, *(root / name for name in _modules(root)), model if model.is_dir() else root]
    for folder in dict.fromkeys(folders):
        if folder.is_dir() and folder.is_relative_to(root):
            for path in sorted(folder.iterdir()):
                if path.is_file() and any(fnmatch(path.name, pattern) for pattern in READ):
                    yield path


def _modules(root: Path) -> Iterator[str]:
    """Folders that a listing of sentence-transformers' modules names inside its own."""
    try:
        modules = read_modules(root / "modules.json")
    except ListingError:
        # what can't be read is read by nothing
        return
    yield from (module.path for module in modules if module.stays_inside)


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
