"""Settings of a configuration that say something of each layer, cut to those a student starts from.

A student of layers 2 and 4 is to have what layers 2 and 4 of its teacher have: their kind of
attention, their rotary embeddings, their experts. Configurations say it in lists with an entry a
layer, in lists of layer numbers, in a number of first layers, and in rules that count positions.
The first three are carried over; whether that was all is seen on blocks without weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fastkd.capture import find_blocks
from fastkd.capture.routing import PREFIX
from fastkd.errors import UserError, one_line

# numbers of layers, from 0
_INDICES = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "fullatt_block_indexes",
    "global_attn_indexes",
    "mlp_only_layers",
    "moe_layers",
)
# how many first layers are of another kind, and how many last ones
_FIRST = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
_LAST = ("num_kv_shared_layers",)
# the last layer, from 0, that is of another kind
_UNTIL = ("moe_layer_end_index",)
# lists that may happen to be as long as a model is deep
_NO_LAYERS = re.compile(
    r"_token_ids?$|_tokens$|^architectures$|^lang(s|uages)$|^(image|patch|tubelet)_size$|"
    r"_(shape|limit|kernel_size|mean|std)$|(mlp|ssm)_multipliers$|^_"
)
# what tells blocks apart that are the same outside of training
_NUMBERS = frozenset({"layer_id", "layer_idx", "layer_index", "layer_number", "drop_prob"})
_PLAIN = (bool, int, float, str, type(None))


def cut_layers(config: PreTrainedConfig, sources: Sequence[int]) -> dict[str, Any]:
    """The settings of each layer of a configuration, for a model that is made of some layers.

    Args:
        config: the teacher's.
        sources: its layers, from 1, in the order in which they become the student's.

    Returns:
        New values by name; `num_hidden_layers` is not among them.
    """
    depth = config.num_hidden_layers
    chosen = [source - 1 for source in sources]
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name in _INDICES and isinstance(value, list | tuple):
            found[name] = [new for new, old in enumerate(chosen) if old in value]
        elif name in _FIRST and isinstance(value, int):
            found[name] = sum(old < value for old in chosen)
        elif name in _LAST and isinstance(value, int):
            found[name] = sum(old >= depth - value for old in chosen)
        elif name in _UNTIL and isinstance(value, int) and value >= 0:
            found[name] = sum(old <= value for old in chosen) - 1
        elif _NO_LAYERS.search(name):
            continue
        elif isinstance(value, list | tuple) and len(value) == depth:
            found[name] = [value[old] for old in chosen]
    # backbones count their blocks in names, the stem first, and hand on some of them
    stages = getattr(config, "stage_names", None)
    if stages is not None and len(stages) == depth + 1:
        kept = stages[: len(chosen) + 1]
        found |= {"stage_names": kept, "_out_features": kept[-1:], "_out_indices": [len(chosen)]}
    return found


def check_same_blocks(
    teacher: PreTrainedModel, settings: dict[str, Any], sources: Sequence[int]
) -> list[str]:
    """See that cut settings make the teacher's own blocks, also when they are read from a file.

    Args:
        teacher: the model.
        settings: from `cut_layers`.
        sources: what they were cut to.

    Returns:
        What a student does without, in words, because its place has none: ModernBERT's first block
        has no first normalisation.

    Raises:
        UserError: naming the first difference.
    """
    twin = _twin(teacher, {**settings, "num_hidden_layers": len(sources)})
    blocks = find_blocks(teacher)
    missing = []
    for number, (block, source) in enumerate(zip(find_blocks(twin), sources, strict=True), start=1):
        here, there = dict(_described(block)), dict(_described(blocks[source - 1]))
        for name, value in there.items():
            path, _, what = name.rpartition(".")
            if what == "class" and value != "Identity" and here.get(name) == "Identity":
                missing.append(f"layer {number} has no {path}, which teacher layer {source} has")
                there = {k: v for k, v in there.items() if not k.startswith(path + ".")}
                here = {k: v for k, v in here.items() if not k.startswith(path + ".")}
        _compare(teacher, f"student layer {number}", f"teacher layer {source}", here, there)
    # what is tied has one name of several
    shared = _beside(twin, find_blocks(twin)), _beside(teacher, blocks)
    names = shared[0].keys() & shared[1].keys()
    here, there = ({name: found[name] for name in sorted(names)} for found in shared)
    _compare(teacher, "the student", "the teacher", here, there)
    return missing


def _twin(teacher: PreTrainedModel, settings: dict[str, Any]) -> PreTrainedModel:
    """A model with other settings and no weights, as it would be read from a file."""
    config = copy.deepcopy(teacher.config)
    try:
        for name, value in settings.items():
            setattr(config, name, value)
        config = type(config).from_dict(config.to_dict())
        running = teacher.config._attn_implementation.removeprefix(PREFIX)
        with no_init_weights(), torch.device("meta"):
            model: PreTrainedModel = type(teacher)._from_config(config, attn_implementation=running)
    except (StrictDataclassError, ValueError) as error:
        raise UserError(
            f"{type(teacher).__name__} can't be cut to {settings['num_hidden_layers']} layers "
            f"({one_line(error)}); give another layer_map, or student.init=random"
        ) from error
    return model


def _compare(
    teacher: PreTrainedModel,
    own: str,
    source: str,
    here: dict[str, Any],
    there: dict[str, Any],
) -> None:
    for name in {**there, **here}:
        if here.get(name) != there.get(name):
            raise UserError(
                f"{own} would start from {source}, whose {name} is {there.get(name)}, with "
                f"{here.get(name)}: {type(teacher).__name__} sets it by a layer's position or by "
                "the number of layers; give a layer_map that keeps such layers in their places, or "
                "student.init=random"
            )


def _beside(model: PreTrainedModel, blocks: nn.ModuleList) -> dict[str, Any]:
    """Shapes of the weights that are not in a block."""
    inside = {id(parameter) for parameter in blocks.parameters()}
    return {
        f"{name}.shape": tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if id(parameter) not in inside and "pooler." not in name
    }


def _described(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything that makes a block what it is, but its weights and its number."""
    for path, module in block.named_modules():
        prefix = f"{path}." if path else ""
        yield f"{prefix}class", type(module).__name__
        for name, value in vars(module).items():
            hidden = name.startswith("_") or name in _NUMBERS or name == "training"
            if not hidden and isinstance(value, _PLAIN):
                yield prefix + name, value
    for path, parameter in block.named_parameters():
        yield f"{path}.shape", tuple(parameter.shape)
