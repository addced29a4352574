"""A recipe: one YAML file that says everything about a run, read into frozen models.

Every field refuses unknown keys and wrong types where it is read, so that a run never starts on a
misread setting. Dotted overrides (`train.steps=1000`) are applied to the YAML before validation:
the command line can say nothing that a file could not.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fastkd.errors import UserError
from fastkd.layer_map import MapKind

Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _known_map(value: object) -> object:
    layers = isinstance(value, list | tuple) and all(type(v) is int and v >= 0 for v in value)
    if not layers and value not in get_args(MapKind):
        raise ValueError(
            f"expected {', '.join(get_args(MapKind))} or a list with one teacher layer for each "
            f"student layer, 0 for none (given {value!r})"
        )
    return value


Sources = Annotated[tuple[str, ...], BeforeValidator(_one_or_many), Field(min_length=1)]
Layers = Annotated[MapKind | tuple[int, ...], BeforeValidator(_known_map)]
Name = Annotated[str, Field(min_length=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """What all sections share: immutable, strict about keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would read true as 1
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError(f"expected a value, not a switch (given {value})")
        return value


class Teacher(Section):
    """The large model. It is never trained and always runs in eval mode."""

    model: Name
    """Hub name, folder, or `package:NAME/FOLDER` for a model carried by an installed package."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Expected digest of `model.safetensors`, checked before use."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the teacher's weights and activations."""
    attention: Attention = "sdpa"
    """Attention implementation that the teacher runs."""
    placement: Literal["replicate", "shard", "offload"] = "replicate"
    """A copy on every rank, ZeRO-3 shards, or ZeRO-3 shards in CPU memory."""


class Student(Section):
    """The small model: the teacher's architecture with these numbers in place of the teacher's."""

    layers: int = Field(gt=0)
    """Transformer blocks."""
    hidden_size: int | None = Field(default=None, gt=0)
    """Width; the teacher's where not given."""
    heads: int | None = Field(default=None, gt=0)
    """Attention heads; the teacher's where not given."""
    kv_heads: int | None = Field(default=None, gt=0)
    """Key and value heads of grouped-query attention; scaled with `heads` where not given."""
    intermediate_size: int | None = Field(default=None, gt=0)
    """Width of the feed-forward layer; the teacher's where not given."""
    init: Literal["teacher", "random"] = "teacher"
    """Copy the mapped teacher layers where shapes agree, or draw everything."""
    dropout: float | None = Field(default=0.0, ge=0, lt=1)
    """Every dropout rate of the student; `null` keeps the teacher's rates."""
    attention: Attention = "sdpa"
    """Attention implementation that the student runs."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass (non-reentrant)."""


class AttentionLoss(Section):
    """Attention of the mapped blocks (TinyBERT, arXiv 1909.10351, eq. 7)."""

    kind: Literal["score_mse"] = "score_mse"
    """Squared difference of the scores before the softmax."""
    weight: float = Field(default=1.0, ge=0)
    """Factor in the total loss."""


class HiddenLoss(Section):
    """Hidden states of the mapped layers (TinyBERT, arXiv 1909.10351, eq. 8)."""

    kind: Literal["mse"] = "mse"
    """Squared difference after the projection."""
    weight: float = Field(default=1.0, ge=0)
    """Factor in the total loss."""


class EmbeddingLoss(HiddenLoss):
    """Embeddings, layer 0 of both models (TinyBERT, arXiv 1909.10351, eq. 9)."""


class Losses(Section):
    """The terms of the objective, and what they share; a term that is absent is off."""

    attention: AttentionLoss | None = None
    """Attention of the mapped blocks."""
    hidden: HiddenLoss | None = None
    """Hidden states of the mapped layers."""
    embedding: EmbeddingLoss | None = None
    """Embedding outputs."""
    reduction: Literal["valid", "tinybert"] = "valid"
    """Means over valid tokens and query-key pairs, or over all as the official TinyBERT code."""
    projection: Literal["auto", "none", "shared", "per_pair"] = "auto"
    """From student to teacher width: one for hidden states and embeddings of all pairs (TinyBERT),
    one a pair, or none; auto is none where the widths agree, else shared."""
    projection_bias: bool = True
    """Whether projections have a bias."""

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if not any((self.attention, self.hidden, self.embedding)):
            raise ValueError("no term is given; expected attention, hidden or embedding")
        return self


class Data(Section):
    """Text, cut into documents, tokenised once and packed into blocks without padding."""

    train: Sources
    """Files, folders or globs (.txt, .txt.gz, .jsonl, .jsonl.gz, .parquet), a saved `datasets`
    folder, a hub name (`NAME`, `NAME:SUBSET`), or `python-docs`, the help texts inside every
    Python."""
    heldout: Sources | None = None
    """Text that is never trained on, in the same forms; else a part of `train` is held out."""
    heldout_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of the documents that is held out where `heldout` is not given."""
    heldout_blocks: int = Field(default=256, gt=0)
    """Held-out blocks that an evaluation uses, at most: spread over the held-out text, or the
    first of them when streaming."""
    split: str = "train"
    """Split of a hub data set or folder."""
    text_column: str = "text"
    """Column that holds the text (.jsonl, .parquet, data sets)."""
    documents: Literal["paragraph", "line"] = "paragraph"
    """In plain text a document ends at an empty line, or at every line end."""
    block_size: int = Field(default=128, ge=8)
    """Tokens in a block, special tokens included."""
    streaming: bool = False
    """Read and tokenise while training, without storing the tokens."""
    shuffle_buffer: int = Field(default=1000, ge=1)
    """Documents that a streamed shuffle holds."""
    workers: int | None = Field(default=None, ge=1)
    """Tokenising processes; one a core where not given."""
    cache: str = "~/.cache/fastkd"
    """Folder of tokenised data, shared by all runs."""


class Train(Section):
    """The loop: length, batch, optimiser, precision, and what is written when."""

    steps: int = Field(default=1000, gt=0)
    """Optimiser steps."""
    batch_size: int = Field(default=32, gt=0)
    """Blocks in an optimiser step, over all ranks and micro-batches: results don't depend on
    how it is cut."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Blocks in one forward pass of one rank; the whole share of the rank where not given."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay, not applied to biases and normalisation weights."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """AdamW's decay rates."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up, to zero at the last step."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm is clipped to this; 0 switches clipping off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the student's forward and backward; master weights are fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage of the student."""
    seed: int = Field(default=0, ge=0)
    """Seed of initial weights, data order and dropout."""
    log_every: int = Field(default=10, gt=0)
    """Steps between two lines of metrics."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between held-out evaluations; 0 is before and after only."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0 is at the end only."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints that are kept."""


class Run(Section):
    """Where a run is written and who is told."""

    output: Name
    """Folder of the run; it must not hold another run."""
    monitor: Literal["none", "tensorboard", "wandb"] = "none"
    """Tracker that DeepSpeed's monitor writes to."""


class Recipe(Section):
    """Everything about a run."""

    teacher: Teacher
    """The model to learn from."""
    student: Student
    """The model to make."""
    layer_map: Layers = "uniform"
    """Which teacher layer each student layer learns from; a list names one teacher layer for each
    student layer, 0 for none."""
    losses: Losses
    """What is matched."""
    data: Data
    """What both models read."""
    train: Train = Train()
    """How it is trained."""
    run: Run
    """Where it is written."""
    deepspeed: dict[str, Any] = {}
    """Further keys of DeepSpeed's configuration; those that the recipe sets itself are refused."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.layer_map, tuple) and len(self.layer_map) != self.student.layers:
            raise ValueError(
                f"layer_map names {len(self.layer_map)} teacher layers, but student.layers is "
                f"{self.student.layers}; give one for each student layer, 0 for none"
            )
        if self.train.precision == "bf16" and self.train.zero_stage == 0:
            raise ValueError(
                "train.precision is bf16 and train.zero_stage 0, where DeepSpeed takes one "
                "spurious optimiser step; use zero_stage 1"
            )
        if self.train.warmup_steps >= self.train.steps:
            raise ValueError(
                f"train.warmup_steps is {self.train.warmup_steps}, expected fewer than "
                f"train.steps ({self.train.steps})"
            )
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: YAML file.
        overrides: `dotted.key=value` strings; the value is read as YAML.

    Raises:
        UserError: the file is missing or not YAML, or a key or value is not what a recipe takes.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable recipe ({error}); give a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """Validate a mapping as a recipe; `name` stands before every complaint.

    Raises:
        UserError: with the field, what was given and what was expected.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{name}: {_complaint(error)}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected dotted.key=value, as in train.steps=1000")
    *parents, leaf = key.split(".")
    node: Any = tree
    for parent in parents:
        if not isinstance(node, dict):
            break
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
    if not isinstance(node, dict):
        raise UserError(f"override {override!r}: {'.'.join(parents)} is not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: {text!r} is not a YAML value") from error


def _complaint(error: ValidationError) -> str:
    first, *rest = error.errors(include_url=False)
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        allowed = list(_section(first["loc"][:-1]).model_fields)
        close = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        text = f"{field}: unknown key; {hint}expected one of {', '.join(allowed)}"
    elif first["type"] == "missing":
        text = f"{field}: missing; it has no default, so give a value"
    elif first["type"] == "model_type":
        keys = ", ".join(_section(first["loc"]).model_fields)
        text = f"{field}: expected a section with keys {keys} (given {first['input']!r})"
    else:
        where = f"{field}: " if field else ""
        message = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] == "value_error" else f" (given {first['input']!r})"
        text = f"{where}{message[:1].lower()}{message[1:]}{given}"
    return text + (f" (and {len(rest)} more)" if rest else "")


def _section(location: Sequence[int | str]) -> type[BaseModel]:
    model: type[BaseModel] = Recipe
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        candidates = getattr(annotation, "__args__", (annotation,))
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return model
