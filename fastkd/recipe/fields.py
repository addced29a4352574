"""Every field of a file that is read into sections: its dotted key, what it takes, what it does.

The sections themselves are the only description there is: `fastkd fields` prints what this walks
through, and a complaint about an unknown key looks here for where a recipe has it.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from fastkd.layer_map.sections import MAP_SECTIONS
from fastkd.recipe.losses import Losses
from fastkd.recipe.weights import LossConfig
from fastkd.section import LARGEST

WORDS = {
    "alpha": "losses.logits.weight",
    "bf16": "train.precision",
    "dataset": "data.train",
    "eval_steps": "train.evaluate_every",
    "fp16": "train.precision",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "grad_clip": "train.max_grad_norm",
    "logging_steps": "train.log_every",
    "lr": "train.learning_rate",
    "lr_scheduler_type": "train.schedule",
    "max_seq_length": "data.block_size",
    "max_steps": "train.steps",
    "num_epochs": "train.epochs",
    "num_hidden_layers": "student.layers",
    "num_train_epochs": "train.epochs",
    "optim": "train.optimizer",
    "output_dir": "run.output",
    "per_device_train_batch_size": "train.batch_size",
    "report_to": "run.monitor",
    "save_steps": "train.checkpoint_every",
    "student_model": "student.init",
    "teacher_model": "teacher.model",
    "temperature": "losses.logits.temperature",
    "train_file": "data.train",
    "warmup_ratio": "train.warmup_share",
}
"""What other trainers call a field, and its key here."""
_OPENED = frozenset({"layer_map", "temperature_schedule"})
# of more, a list is no help
_MOST_PLACES = 3
_KINDS = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "object": "a section",
    "string": "text",
}
_BOUNDS = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "at most"),
    ("exclusiveMaximum", "below"),
)


class Entry(NamedTuple):
    """One field."""

    key: str
    """Dotted, with `*` for a name or a number that the file gives."""
    takes: str
    """What its value may be, in words."""
    default: str | None
    """As a file would have it; `None` where it has to be given."""
    says: str
    """Its docstring, in one line."""


def fields_of(root: type[BaseModel], within: str = "") -> Iterator[Entry]:
    """The fields of a section and of all sections inside it, in their order.

    Args:
        root: a whole recipe or study, or a part of one.
        within: key of the section, put before those of its fields.
    """
    for name, field in root.model_fields.items():
        if root is Losses and name == "terms":
            yield from _losses(within)
            continue
        key = f"{within}.{name}" if within else name
        yield Entry(key, _takes(field), _default(field), _line(field.description))
        if name == "layer_map":
            for mapping in MAP_SECTIONS.values():
                yield from _of_map(mapping, key)
            continue
        for below, section in dict(_sections(field.annotation)).items():
            yield from fields_of(section, key + below)


def place_of(key: str, root: type[BaseModel]) -> str:
    """Where a file has what it says under an unknown key, for a complaint; empty if nowhere."""
    keys = dict.fromkeys(entry.key for entry in fields_of(root))
    word = WORDS.get(key)
    if word in keys or (word and _of_every_loss(word) in keys):
        return f"it is called {word} here; "
    found = [place for place in keys if place.endswith(f".{key}") and "*" not in place]
    return f"it is {' or '.join(found)}; " if 0 < len(found) <= _MOST_PLACES else ""


def _of_every_loss(key: str) -> str:
    section, _, rest = key.partition(".")
    return f"{section}.*.{rest.partition('.')[2]}"


def _losses(within: str) -> Iterator[Entry]:
    """The fields that all losses have, said once, then those of each."""
    from fastkd.losses.registry import loss_class, loss_names

    yield from fields_of(LossConfig, f"{within}.*")
    for name in loss_names():
        loss = loss_class(name)
        # its first paragraph: formulas and remarks take more than a line
        about = _line(inspect.cleandoc(loss.__doc__ or "").partition("\n\n")[0])
        yield Entry(f"{within}.{name}", "a section or null", "null", about)
        for entry in fields_of(loss.Config, f"{within}.{name}"):
            _, _, own, *below = entry.key.split(".")
            # sections that stand in many places are opened where they stand first
            if own not in LossConfig.model_fields and not (below and own in _OPENED):
                yield entry


def _of_map(section: type[BaseModel], key: str) -> Iterator[Entry]:
    kind = section.model_fields["kind"].default
    for entry in fields_of(section, key):
        if entry.key != f"{key}.kind":
            yield entry._replace(says=f"Of {kind}: {entry.says[:1].lower()}{entry.says[1:]}")


def _sections(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """Sections that a field may hold, by what stands between its key and theirs."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _sections(get_args(annotation)[0])
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "", annotation
    elif origin in (dict, tuple):
        for below, section in _sections(get_args(annotation)[origin is dict]):
            yield f".*{below}", section
    else:
        for argument in get_args(annotation):
            yield from _sections(argument)


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _takes(field: FieldInfo) -> str:
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    try:
        return _kind(kind)
    except TypeError:
        # of a plugin, with what has no hash
        return _kind.__wrapped__(kind)


@functools.cache
def _kind(kind: Any) -> str:
    schema = TypeAdapter(kind).json_schema()
    return " or ".join(dict.fromkeys(_words(schema, schema.get("$defs", {}))))


def _words(schema: Mapping[str, Any], defined: Mapping[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        yield from _words(defined[schema["$ref"].rpartition("/")[2]], defined)
    elif "anyOf" in schema:
        for one in schema["anyOf"]:
            yield from _words(one, defined)
    elif "enum" in schema or "const" in schema:
        yield ", ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    else:
        given = [(word, schema[name]) for name, word in _BOUNDS if name in schema]
        limits = [
            f"{word} {bound:,}".removesuffix(".0") for word, bound in given if bound < LARGEST
        ]
        yield ", ".join([_KINDS.get(schema.get("type", ""), "any value"), *limits])


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        # its fields have their own
        return ""
    return (
        value
        if isinstance(value, str) and value
        else json.dumps(TypeAdapter(Any).dump_python(value, mode="json"))
    )
