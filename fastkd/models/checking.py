"""Whether what transformers loaded is what the folder holds: nothing missing, nothing left unread.

transformers draws weights that it doesn't find and drops weights that its class doesn't have, and
goes on. Heads and poolers may come and go with the class that is asked for; whatever stands below
them must agree to the last weight.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from fastkd.errors import FOREIGN_ERRORS, UserError, one_line

LOADING_ERRORS = (
    *FOREIGN_ERRORS,
    OSError,
    StrictDataclassError,
    # damaged files
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)
"""What transformers raises where a folder is not what it expects; for its own calls only."""

# what checkpoints of older releases hold beside their weights
_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|(original_)?inv_freq|masked_bias|(attn|attention)\.bias|"
    r"relative_position_index|(cos|sin)_cached|causal_mask|embed_positions|num_batches_tracked)$"
)
_POOLER = re.compile(r"(^|\.)pooler\.")
_HEADS = re.compile(
    r"^(cls|(lm|mlm|qa|nsp|so|sop)_?head|head|classifier|score|decoder|linear|dense|predictions|"
    r"\w+_predictions|\w+_projector|\w*logits\w*|\w*outputs)\."
)
# of the file that says how a model's weights are stored
_QUANTISED = ("quantization_config", "compression_config")


def not_loadable(given: str, error: Exception) -> str:
    """What to say of a model or tokenizer that transformers can't load."""
    reason = one_line(error, None)
    if "trust_remote_code" in reason:
        return (
            f"{given}: needs code of its own, which fastkd doesn't run (trust_remote_code); give a "
            "model that transformers itself has the code of"
        )
    if "Weights only load failed" in reason:
        return (
            f"{given}: its weights are a pickle of more than tensors, or a damaged one, which "
            "fastkd doesn't run; give the model in safetensors"
        )
    reason = reason[:200] or type(error).__name__
    if isinstance(error, ImportError):
        return f"{given}: not loadable ({reason}); install the package that is missing"
    return (
        f"{given}: not loadable ({reason}); give a folder that holds a transformers model, "
        "or a hub name and a connection"
    )


def check_stored(name: str, given: str, revision: str | None, config: PreTrainedConfig) -> None:
    """See that a folder holds float weights and a whole model, before its weights are read.

    Raises:
        UserError: quantised weights, or an adapter for another model.
    """
    classes = config.architectures or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(
            f"{given}: architectures of its config.json is {classes!r:.100}, expected a list of "
            "names; give a folder that transformers has saved"
        )
    for field in _QUANTISED:
        settings = getattr(config, field, None)
        if settings is not None:
            raise UserError(
                f"{given}: its weights are quantised ({_method(settings)}), but fastkd compares "
                "and copies float weights; give the model that it was quantised from"
            )
    if optional_file(name, "adapter_config.json", revision) is not None:
        raise UserError(
            f"{given}: holds an adapter (adapter_config.json), which fastkd doesn't apply; merge "
            "it into its model first, with merge_and_unload of peft, and give the merged model"
        )


def check_settings(given: str, config: PreTrainedConfig, model: PreTrainedModel) -> None:
    """See that the class of a model reads the settings that make it another model.

    Raises:
        UserError: positions that this release of transformers no longer has.
    """
    positions = getattr(config, "position_embedding_type", None)
    if positions in (None, "absolute"):
        return
    source = Path(str(sys.modules[type(model).__module__].__file__)).read_text(encoding="utf-8")
    if "position_embedding_type" not in source:
        raise UserError(
            f"{given}: its configuration has position_embedding_type {positions!r}, but "
            f"{_class(model)} has absolute positions alone; give a model that it has the code of"
        )


def unread_weights(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Weights below its head that a checkpoint holds and a model has no place for.

    Heads and poolers of another class are left out, and so are buffers of older releases.
    """
    base = model.base_model
    parts = {name for name, _ in base.named_children()} | {n for n, _ in base.named_parameters()}
    # the very class that the checkpoint was saved from has a place for all but heads
    same = base is model and type(model).__name__ in (model.config.architectures or ())

    def is_below(weight: str) -> bool:
        if _BUFFERS.search(weight) or _POOLER.search(weight):
            return False
        if weight.startswith(model.base_model_prefix + ".") or weight.split(".")[0] in parts:
            return True
        return same and not _HEADS.search(weight)

    return sorted(filter(is_below, unexpected))


def require_read(given: str, model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """See that no weight below the head was dropped.

    Raises:
        UserError: naming the first one.
    """
    unread = unread_weights(model, unexpected)
    if unread:
        raise UserError(
            f"{given}: {len(unread)} weights are read by nothing, {unread[0]} among them; "
            f"{_class(model)} is another model without them, so give one that it reads whole"
        )


def is_above(model: PreTrainedModel, weight: str) -> bool:
    """Whether a weight of a model belongs to the head or the pooler."""
    below = weight.startswith(model.base_model_prefix + ".") or model.base_model is model
    return not below or "pooler." in weight


def require_whole(given: str, missing: Sequence[str]) -> None:
    """See that no weight was drawn.

    Raises:
        UserError: naming the first one.
    """
    if missing:
        raise UserError(
            f"{given}: {len(missing)} weights are missing, {missing[0]} among them; "
            "give a folder that holds the whole model"
        )


def optional_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a folder or hub model, `None` where there is none or no connection."""
    try:
        found = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    # what is neither a folder nor could be a name on the hub
    except OSError:
        return None
    return None if found is None else Path(found)


def _method(settings: Any) -> str:
    known = settings if isinstance(settings, dict) else vars(settings)
    method = known.get("quant_method") or known.get("format") or "quantization_config"
    return str(getattr(method, "value", method))


def _class(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} of transformers {transformers.__version__}"
