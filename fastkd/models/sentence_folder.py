"""What a sentence-transformers model holds beside its transformer: modules, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from fastkd.head_spec import HEADS
from fastkd.models.checking import optional_file
from fastkd.models.links import require_inside
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
"""Settings of the transformer module, one file for each kind of model that older releases told
apart."""


LISTING = "modules.json"
LIBRARY = "config_sentence_transformers.json"
"""Settings of the whole model: its prompts, and what its embeddings are compared by."""


class Listed(NamedTuple):
    """The modules of a model, the transformer first, or why it has none that can be used."""

    modules: tuple[Module, ...] = ()
    reason: str | None = None


def list_modules(source: ModelSource, head: Head) -> Listed:
    """The modules that stand behind a transformer; reads small files alone.

    Both are empty for a model that is none of sentence-transformers, and for one that became a
    classifier: it is no encoder of sentences.
    """
    listing = source_file(source, LISTING)
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


def is_unsure(source: ModelSource) -> bool:
    """Whether a hub model may have modules that can't be seen: neither are they in the cache, nor
    has the hub said that there are none."""
    place = locate_source(source.name)
    if Path(place).is_dir() or source_file(source, LISTING) is not None:
        return False
    try:
        found = try_to_load_from_cache(place, LISTING, revision=source.revision)
    except HFValidationError:
        return False
    return found is None


def module_file(source: ModelSource, module: Module, names: tuple[str, ...]) -> Path | None:
    """The first of some files that a module has, `None` where it has none."""
    found = (source_file(source, joined(module.path, name)) for name in names)
    return next((path for path in found if path is not None), None)


def source_file(source: ModelSource, name: str) -> Path | None:
    """A file of a model, `None` where there is none.

    Raises:
        UserError: it is a link to a place outside of the model's folder.
    """
    place = locate_source(source.name)
    found = optional_file(place, name, source.revision)
    if found is not None and Path(place).is_dir() and not source.name.startswith("package:"):
        require_inside(found, Path(place))
    return found


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


def settings_file(source: ModelSource, first: Module) -> Path | None:
    """What the transformer module reads its texts by, `None` where nothing says so."""
    files = (source_file(source, joined(first.path, name)) for name in SETTINGS)
    return next((path for path in files if path is not None), None)


def reading_settings(source: ModelSource) -> dict[str, Any]:
    """What sentence-transformers reads a model's texts by: `max_seq_length`, `do_lower_case` and
    others; empty where nothing says so."""
    listing = source_file(source, LISTING)
    try:
        modules = [] if listing is None else read_modules(listing)
    except ListingError:
        return {}
    if not modules or modules[0].kind not in TRANSFORMERS or not modules[0].stays_inside:
        return {}
    path = settings_file(source, modules[0])
    return {} if path is None else read_object(path) or {}


def known_prompts(source: ModelSource) -> dict[str, str]:
    """The prompts of a model by name, empty ones too."""
    found = _library_settings(source).get("prompts")
    given = found if isinstance(found, dict) else {}
    return {name: text for name, text in given.items() if isinstance(text, str)}


def default_prompt(source: ModelSource, head: Head) -> str:
    """What the library puts before a text, or the first one of a pair, that is given no prompt."""
    if not list_modules(source, head).modules:
        # it then reads no settings
        return ""
    return known_prompts(source).get(str(_library_settings(source).get("default_prompt_name")), "")


def truncate_dim(source: ModelSource) -> Any:
    """What a folder says of how many numbers of an embedding the library gives out, `None` of
    all."""
    return _library_settings(source).get("truncate_dim")


def similarity_name(source: ModelSource) -> str:
    """What a model's embeddings are compared by, in the library's words."""
    found = _library_settings(source).get("similarity_fn_name")
    return found if isinstance(found, str) else "cosine"


def _library_settings(source: ModelSource) -> dict[str, Any]:
    path = source_file(source, LIBRARY)
    return {} if path is None else read_object(path) or {}


def _task(source: ModelSource, first: Module) -> str:
    """What the transformer module asks of the model, in the library's words."""
    default = "fill-mask" if first.kind == "MLMTransformer" else "feature-extraction"
    path = settings_file(source, first)
    if path is None:
        return default
    settings = read_object(path)
    if settings is None:
        return f"what {path.name} can't be read for"
    return str(settings.get("transformer_task", default))
