"""The student: the teacher's architecture with a recipe's numbers, and what it starts from.

Every model that transformers can build from a configuration can be shrunk without code of its own.
A model to start from may be another one than the teacher: then it is taken as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastkd.capture import find_blocks, set_attention
from fastkd.capture.blocks import blocks_path
from fastkd.errors import FOREIGN_ERRORS, UserError, one_line
from fastkd.head_spec import HEADS
from fastkd.layer_map import LayerMap
from fastkd.models.attention_heads import (
    head_size,
    keep_head_size,
    set_head_size,
    set_kv_heads,
    weights_of_heads,
)
from fastkd.models.feed_forward import check_feed_forward, feed_forward_name, set_feed_forward
from fastkd.models.load import (
    auto_model,
    read_config,
    read_model,
)
from fastkd.models.locate import resolve_model
from fastkd.models.per_layer import check_same_blocks, cut_layers
from fastkd.models.poolers import POOLER_MARK, drop_pooler, lend_pooler
from fastkd.recipe import Student
from fastkd.types import Head, ModelSource

_DROPOUT = re.compile(r"dropout|_pdrop$|drop_path")
# where sentence-transformers keeps the activation of a cross-encoder, now and before its 4.0
_CROSS_ENCODER = ("sentence_transformers", "sbert_ce_default_activation_function")
# what a model computes with its weights, by the names of transformers
_BEHAVIOUR = re.compile(
    r"act(ivation)?(_function)?$|eps(ilon)?$|rope|rotary|sliding|window|layer_types|local_|global_|"
    r"_bias$|scal|softcap|norm|^is_decoder$|^position_embedding_type$|^head_dim$|multiplier$|"
    r"experts_per_tok$|^(n|topk)_group$|^attention_chunk"
)


@dataclass(frozen=True)
class Initialisation:
    """How many of the student's parameters were not drawn."""

    copied: int
    total: int
    new_head: bool = False
    """Whether a model to fine-tune came without a head for its task."""
    missing: tuple[str, ...] = ()
    """What student layers do without that their teacher layers have, in words."""
    drawn: tuple[str, ...] = ()
    """What of the teacher's would fit by its shape alone, in words."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Dropout rates that a student is handed on with."""


class OwnModel(NamedTuple):
    """A student that is another model than its teacher, taken as it is."""

    config: PreTrainedConfig
    """With the recipe's dropout, and labels and activation of a head that are the teacher's."""
    rates: dict[str, float]
    """Its dropout rates, as it came."""


def student_config(
    teacher: PreTrainedConfig, student: Student, layers: LayerMap
) -> PreTrainedConfig:
    """The teacher's configuration with the student's numbers.

    Raises:
        UserError: numbers that don't divide, or a setting that this architecture doesn't have.
    """
    config = copy.deepcopy(teacher)
    vars(config).pop(POOLER_MARK, None)
    for needed in ("hidden_size", "num_attention_heads"):
        if not isinstance(getattr(teacher, needed, None), int):
            raise UserError(
                f"{type(teacher).__name__} has no {needed}, so no student can be made from it; "
                "give a transformer with attention"
            )
    config.num_hidden_layers = student.layers
    config.hidden_size = student.hidden_size or teacher.hidden_size
    config.num_attention_heads = student.heads or teacher.num_attention_heads
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"student.hidden_size {config.hidden_size} is not a multiple of its "
            f"{config.num_attention_heads} heads; change student.hidden_size or student.heads"
        )
    if student.init != "importance" or getattr(teacher, "head_dim", None) is None:
        set_head_size(config, teacher)
    set_kv_heads(config, teacher, student)
    for name, value in cut_layers(teacher, layers.sources()).items():
        setattr(config, name, value)
    if student.intermediate_size is not None:
        set_feed_forward(config, student.intermediate_size)
    _set_dropout(config, student)
    return _read_again(config)


def _read_again(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration as it will be read where the student is loaded.

    Raises:
        UserError: it won't be.
    """
    try:
        again: PreTrainedConfig = type(config).from_dict(config.to_dict())
    except (StrictDataclassError, *FOREIGN_ERRORS) as error:
        raise UserError(_unmade(config, error)) from error
    return again


def _unmade(config: PreTrainedConfig, error: Exception) -> str:
    return (
        f"no {type(config).__name__} can have the student's numbers and layers "
        f"({one_line(error)}); give the student section others, or another layer_map"
    )


def _set_dropout(config: PreTrainedConfig, student: Student) -> None:
    """Give a configuration the section's dropout, where it has any, and see that it can be had."""
    if student.dropout is not None:
        for name in dropout_rates(config):
            setattr(config, name, student.dropout)
    check_attention("student", student.attention, dropout_rates(config))


def check_attention(given: str, attention: str, rates: Mapping[str, float]) -> None:
    """See that an attention implementation drops out as it is asked to.

    Raises:
        UserError: flex attention has no dropout.
    """
    name = next((name for name, rate in rates.items() if rate > 0), None)
    if attention == "flex_attention" and name is not None:
        raise UserError(
            f"{given}.attention is flex_attention, which has no dropout, but {name} is "
            f"{rates[name]:g}; set {given}.dropout=0, or take sdpa"
        )


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
    wherever shapes agree; the rest is drawn as the architecture draws it, and so is attention whose
    heads have another width. So is everything of
    `init: importance`, until the teacher has read some text: see `fastkd.models.importance`. With
    the name of a model all of that model's weights are taken; a head or pooler that it lacks is
    copied from the teacher where shapes agree, else drawn, or drawn in any case where the model is
    another one, see `own_model`.

    Raises:
        UserError: numbers that don't fit, or a model to start from of another shape.
    """
    missing: list[str] = []
    drawn: list[str] = []
    own, rates = own_model(student, teacher.config), dropout_rates(teacher.config)
    if own is not None:
        model, copied = _as_it_is(own.config, student)
        rates = own.rates
        lend_pooler(model, None)
    else:
        config, missing = _config_of(teacher, student, layers)
        if student.starts_from is None:
            model, copied = _drawn_model(config, student.head), 0
            if student.init == "teacher":
                copied, drawn = _copy_from_teacher(model, teacher, layers)
        else:
            model, copied = _continued(student.starts_from, config, student, teacher)
        lend_pooler(model, teacher)
    if own is None and student.starts_from is None and teacher.can_generate():
        # which tokens end a text, and how the next one is chosen
        model.generation_config = copy.deepcopy(teacher.generation_config)
    _prepare(model, teacher, student, student.attention)
    total = sum(p.numel() for p in model.parameters())
    said = Initialisation(copied, total, missing=tuple(missing), drawn=tuple(drawn), rates=rates)
    return model, said


def outline_student(
    teacher: PreTrainedModel, student: Student, layers: LayerMap, attention: str
) -> PreTrainedModel:
    """A student as `build_student` makes it, but for its numbers, which are drawn: of a model to
    start from the configuration alone is read.

    Args:
        teacher: the model, likewise.
        student: section of the recipe.
        layers: the map.
        attention: what it runs in place of the section's, which may not be installed here.

    Raises:
        UserError: as `build_student`, of what configurations say.
    """
    own = own_model(student, teacher.config)
    config = _config_of(teacher, student, layers)[0] if own is None else own.config
    model = _drawn_model(config, student.head)
    _prepare(model, teacher, student, attention)
    return model


def _config_of(
    teacher: PreTrainedModel, student: Student, layers: LayerMap
) -> tuple[PreTrainedConfig, list[str]]:
    """Configuration of a student that has its teacher's architecture, and what it does without, see
    `check_same_blocks`."""
    missing: list[str] = []
    config = student_config(teacher.config, student, layers)
    if student.init in ("teacher", "importance"):
        sources = layers.sources()
        missing = check_same_blocks(teacher, cut_layers(teacher.config, sources), sources)
    if student.starts_from is None:
        check_feed_forward(config, teacher.config)
    else:
        _take_settings(config, student.starts_from, teacher.config)
    return config, missing


def _prepare(
    model: PreTrainedModel, teacher: PreTrainedModel, student: Student, attention: str
) -> None:
    """Let a student train as its section says."""
    set_attention(model, attention)
    if student.freeze_word_embeddings:
        _freeze_word_embeddings(model, teacher, student)
    if student.gradient_checkpointing:
        recompute_blocks(model)


def recompute_blocks(model: PreTrainedModel) -> None:
    """Let the blocks of a model be computed again in its backward pass.

    Raises:
        UserError: its class can't.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"gradient_checkpointing is true, but {type(model).__name__} of transformers can't "
            "compute its blocks again; set it to false"
        )
    # a newer name, for which transformers 6 drops the one that the oldest have
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _freeze_word_embeddings(
    model: PreTrainedModel, teacher: PreTrainedModel, student: Student
) -> None:
    """Let a student's vocabulary stay as it is.

    Raises:
        UserError: it was drawn, as the teacher's has another width.
    """
    table, theirs = (one.get_input_embeddings().weight for one in (model, teacher))
    if student.init == "teacher" and table.shape != theirs.shape:
        raise UserError(
            f"student.freeze_word_embeddings is on, but the teacher's have {theirs.shape[1]} "
            f"numbers each and the student's {table.shape[1]}, which are drawn and have to be "
            "trained; leave it out, or set student.init to importance"
        )
    table.requires_grad_(False)


def own_model(student: Student, teacher: PreTrainedConfig) -> OwnModel | None:
    """A model to start from that is of another architecture or vocabulary, or of which the recipe
    doesn't say how many layers it has.

    Args:
        student: section of the recipe.
        teacher: configuration of the teacher.

    Returns:
        `None` of a student that has its teacher's architecture and the section's numbers.

    Raises:
        UserError: a number that the section gives is not the model's.
    """
    source = student.starts_from
    if source is None:
        return None
    given = f"student.init {source.name}"
    config = read_config(resolve_model(source), given, source.revision)
    if not stands_apart(config, student, teacher):
        return None
    for key, name in _numbers_of(config).items():
        there, here = getattr(config, name, None), getattr(student, key)
        if here is not None and here != there:
            raise UserError(
                f"{given} has {name} {there}, but student.{key} is {here}; leave student.{key} "
                "out, or start from another model"
            )
    vars(config).pop(POOLER_MARK, None)
    if HEADS[student.head].data == "task":
        config.id2label, config.label2id = dict(teacher.id2label), dict(teacher.label2id)
        # what a CrossEncoder makes of a score is the teacher's as well
        for name in _CROSS_ENCODER:
            vars(config).pop(name, None)
            if hasattr(teacher, name):
                setattr(config, name, copy.deepcopy(getattr(teacher, name)))
    rates = dropout_rates(config)
    _set_dropout(config, student)
    return OwnModel(config, rates)


def stands_apart(config: PreTrainedConfig, student: Student, teacher: PreTrainedConfig) -> bool:
    """Whether a model to start from is another one than the teacher, and taken as it is.

    Args:
        config: its configuration.
        student: section of the recipe.
        teacher: configuration of the teacher.
    """
    same = all(
        getattr(config, name, None) == getattr(teacher, name, None)
        for name in ("model_type", "vocab_size")
    )
    return not same or student.layers is None


def student_layers(student: Student, teacher: PreTrainedConfig) -> int:
    """How many blocks a student will have.

    Raises:
        UserError: as `own_model`.
    """
    own = own_model(student, teacher)
    depth = student.layers if own is None else own.config.num_hidden_layers
    assert depth is not None, "a recipe says how many, but of a model to start from"
    return depth


def _drawn_model(config: PreTrainedConfig, head: Head) -> PreTrainedModel:
    """A model in fp32 whose weights are drawn; without a head its pooler is set aside.

    Raises:
        UserError: the architecture can't be built with these numbers.
    """
    try:
        model: PreTrainedModel = auto_model(head).from_config(config, dtype=torch.float32)
    except FOREIGN_ERRORS as error:
        raise UserError(_unmade(config, error)) from error
    if head == "none":
        drop_pooler(model)
    return model


def _as_it_is(config: PreTrainedConfig, student: Student) -> tuple[PreTrainedModel, int]:
    """A student that is another model, and how many numbers were not drawn."""
    source = student.starts_from
    assert source is not None, "it has a configuration of its own"
    given = f"student.init {source.name}"
    where = resolve_model(source)
    model, drawn = read_model(where, given, torch.float32, source.revision, student.head, config)
    fresh = sum(p.numel() for name, p in model.named_parameters() if name in drawn)
    return model, sum(p.numel() for p in model.parameters()) - fresh


def _take_settings(
    config: PreTrainedConfig, source: ModelSource, teacher: PreTrainedConfig
) -> None:
    """Give a student's configuration what is another model's own, whose weights it starts from."""
    given = f"student.init {source.name}"
    own = read_config(resolve_model(source), given)
    _check_same_shape(own, config, given)
    size = getattr(own, "head_dim", None)
    if size is not None and size == getattr(teacher, "head_dim", None):
        keep_head_size(config, teacher)
    # its blocks are what they are, whatever teacher layers they learn from
    for setting in cut_layers(config, range(1, config.num_hidden_layers + 1)):
        if hasattr(own, setting):
            setattr(config, setting, getattr(own, setting))
    _check_same_behaviour(own, config, given)
    # whose output layer stays as it is as well
    if hasattr(own, "tie_word_embeddings"):
        config.tie_word_embeddings = own.tie_word_embeddings


def _continued(
    source: ModelSource, config: PreTrainedConfig, student: Student, teacher: PreTrainedModel
) -> tuple[PreTrainedModel, int]:
    """A student that starts from another model's weights, and how many numbers were not drawn."""
    name, given = resolve_model(source), f"student.init {source.name}"
    model, drawn = read_model(name, given, torch.float32, None, student.head, config)
    if hasattr(read_config(name, given), POOLER_MARK):
        # written for others to load, but trained by nobody
        drawn += [name for name, _ in model.named_parameters() if "pooler." in name]
    fresh, found = 0, dict(teacher.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for weight, parameter in model.named_parameters():
            if weight not in drawn:
                continue
            if weight in found and found[weight].shape == parameter.shape:
                parameter.copy_(found[weight])
            else:
                fresh += parameter.numel()
    return model, sum(p.numel() for p in model.parameters()) - fresh


def _check_same_shape(own: PreTrainedConfig, wanted: PreTrainedConfig, given: str) -> None:
    """See that a model to start from is what the student's section describes."""
    for key, name in _numbers_of(wanted).items():
        there, here = getattr(own, name, None), getattr(wanted, name, None)
        if there != here:
            raise UserError(
                f"{given} has {name} {there}, but the student is to have {here}; set "
                f"student.{key}={there}, or start from another model"
            )


def _numbers_of(config: PreTrainedConfig) -> dict[str, str]:
    """What a configuration calls the numbers of the student's section."""
    return {
        "layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "intermediate_size": feed_forward_name(config) or "",
    }


def _check_same_behaviour(own: PreTrainedConfig, wanted: PreTrainedConfig, given: str) -> None:
    """See that the weights would be used as they were trained: under the teacher's settings."""
    there, here = own.to_dict(), wanted.to_dict()
    for name in sorted(there.keys() & here.keys()):
        if _BEHAVIOUR.search(name) and not _DROPOUT.search(name) and there[name] != here[name]:
            raise UserError(
                f"{given} has {name} {there[name]!r}, but the student is to have {here[name]!r}, "
                "as the teacher has; start from a model that agrees in that"
            )


def _copy_from_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: LayerMap
) -> tuple[int, list[str]]:
    """Copy what fits; how many numbers that was, and what was drawn although its shape fits, in
    words."""
    student_blocks, teacher_blocks = find_blocks(student), find_blocks(teacher)
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (student_blocks[index], teacher_blocks[source - 1])
        for index, source in enumerate(layers.sources())
    ]
    here, there = head_size(student.config), head_size(teacher.config)
    held = [set(weights_of_heads(target)) if here != there else set() for target, _ in pairs]
    copied = sum(_copy_matching(*pair, names) for pair, names in zip(pairs, held, strict=True))
    prefix = blocks_path(student) + "."
    inside = {name for name, _ in student.named_parameters() if name.startswith(prefix)}
    inside |= {name for name, _ in student.named_buffers() if name.startswith(prefix)}
    copied += _copy_matching(student, teacher, inside)
    fits = any(_matching(*pair, names) for pair, names in zip(pairs, held, strict=True))
    said = f"its heads are {here} wide and the teacher's {there}, so its attention is drawn"
    return copied, [said] if fits else []


def _matching(target: nn.Module, source: nn.Module, names: Set[str]) -> bool:
    """Whether a parameter of these names has the same shape in both."""
    own, found = dict(target.named_parameters()), dict(source.named_parameters())
    return any(n in found and n in own and own[n].shape == found[n].shape for n in names)


def _copy_matching(target: nn.Module, source: nn.Module, but: Set[str]) -> int:
    """Copy parameters of the same name and shape, but for some; return how many numbers were
    copied. Buffers that are saved are copied as well: some models keep trained numbers in them."""
    # what is tied has several names
    found = dict(source.named_parameters(remove_duplicate=False))
    buffers = dict(source.named_buffers())
    saved = target.state_dict().keys() - but
    copied = 0
    with torch.no_grad():
        for name, buffer in target.named_buffers():
            given = buffers.get(name)
            if name in saved and given is not None and given.shape == buffer.shape:
                buffer.copy_(given)
        for name, parameter in target.named_parameters():
            given = found.get(name)
            if name not in but and given is not None and given.shape == parameter.shape:
                parameter.copy_(given)
                copied += parameter.numel()
    return copied
