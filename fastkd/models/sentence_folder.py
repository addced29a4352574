"""What a sentence-transformers model holds beside its transformer: modules, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from fastkd.head_spec import HEADS
from fastkd.models.checking import optional_file
from fastkd.models.locate import locate_source
from fastkd.models.modules import ListingError, Module, read_modules
from fastkd.types import Head, ModelSource

TRANSFORMERS = ("Transformer", "MLMTransformer")
CONFIGS = ("config.json", "cnn_config.json", "lstm_config.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Of the transformer module, one for each kind of model that older releases told apart."""


class Listed(NamedTuple):
    """The modules of a model, the transformer first, or why it has none that can be used."""

    modules: tuple[Module, ...] = ()
    reason: str | None = None


def list_modules(source: ModelSource, head: Head) -> Listed:
    """The modules that stand behind a transformer; reads small files alone.

    Both are empty for a model that is none of sentence-transformers, and for one that became a
    classifier: it is no encoder of sentences.
    """
    listing = source_file(source, "modules.json")
    if listing is None:
        return Listed()
    try:
        modules = read_modules(listing)
    except ListingError as error:
        return Listed(reason=f"all ({error})")
    kinds = ", ".join(module.kind for module in modules) or "all"
    if not modules or modules[0].kind not in TRANSFORMERS or not modules[0].is_known:
        return Listed(reason=f"{kinds} (the first one is no Transformer)")
    if not modules[0].stays_inside:
        return Listed(reason=f"{kinds} (the first one's path is {modules[0].path!r})")
    task = _task(source, modules[0])
    if task not in HEADS[head].sentence_tasks:
        if HEADS[head].data == "task" and task == "feature-extraction":
            return Listed()
        return Listed(reason=f"{kinds} (made for {task}, but student.head is {head})")
    return Listed(tuple(modules))


def module_file(source: ModelSource, module: Module, names: tuple[str, ...]) -> Path | None:
    """The first of some files that a module has, `None` where it has none."""
    found = (source_file(source, joined(module.path, name)) for name in names)
    return next((path for path in found if path is not None), None)


def source_file(source: ModelSource, name: str) -> Path | None:
    """A file of a model, `None` where there is none."""
    return optional_file(locate_source(source.name), name, source.revision)


def joined(path: str, name: str) -> str:
    """A file's name within the model's folder."""
    return f"{path}/{name}" if path else name


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object, `None` where the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    # ValueError: no UTF-8, no JSON, or a number too long to be read
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _task(source: ModelSource, first: Module) -> str:
    """What the transformer module asks of the model, in the library's words."""
    default = "fill-mask" if first.kind == "MLMTransformer" else "feature-extraction"
    for name in SETTINGS:
        path = source_file(source, joined(first.path, name))
        if path is not None:
            settings = read_object(path)
            if settings is None:
                return f"what {name} can't be read for"
            return str(settings.get("transformer_task", default))
    return default
