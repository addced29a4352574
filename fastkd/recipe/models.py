"""The sections of the two models."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from fastkd.section import (
    MOST_HEADS,
    CachePlace,
    Place,
    Section,
)
from fastkd.types import Combine, EightBits, Head, ModelSource

Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
CacheForm = Literal["none", "exact", "bfloat16", "float16", "int8"]
CacheAttention = Literal["stored", "recomputed"]
CacheStates = Literal["read", "all"]
STARTS = ("teacher", "importance", "random")
"""Words of `student.init`, which name no folder."""
# more than any model has
_WIDEST = 2**20


def check_flex(attention: Attention, dropout: float | None, gradient_checkpointing: bool) -> None:
    """Refuse what flex attention does not do in training.

    Raises:
        ValueError: naming it.
    """
    if attention == "flex_attention" and dropout:
        raise ValueError(
            f"attention is flex_attention, which has no dropout, but dropout is {dropout:g}; set "
            "it to 0, or take sdpa"
        )
    if attention == "flex_attention" and gradient_checkpointing:
        raise ValueError(
            "attention is flex_attention, which can't be recomputed, but gradient_checkpointing "
            "is true; leave it out, or take sdpa"
        )


class OtherTeacher(Section):
    """A further teacher, which reads text by the first one's tokenizer."""

    model: Place
    """As `teacher.model`."""
    revision: Place | None = None
    """Branch, tag or commit on the hub."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Expected digest of `model.safetensors`, checked before use."""

    @property
    def source(self) -> ModelSource:
        """Where it is loaded from."""
        return ModelSource(self.model, self.revision, self.sha256)


def _named(given: object) -> object:
    """A name alone as the section that it is short for."""
    return {"model": given} if isinstance(given, str) else given


class Teacher(Section):
    """The large model. It is never trained and always runs in eval mode."""

    model: Place
    """Hub name, folder, or `package:NAME/FOLDER` for a model carried by an installed package."""
    revision: Place | None = None
    """Branch, tag or commit on the hub."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Expected digest of `model.safetensors`, checked before use."""
    others: tuple[Annotated[OtherTeacher, BeforeValidator(_named)], ...] = ()
    """Further teachers, by name or as a section: what losses read of embeddings, or of a
    classification head, is then what all of them give. Losses of layers read the first one, and
    all read what its tokenizer makes: theirs must put the same tokens around texts."""
    combine: Combine = "mean"
    """What the embeddings of several teachers come to, each scaled to length one: their mean, or
    all of them one behind the other. Of classification heads it is the mean of their outputs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float8", "int8"] = "auto"
    """Precision of the teacher's weights and activations; `auto` is bfloat16 on a GPU that computes
    in it, float32 elsewhere. In `float8` (GPUs) and `int8` (CPUs) its linear layers multiply eight
    bits, and all else, such as experts that are stacked, is bfloat16 and float32."""
    attention: Attention = "sdpa"
    """Attention implementation that the teacher runs."""
    placement: Literal["replicate", "shard", "offload"] = "replicate"
    """A copy on every rank, ZeRO-3 shards, or ZeRO-3 shards in CPU memory."""
    overlap: bool = False
    """On a GPU, run the teacher on the next micro-batch of a step, on a CUDA stream of its own,
    while the student trains on this one. Takes the memory of one more micro-batch's states."""
    cache: CacheForm = "none"
    """Whether what the losses read of the teacher is stored once, before the first step, and read
    afterwards: `exact` in the teacher's own precision, `bfloat16` rounded to that. Of losses that
    read embeddings that is one vector a sequence, which `float16` and `int8`, with a scale a
    vector, round too."""
    cache_attention: CacheAttention = "stored"
    """What is stored of the attention that losses read: queries, keys and values, or the hidden
    states below their blocks, from which the teacher's own norms and projections make them in every
    step: most often less room, for a part of the teacher's work."""
    cache_states: CacheStates = "read"
    """Whether what the losses of this recipe read is stored, or with `cache_attention: recomputed`
    the states of all layers and what the head gives, which runs with other losses and mappings of
    the same teacher and data read as well."""
    cache_folder: CachePlace = "~/.cache/fastkd"
    """Folder of stored states, shared by all runs and by all machines of one."""
    cache_limit: float = Field(default=100, gt=0, le=1e6)
    """GiB that the states of one run may take, at most."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cache != "none" and self.placement != "replicate":
            raise ValueError(
                f"cache is {self.cache}, but placement is {self.placement}, and states are stored "
                "of a whole teacher only; use replicate, or leave cache out"
            )
        if self.cache == "none" and self.cache_attention != "stored":
            raise ValueError(
                f"cache_attention is {self.cache_attention}, but cache is none, so nothing is "
                "stored; give cache=exact or bfloat16, or leave cache_attention out"
            )
        if self.cache_states == "all" and self.cache_attention != "recomputed":
            raise ValueError(
                f"cache_states is all, but cache_attention is {self.cache_attention}; set it to "
                "recomputed, or cache_states to read"
            )
        if self.overlap and (self.cache != "none" or self.placement != "replicate"):
            found = f"placement is {self.placement}, whose weights are gathered in turn"
            if self.cache != "none":
                found = f"cache is {self.cache}, and a teacher whose states are read does not run"
            raise ValueError(f"overlap is on, but {found}; leave one of them out")
        if self.others and (self.eight_bits is not None or self.placement != "replicate"):
            found = f"dtype is {self.dtype}, in which one teacher"
            if self.placement != "replicate":
                found = f"placement is {self.placement}, in which one"
            raise ValueError(f"others are given, but {found} can run; change one of them")
        if self.eight_bits is not None and self.placement != "replicate":
            raise ValueError(
                f"dtype is {self.dtype}, but placement is {self.placement}, which shards weights "
                "of 16 and 32 bits only; use replicate, or another dtype"
            )
        return self

    @property
    def eight_bits(self) -> EightBits | None:
        """What its linear layers are rounded to, if they are."""
        return self.dtype if self.dtype in ("float8", "int8") else None

    @property
    def states(self) -> str:
        """The precision that it is loaded in and that its states come in, by torch's name; `auto`
        is settled before."""
        return {"float8": "bfloat16", "int8": "float32"}.get(self.dtype, self.dtype)

    @property
    def number_bytes(self) -> int:
        """Bytes of one of its numbers that is not rounded to eight bits."""
        return 4 if self.states == "float32" else 2

    @property
    def source(self) -> ModelSource:
        """Where it is loaded from."""
        return ModelSource(self.model, self.revision, self.sha256)


class Student(Section):
    """The small model: the teacher's architecture with these numbers in place of the teacher's, or
    a model to start from."""

    init: Place = "teacher"
    """`teacher` copies the mapped teacher layers where shapes agree, and the uniform map's where
    this one gives a layer none or several; `importance` also takes the most active of their
    channels, neurons and heads where the student has fewer, `random` draws everything; or the
    folder, hub name or `package:NAME/FOLDER` of a model to start from. One of another architecture
    or vocabulary is taken as it is, with its own tokenizer, and so is any where `layers` is not
    given; numbers that are given must be its own."""
    layers: int | None = Field(default=None, gt=0, le=10_000, validate_default=True)
    """Transformer blocks; may be left out where `init` names a model."""
    hidden_size: int | None = Field(default=None, gt=0, le=_WIDEST)
    """Width; the teacher's where not given."""
    heads: int | None = Field(default=None, gt=0, le=MOST_HEADS)
    """Attention heads; the teacher's where not given."""
    kv_heads: int | None = Field(default=None, gt=0, le=MOST_HEADS)
    """Key and value heads of grouped-query attention; scaled with `heads` where not given."""
    intermediate_size: int | None = Field(default=None, gt=0, le=_WIDEST)
    """Width of the feed-forward layer; the teacher's where not given."""
    dropout: float | None = Field(default=0.0, ge=0, lt=1)
    """Every dropout rate of the student; `null` keeps the teacher's rates."""
    freeze_word_embeddings: bool = False
    """Leave the table of the vocabulary as it is copied: most of the numbers of a small student,
    which then need neither gradient nor update. A head that is tied to it stays too."""
    head: Head = "none"
    """What stands on the blocks of both models; `logits`, `labels` and `mlm` need one."""
    attention: Attention = "sdpa"
    """Attention implementation that the student runs."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass (non-reentrant)."""

    @field_validator("layers")
    @classmethod
    def _known(cls, layers: int | None, info: ValidationInfo) -> int | None:
        # of an `init` that was refused nothing is said here
        if layers is None and info.data.get("init") in STARTS:
            raise ValueError("missing; it has no default, so give a value")
        return layers

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.freeze_word_embeddings and self.init == "random":
            raise ValueError(
                "freeze_word_embeddings is on, but init is random, and what is drawn has to be "
                "trained; set init to teacher, or leave freeze_word_embeddings out"
            )
        check_flex(self.attention, self.dropout, self.gradient_checkpointing)
        return self

    @property
    def starts_from(self) -> ModelSource | None:
        """The model that `init` names, `None` where it names none."""
        return None if self.init in STARTS else ModelSource(self.init)
