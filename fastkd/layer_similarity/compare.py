"""Run two models on the same text and compare all their layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fastkd.capture import AttentionTraits, Capture, capture, capture_keywords, try_model
from fastkd.data.known_ids import limit_ids
from fastkd.data.text import TextSettings, prepare_corpus
from fastkd.errors import UserError, path_name
from fastkd.layer_map import MapKind, make_layer_map
from fastkd.layer_similarity.attention import attention_divergences
from fastkd.layer_similarity.cka import LinearCKA, Matrix
from fastkd.losses import ModelPair
from fastkd.losses.comparable import DivergenceKind
from fastkd.models import (
    check_same_vocabulary,
    load_student,
    load_teacher,
    load_tokenizer,
    locate_model,
)
from fastkd.section import check_place
from fastkd.training.session import quietened
from fastkd.training.usual_modes import usual_modes
from fastkd.types import AnyPath, ModelSource, Side

MAPS: tuple[MapKind, ...] = ("uniform", "last", "first")


@dataclass(frozen=True)
class Similarity:
    """What was measured; rows are the student's layers, columns the teacher's."""

    cka: Matrix
    """Linear CKA of hidden states, from layer 0, the embeddings; 1 is the same up to rotation."""
    divergence: Matrix
    """Divergence of attention probabilities, from layer 1; 0 is the same. NaN where they can't be
    compared."""
    kind: DivergenceKind
    """Which divergence."""
    relation_heads: int | None
    """Heads that both models were cut into where theirs differ."""
    heads: tuple[int, int]
    """Attention heads of student and teacher."""
    tokens: int
    """Valid tokens that both models read."""
    widths: tuple[int, int]
    """Hidden sizes of student and teacher."""

    def maps(self) -> dict[str, list[int]]:
        """The teacher layer of every student layer from 1, by map; none for a deeper student."""
        student, teacher = self.divergence.shape
        if student > teacher:
            return {}
        return {name: [t for _, t in make_layer_map(name, student, teacher).pairs] for name in MAPS}


@torch.no_grad()
def measure(
    student: Any,
    teacher: Any,
    batches: Iterable[Mapping[str, Tensor]],
    traits: tuple[AttentionTraits, AttentionTraits],
    *,
    kind: DivergenceKind = "js",
) -> Similarity:
    """Compare all layers of two models on the same tokens.

    Args:
        student, teacher: in eval mode, tried, on one device.
        batches: `input_ids` [batch, tokens] and, if padded, `attention_mask` of the same shape.
        traits: what trying student and teacher showed.
        kind: divergence of attention probabilities.

    Raises:
        UserError: one model is causal and the other isn't, or there is no valid token.
    """
    models = student, teacher
    pair = _pair(student, teacher, traits)
    relation_heads = None
    cka, tokens, divergence = LinearCKA(), 0, torch.zeros(())
    for inputs in batches:
        mask = inputs.get("attention_mask")
        valid = None if mask is None else mask.bool()
        count = inputs["input_ids"].numel() if valid is None else int(valid.sum())
        if not count:
            continue
        student_states, teacher_states = (_run(model, inputs) for model in models)
        cka.add(_features(student_states.hidden, valid), _features(teacher_states.hidden, valid))
        if pair.heads[0] != pair.heads[1]:
            relation_heads = _relation_heads(
                student_states.attention[1].query, teacher_states.attention[1].query
            )
        found = attention_divergences(
            student_states.attention,
            teacher_states.attention,
            pair,
            kind=kind,
            relation_heads=relation_heads,
            mask=valid,
        )
        # a mean over rows, of which every batch has as many as it has tokens
        divergence = divergence.to(found.device) + count * found.double()
        tokens += count
    if not tokens:
        raise UserError("no tokens to compare the models on; give text")
    return Similarity(
        cka=cka.result(),
        divergence=(divergence / tokens).cpu().numpy(),
        kind=kind,
        relation_heads=relation_heads,
        heads=pair.heads,
        tokens=tokens,
        widths=pair.widths,
    )


@quietened()
@usual_modes()
def inspect_layers(
    teacher: AnyPath,
    student: AnyPath,
    data: AnyPath | Sequence[AnyPath],
    *,
    kind: DivergenceKind = "js",
    blocks: int = 64,
    block_size: int = 128,
    batch_size: int = 8,
) -> Similarity:
    """Measure how alike all layers of two models are on text; on the GPU where there is one.

    Args:
        teacher: hub name, folder, or `package:NAME/FOLDER`; its tokenizer reads the text.
        student: likewise; the `student` folder of a run is one.
        data: files, folders, globs or names, as in `data.train` of a recipe.
        kind: divergence of attention probabilities.
        blocks: how much text is read, in blocks.
        block_size: tokens of a block.
        batch_size: blocks that a model reads at a time.

    Raises:
        UserError: a model or text that can't be read, or two models of different vocabularies.
    """
    _check_arguments(kind, blocks=blocks, block_size=block_size, batch_size=batch_size)
    places = _places(data)
    teacher_source, student_source = _source("teacher", teacher), _source("student", student)
    large = load_teacher(teacher_source)
    small = load_student(Path(locate_model(student_source.name))).requires_grad_(False)
    sides = (small, student_source), (large, teacher_source)
    vocabularies = [_vocabulary(model, source.name) for model, source in sides]
    traits = try_model(small, block_size), try_model(large, block_size)
    tokenizer = load_tokenizer(teacher_source, vocabularies[1])
    given = f"student {student_source.name}"
    check_same_vocabulary(student_source, given, tokenizer)
    # tables may have unlike numbers of rows behind their last word, as those of Qwen2.5 have
    limit_ids(tokenizer, vocabularies[0], given, "the teacher's tokenizer")
    # nothing is trained on, so nearly all of the text may be held out
    wanted = TextSettings(
        train=places,
        heldout_fraction=0.999,
        heldout_blocks=blocks,
        block_size=block_size,
        streaming=True,
    )
    rows = prepare_corpus(wanted, tokenizer, progress=False).heldout
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large.to(device)
    small.to(device)
    batches = ({"input_ids": part.to(device)} for part in torch.split(rows, batch_size))
    return measure(small, large, batches, traits, kind=kind)


def _check_arguments(kind: str, **numbers: int) -> None:
    for name, given in numbers.items():
        if not isinstance(given, int) or given < 1:
            raise UserError(f"{name} is {given!r:.50}, expected a whole number of at least 1")
    if kind not in get_args(DivergenceKind):
        known = ", ".join(get_args(DivergenceKind))
        raise UserError(f"kind is {kind!r:.50}, expected one of {known}")


def _places(data: AnyPath | Sequence[AnyPath]) -> tuple[str, ...]:
    expected = "a file, folder, pattern or name, or a list of them"
    listed = data if isinstance(data, list | tuple) else [data]
    if not listed:
        raise UserError(f"data is empty, expected {expected}")
    return tuple(path_name(place, "data", expected) for place in listed)


def _source(side: Side, given: AnyPath) -> ModelSource:
    """Where a model is loaded from that the user names.

    Raises:
        UserError: nothing can have such a name.
    """
    name = path_name(given, side, "a hub name, folder, or package:NAME/FOLDER")
    if not name:
        raise UserError(f"{side}: expected a hub name, folder, or package:NAME/FOLDER (given '')")
    try:
        return ModelSource(check_place(name))
    except ValueError as error:
        raise UserError(f"{side}: {error}") from error


def _vocabulary(model: Any, given: str) -> int:
    """Tokens that a model embeds.

    Raises:
        UserError: it reads something else than text, or is made of several models.
    """
    numbers = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    missing = [name for name in numbers if not isinstance(getattr(model.config, name, None), int)]
    try:
        embedded = int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        missing.append("token embeddings")
        embedded = 0
    if missing:
        raise UserError(
            f"{given}: {type(model).__name__} has no {missing[0]} of its own, so its layers can't "
            "be compared; give a text model with a single stack, such as the text part of this one"
        )
    return embedded


def _pair(student: Any, teacher: Any, traits: tuple[AttentionTraits, AttentionTraits]) -> ModelPair:
    if traits[0].causal != traits[1].causal:
        raise UserError(
            f"the student is {'causal' if traits[0].causal else 'bidirectional'} and the teacher "
            "is not; give two encoders or two decoders"
        )
    for found in traits:
        if reason := found.unknown or found.differs:
            raise UserError(f"{reason}, so no divergence can be measured; give other models")
    student_config, teacher_config = student.config, teacher.config
    return ModelPair(
        widths=(student_config.hidden_size, teacher_config.hidden_size),
        causal=traits[0].causal,
        heads=(student_config.num_attention_heads, teacher_config.num_attention_heads),
        windows=(traits[0].windows, traits[1].windows),
        sinks=(traits[0].sinks, traits[1].sinks),
    )


def _relation_heads(student_query: Tensor, teacher_query: Tensor) -> int:
    """The teacher's heads where they divide the student's queries too, else what both have in
    common; queries are [batch, heads, tokens, head_dim]."""
    width = student_query.shape[1] * student_query.shape[3]
    heads = teacher_query.shape[1]
    return heads if width % heads == 0 else math.gcd(student_query.shape[1], heads)


def _run(model: Any, inputs: Mapping[str, Tensor]) -> Capture:
    layers = range(1, model.config.num_hidden_layers + 1)
    with capture(model, attention=layers, hidden=(0, *layers)) as states:
        model(**inputs, **capture_keywords(model))
    return states


def _features(hidden: Mapping[int, Tensor], valid: Tensor | None) -> list[Tensor]:
    """[valid tokens, width] of every layer."""
    return [
        state.flatten(0, 1) if valid is None else state[valid]
        for _, state in sorted(hidden.items())
    ]
