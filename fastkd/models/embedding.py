"""What a model's own modules make of its final states: read from a sentence-transformers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastkd.errors import UserError, one_line
from fastkd.losses.pooling import (
    Dense,
    EmbeddingModules,
    LayerNorm,
    Normalize,
    PoolingMode,
    Step,
    Truncate,
)
from fastkd.models.checking import LOADING_ERRORS
from fastkd.models.modules import Module
from fastkd.models.sentence_folder import (
    CONFIGS,
    WEIGHTS,
    list_modules,
    module_file,
    read_object,
    truncate_dim,
)
from fastkd.types import Head, ModelSource

POOLING_MODES: dict[str, PoolingMode] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
"""Words of the library's configuration; those of older releases stand in this order."""
_OLD_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_VECTOR = "sentence_embedding"


class UnknownModule(UserError):
    """A module whose vectors fastkd can't make."""


def read_embedding(
    source: ModelSource,
    config: PreTrainedConfig,
    head: Head = "none",
    pooling: PoolingMode | None = None,
) -> EmbeddingModules:
    """What makes embeddings of a model's final states, as `SentenceTransformer.encode` does.

    Args:
        source: where the model lies.
        config: the model's configuration.
        head: what stands on the model; one with a classification head has none of an encoder's
            modules.
        pooling: of a model without such modules; the library's where not given.

    Raises:
        UnknownModule: a module that fastkd doesn't know, or whose files can't be read.
    """
    given = f"model {source.name}"
    modules, reason = list_modules(source, head)
    if reason is not None:
        raise UnknownModule(f"{given}: fastkd can't use its modules {reason}")
    if not modules:
        return EmbeddingModules(config.hidden_size, (pooling or _plain_pooling(config),))
    if len(modules) == 1 or modules[1].kind != "Pooling":
        kind = modules[1].kind if len(modules) > 1 else "nothing"
        raise UnknownModule(
            f"{given}: {kind} stands behind its transformer, expected Pooling; its embeddings "
            "can't be compared"
        )
    try:
        modes = pooling_modes(_settings(source, modules[1]))
        steps = [step for m in modules[2:] if (step := _step(source, m)) is not None]
        size = truncate_dim(source)
        steps += [] if size is None else [_truncation(size)]
        return EmbeddingModules(config.hidden_size, modes, steps)
    except ValueError as error:
        raise UnknownModule(f"{given}: {one_line(error, None)}") from error


def _plain_pooling(config: PreTrainedConfig) -> PoolingMode:
    """How the library pools what a model without modules gives: of a decoder that is saved with its
    head the last token, else the mean."""
    names = getattr(config, "architectures", None) or [""]
    causal = names[0].endswith("ForCausalLM") and getattr(config, "is_causal", True)
    return "last" if causal else "mean"


def pooling_settings(modules: EmbeddingModules) -> dict[str, Any]:
    """The configuration of a Pooling module, in words that all releases of the library read."""
    modes = {word for word, mode in POOLING_MODES.items() if mode in modules.pooling}
    keys = {key: word in modes for key, word in _OLD_KEYS.items()}
    return {"word_embedding_dimension": modules.width, **keys, "include_prompt": True}


def pooling_modes(settings: Mapping[str, Any]) -> list[PoolingMode]:
    """How a Pooling module of such a configuration pools.

    Raises:
        ValueError: in a way that is not known.
    """
    if settings.get("include_prompt") is False:
        raise ValueError("its Pooling leaves prompts out, which fastkd doesn't")
    words = settings.get("pooling_mode")
    if words is None:
        words = [word for key, word in _OLD_KEYS.items() if settings.get(key)] or ["mean"]
    words = [words] if isinstance(words, str) else words
    modes = words if isinstance(words, list | tuple) else []
    if not modes or not all(isinstance(word, str) and word in POOLING_MODES for word in modes):
        raise ValueError(
            f"its Pooling is {words!r:.100}, expected some of {', '.join(POOLING_MODES)}"
        )
    return [POOLING_MODES[word] for word in modes]


def check_on_vectors(kind: str, settings: Mapping[str, Any]) -> None:
    """See that a module of such a configuration changes embeddings, and nothing else.

    Raises:
        ValueError: it doesn't.
    """
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key) not in (None, _VECTOR):
            raise ValueError(f"its {kind} has {key} {settings[key]!r:.100}, expected {_VECTOR}")


def _step(source: ModelSource, module: Module) -> Step | None:
    """One module behind the pooling; `None` of one that does nothing outside of training.

    Raises:
        ValueError: one that is not known, or can't be read.
    """
    inside = module.stays_inside and bool(module.path)
    if not module.is_known or not inside or module.kind not in _READERS:
        raise ValueError(
            f"fastkd doesn't know its module {module.kind}, so its embeddings can't be compared"
        )
    made: Step | None = _READERS[module.kind](source, module)
    return made


def _dense(source: ModelSource, module: Module) -> Step:
    settings = _settings(source, module)
    weights = _weights(source, module)
    check_on_vectors("Dense", settings)
    if settings.get("use_residual"):
        raise ValueError("its Dense adds what it is given (use_residual), which fastkd doesn't")
    weight, bias = weights.get("linear.weight"), weights.get("linear.bias")
    if weight is None or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError("the weights of its Dense are no linear layer's")
    return Dense(weight, bias, _activation(settings.get("activation_function")))


def _activation(name: object) -> nn.Module | None:
    """The activation that a class of torch is; the library's default where none is named."""
    if name is None:
        return nn.Tanh()
    path, _, word = str(name).rpartition(".")
    kind = getattr(nn, word, None)
    if path in ("torch.nn", "torch.nn.modules.linear") and word == "Identity":
        return None
    if path not in ("torch.nn", "torch.nn.modules.activation") or not (
        isinstance(kind, type) and kind.__module__ == "torch.nn.modules.activation"
    ):
        raise ValueError(f"the activation {name!r:.100} of its Dense is none of torch's")
    try:
        made: nn.Module = kind()
    except TypeError as error:
        raise ValueError(f"the activation {name!r:.100} of its Dense needs arguments") from error
    if next(made.parameters(), None) is not None:
        raise ValueError(f"the activation {name!r:.100} of its Dense has weights of its own")
    return made


def _norm(source: ModelSource, module: Module) -> Step:
    weights = _weights(source, module)
    weight, bias = weights.get("norm.weight"), weights.get("norm.bias")
    if weight is None or bias is None or weight.ndim != 1 or bias.shape != weight.shape:
        raise ValueError("the weights of its LayerNorm are no layer norm's")
    return LayerNorm(weight, bias)


def _normalize(source: ModelSource, module: Module) -> Step:
    path = module_file(source, module, CONFIGS)
    check_on_vectors("Normalize", {} if path is None else read_object(path) or {})
    return Normalize()


def _truncation(size: object) -> Step:
    if type(size) is not int or size < 1:
        raise ValueError(f"its truncate_dim is {size!r:.100}, expected a number from 1 on")
    return Truncate(size)


def _nothing(_source: ModelSource, _module: Module) -> None:
    """Dropout is for training the model, which happens elsewhere."""


_READERS: dict[str, Any] = {
    "Dense": _dense,
    "LayerNorm": _norm,
    "Normalize": _normalize,
    "Dropout": _nothing,
}


def _settings(source: ModelSource, module: Module) -> dict[str, Any]:
    inside = module.stays_inside and bool(module.path)
    path = module_file(source, module, CONFIGS) if inside else None
    settings = None if path is None else read_object(path)
    if settings is None:
        raise ValueError(f"the configuration of its {module.kind} is missing or can't be read")
    return settings


def _weights(source: ModelSource, module: Module) -> dict[str, Tensor]:
    path = module_file(source, module, WEIGHTS)
    if path is None:
        raise ValueError(f"the weights of its {module.kind} are missing")
    try:
        return _tensors(path)
    except LOADING_ERRORS as error:
        reason = one_line(error)
        raise ValueError(f"the weights of its {module.kind} can't be read: {reason}") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        found: Any = load_file(path)
    else:
        # a pickle may hold tensors and nothing else
        found = torch.load(path, map_location="cpu", weights_only=True)
    return {
        str(name): tensor.float()
        for name, tensor in dict(found).items()
        if isinstance(tensor, Tensor)
    }
