"""Models and tokenizers as they are found: located, read, checked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto

from fastkd.capture import set_attention
from fastkd.data.known_ids import limit_ids
from fastkd.errors import UserError
from fastkd.head_spec import HEADS
from fastkd.models.checking import (
    LOADING_ERRORS,
    check_settings,
    check_stored,
    is_above,
    not_loadable,
    require_read,
    require_whole,
)
from fastkd.models.locate import resolve_model
from fastkd.models.poolers import drop_pooler
from fastkd.models.vocabulary import read_tokenizer
from fastkd.types import Head, ModelSource


def auto_model(head: Head) -> Any:
    """The class of transformers that loads a model with a head."""
    return getattr(transformers, HEADS[head].auto_model)


def head_of_classes(names: Set[str]) -> Head:
    """The head of a model whose class, or one above it, has one of these names."""
    # a class that is listed as both predicts masked tokens
    for head in reversed(HEADS):
        classes: Mapping[str, str | tuple[str, ...]]
        classes = getattr(modeling_auto, HEADS[head].classes) if HEADS[head].classes else {}
        for found in classes.values():
            if names & ({found} if isinstance(found, str) else set(found)):
                return head
    return "none"


def load_teacher(
    source: ModelSource,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    head: Head = "none",
    field: str = "teacher.model",
) -> PreTrainedModel:
    """The teacher, frozen, in eval mode, on the CPU.

    Args:
        source: where it is loaded from.
        dtype: of its weights.
        attention: implementation that it runs.
        head: what it must have; `none` also takes its pooler off.
        field: of the recipe, which names it.

    Raises:
        UserError: it can't be found, read or run with that attention.
    """
    given = f"{field} {source.name}"
    model, missing = read_model(resolve_model(source), given, dtype, source.revision, head)
    remedy = HEADS[head].untrained_teacher
    if missing and remedy:
        raise UserError(
            f"{given}: its head was never trained, {len(missing)} weights are missing, "
            f"{missing[0]} among them; {remedy}"
        )
    require_whole(given, missing)
    set_attention(model, attention)
    return model.eval().requires_grad_(False)


def load_student(folder: Path, *, head: Head = "none", attention: str = "sdpa") -> PreTrainedModel:
    """A student that a run exported, in fp32 on the CPU, in eval mode.

    Args:
        folder: that it was exported to.
        head: what it must have; `none` also takes its pooler off.
        attention: implementation that it runs.

    Raises:
        UserError: the folder holds no model, or none that runs with that attention.
    """
    given = f"student {folder}"
    model, missing = read_model(str(folder), given, torch.float32, None, head)
    require_whole(given, missing)
    set_attention(model, attention)
    return model.eval()


def load_tokenizer(source: ModelSource, vocabulary: int) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, which is also the student's.

    Args:
        source: where the teacher is loaded from.
        vocabulary: rows of the teacher's embedding.

    Raises:
        UserError: there is none, or it needs ids that the embedding doesn't have, see `limit_ids`.
    """
    tokenizer = read_tokenizer(source)
    if tokenizer is None:
        raise UserError(
            f"{source.name}: holds no tokenizer; put the one there that the model was trained with"
        )
    limit_ids(tokenizer, vocabulary, source.name)
    return tokenizer


def read_config(
    name: str, given: str, revision: str | None = None, **changes: Any
) -> PreTrainedConfig:
    """The configuration of a folder or hub model, with `changes`; not the attention that it asks
    for, as a recipe decides that.

    Args:
        name: folder or hub name.
        given: what the user calls it.
        revision: on the hub.
        changes: in the configuration's own names.

    Raises:
        UserError: it can't be read, or the weights beside it are not those of a whole float model.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=False, **changes
        )
    except LOADING_ERRORS as error:
        raise UserError(not_loadable(given, error)) from error
    check_stored(name, given, revision, config)
    # it may be the name of a kernel, which transformers fetches from the hub
    config._attn_implementation = None
    return config


def read_model(
    name: str,
    given: str,
    dtype: torch.dtype,
    revision: str | None,
    head: Head,
    config: PreTrainedConfig | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """A model on the CPU, and which weights of its head and pooler were drawn, not found; with the
    attention that transformers chooses where nobody asks, for `set_attention` to change.

    Args:
        name: folder or hub name.
        given: what the user calls it.
        dtype: of its weights.
        revision: on the hub.
        head: what it must have; `none` also takes its pooler off.
        config: in place of its own; a head of another shape is then drawn.

    Raises:
        UserError: it can't be read, or weights below the head are missing or read by nothing.
    """
    model: PreTrainedModel
    own = read_config(name, given, revision)
    try:
        with warnings.catch_warnings():
            # torch tells a stranger's pickle by several lines before it refuses it
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            model, report = auto_model(head).from_pretrained(
                name,
                revision=revision,
                dtype=dtype,
                trust_remote_code=False,
                # a pickle may hold tensors and nothing else
                weights_only=True,
                output_loading_info=True,
                config=own if config is None else config,
                ignore_mismatched_sizes=config is not None,
            )
    except LOADING_ERRORS as error:
        raise UserError(not_loadable(given, error)) from error
    check_settings(given, own, model)
    _say_what_is_tied(model)
    require_read(given, model, report["unexpected_keys"])
    # transformers draws what it doesn't find, and goes on
    drawn = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    if head == "none":
        drop_pooler(model, trained=not any("pooler." in name for name in drawn))
    missing = sorted(drawn & {name for name, _ in model.named_parameters()})
    require_whole(given, [name for name in missing if not is_above(model, name)])
    return model, missing


def _say_what_is_tied(model: PreTrainedModel) -> None:
    """Have a configuration say what is not tied: transformers keeps an output layer that a
    checkpoint holds beside the embeddings, and what is made from the configuration would lose it.
    """
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    found = model.get_parameter_or_buffer
    if any(found(target) is not found(source) for target, source in pairs):
        model.config.tie_word_embeddings = False
