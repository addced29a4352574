"""A student as an ONNX graph, which is kept only where ONNX Runtime computes what PyTorch does.

torch's own exporter makes it (`torch.onnx.export(dynamo=True)`): optimum's, which others use, takes
transformers 4 alone so far. Sequences may be of any number and length, padded on the right. The
graph of a sentence-transformers student ends with its vectors, whatever makes them.
"""

from __future__ import annotations

import inspect
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkd.capture import vocabulary_size
from fastkd.data.known_ids import drawn_below
from fastkd.data.sequences import has_token_types
from fastkd.errors import FOREIGN_ERRORS, UserError, one_line
from fastkd.extras import need
from fastkd.files.disk import (
    check_place,
    disk_errors,
    replace_folder,
    settle,
    sweep,
    temporary_of,
)
from fastkd.files.lock import held
from fastkd.head_spec import HEADS
from fastkd.losses.pooling import EmbeddingModules
from fastkd.models import UnknownModule, load_student, load_tokenizer, read_embedding
from fastkd.recipe import AnyRecipe, Recipe
from fastkd.training.run_folder import RunFolder
from fastkd.types import Head, ModelSource

GRAPH = "model.onnx"
TOLERANCE = 1e-4
"""Largest difference, as a part of the largest number of an output, or of 1 where all are
smaller."""
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OUTPUTS = ("last_hidden_state", "logits", "start_logits", "end_logits")
_VECTOR = "sentence_embedding"
# ONNX holds no file of more than 2 GiB; what is larger lies beside it
_LARGEST = 3 << 29
# tokens of the longest sequence that is tried
_LONGEST = 512


@dataclass(frozen=True)
class OnnxGraph:
    """A graph that was made and checked."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    difference: float
    """To PyTorch, the largest, relative as `TOLERANCE`."""
    left_out: str = ""
    """Why the graph has no vectors, where the student's folder has modules that make some."""

    def __str__(self) -> str:
        taken, given = ", ".join(self.inputs), ", ".join(self.outputs)
        return (
            f"{self.path}: from {taken} to {given}; ONNX Runtime and PyTorch differ by at most "
            f"{self.difference:.1e}{self.left_out and f'; without {_VECTOR}: {self.left_out}'}"
        )


def export_onnx(run: RunFolder, output: Path | None = None) -> OnnxGraph:
    """Write the student of a finished run as an ONNX graph, beside its configuration and tokenizer.

    Args:
        run: its folder.
        output: folder that is made; `onnx` in the student's if not given.

    Raises:
        UserError: the run is not finished, the extra is not installed, the folder exists, or no
            graph can be made that computes what the student does.
    """
    need("fastkd export --onnx", "onnx")
    run.read_finished()
    head = head_of(run.read_recipe())
    if HEADS[head].labels == "next_token":
        raise UserError(
            f"{run.path}: its student generates text (student.head is {head}), and fastkd makes no "
            "graph with a cache of keys and values; read the student with transformers, or "
            "distil one without a head"
        )
    folder = output or run.student / "onnx"
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it, or give another --output")
    check_place(folder, "--output", above=True)
    model = load_student(run.student, head=head)
    tokenizer = load_tokenizer(ModelSource(str(run.student)), vocabulary_size(model))
    embedding, left_out = _embedding(run, model, head)
    student = _ExportedStudent(model, embedding)
    with (
        held(run.path, "an --output") if output is None else nullcontext(),
        disk_errors(folder, "give another --output"),
    ):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if output is None:
            # beside the student: what a killed export leaves there would be pushed with it
            sweep(run.path, run.student.name)
        made = temporary_of(folder if output is not None else run.student)
        try:
            made.mkdir()
            found = _make(student, tokenizer, made / GRAPH, str(run.path))
            model.config.save_pretrained(made)
            tokenizer.save_pretrained(made)
            settle(made)
            replace_folder(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return OnnxGraph(folder / GRAPH, *found, left_out)


def head_of(recipe: AnyRecipe) -> Head:
    """What stands on the student of a recipe of either kind."""
    return recipe.student.head if isinstance(recipe, Recipe) else recipe.task.kind


def _embedding(
    run: RunFolder, model: PreTrainedModel, head: Head
) -> tuple[EmbeddingModules | None, str]:
    """What makes vectors of the student's states, where it is handed on with that, or why there is
    none of a student that gives something else as well."""
    if HEADS[head].data == "task" or not (run.student / "modules.json").is_file():
        return None, ""
    try:
        return read_embedding(ModelSource(str(run.student)), model.config, head), ""
    except UnknownModule as error:
        if head == "none":
            raise
        return None, str(error)


class _ExportedStudent(nn.Module):
    """What the graph computes: by names, from tensors to tensors."""

    def __init__(self, model: PreTrainedModel, embedding: EmbeddingModules | None) -> None:
        super().__init__()
        self.model = model
        self.embedding = embedding
        # what was generated before is no output of it
        if getattr(model.config, "use_cache", None):
            model.config.use_cache = False

    def named(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every output by its name; `attention_mask` is among the inputs."""
        made = self.model(**inputs, return_dict=True)
        found = {name: made[name] for name in _OUTPUTS if made.get(name) is not None}
        if self.embedding is not None:
            states = found.get("last_hidden_state")
            if states is None:
                # a head hands on its logits alone; what is computed twice the runtime merges
                states = self.model.base_model(**inputs, return_dict=True)["last_hidden_state"]
            found[_VECTOR] = self.embedding(states, inputs["attention_mask"].bool())
        return found

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """As `named`; the exporter reads the names of what it takes."""
        given = dict(zip(_INPUTS, (input_ids, attention_mask, token_type_ids), strict=True))
        return tuple(self.named({k: v for k, v in given.items() if v is not None}).values())


def _make(
    student: _ExportedStudent, tokenizer: PreTrainedTokenizerBase, path: Path, given: str
) -> tuple[tuple[str, ...], tuple[str, ...], float]:
    """Write a graph and see that it computes what the student does; names and difference.

    Raises:
        UserError: it can't be made or read, or computes something else.
    """
    # the exporter needs it where it is used, and so do we
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    errors: tuple[type[Exception], ...] = (
        *FOREIGN_ERRORS,
        *(k for k in vars(runtime).values() if isinstance(k, type) and issubclass(k, Exception)),
    )
    model = student.model
    names = _inputs_of(model, tokenizer)
    batches = [_example(model, tokenizer, names, *size) for size in _sizes(model)]
    try:
        with torch.no_grad():
            outputs = tuple(student.named(batches[0]))
        with _quiet():
            torch.onnx.export(
                student,
                kwargs=batches[0],
                f=path,
                dynamo=True,
                input_names=names,
                output_names=outputs,
                dynamic_shapes={name: {0: "batch", 1: "tokens"} for name in names},
                external_data=_bytes(model) > _LARGEST,
                verbose=False,
            )
        differences = _differences(student, path, batches, outputs)
    except errors as error:
        raise UserError(
            f"{given}: no ONNX graph can be made of {type(model).__name__} "
            f"({one_line(_root(error))}); read the student with transformers"
        ) from error
    worst, name, size = max(differences)
    if not worst <= TOLERANCE:
        raise UserError(
            f"{given}: ONNX Runtime computes another {name} than PyTorch for {size[0]} sequences "
            f"of {size[1]} tokens, by {worst:.1e}, expected at most {TOLERANCE:g}; nothing is kept"
        )
    return names, outputs, worst


def _inputs_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What the graph takes: ids, mask, and types of tokens where the tokenizer hands them on."""
    told = "token_type_ids" in tokenizer.model_input_names
    has = inspect.signature(model.forward).parameters
    return tuple(n for n in _INPUTS if n in has and (n != "token_type_ids" or told))


def _differences(
    student: _ExportedStudent,
    path: Path,
    batches: list[dict[str, Tensor]],
    outputs: tuple[str, ...],
) -> list[tuple[float, str, tuple[int, ...]]]:
    """How far ONNX Runtime is from PyTorch, of each output of each batch; padding doesn't count."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for batch in batches:
        fed = {name: tensor.numpy() for name, tensor in batch.items()}
        made = session.run(list(outputs), fed)
        with torch.no_grad():
            expected = student.named(batch)
        mask = batch["attention_mask"].bool()
        for (name, right), values in zip(expected.items(), made, strict=True):
            value = torch.from_numpy(values)
            if value.shape != right.shape:
                raise ValueError(f"{name} is {list(value.shape)}, expected {list(right.shape)}")
            if right.shape[:2] == mask.shape:
                value, right = value[mask], right[mask]
            largest = max(1.0, right.abs().max().item())
            difference = (value - right).abs().max().item() / largest
            # NaN is as far as can be, and `max` would pass over it
            found.append((difference if difference >= 0 else torch.inf, name, tuple(mask.shape)))
    return found


def _sizes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """Sequences and tokens of what is tried, from what the graph is made of on."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # some families keep two places for padding
    longest = min(_LONGEST, (positions or _LONGEST) - 2)
    return [(2, min(9, longest)), (1, 1), (1, longest), (3, min(20, longest))]


def _example(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: tuple[str, ...],
    batch: int,
    tokens: int,
) -> dict[str, Tensor]:
    """Random ids [batch, tokens]; of several sequences the last is padded by half."""
    generator = torch.Generator().manual_seed(batch * tokens)
    known = drawn_below(tokenizer)
    ids = torch.randint(known, (batch, tokens), generator=generator)
    pad = model.config.get_text_config().pad_token_id
    pad = tokenizer.pad_token_id if pad is None else pad
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, tokens - tokens // 2 :] = 0
    if pad is not None:
        # a sequence holds none, which some families count by
        ids = torch.where(ids == pad, (pad + 1) % known, ids).masked_fill(mask == 0, pad)
    second = torch.arange(tokens) >= tokens // 2
    types = second.long().expand_as(ids) * int(has_token_types(model.config))
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {name: made[name] for name in names}


def _root(error: BaseException) -> BaseException:
    """The innermost cause, which is what happened; those around it say who was at work."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _bytes(model: PreTrainedModel) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from telling what it skips and how it goes about its work, and from
    printing whole graphs where it gives up: why stands in its error."""
    below = logging.root.manager.disable
    # many of torch's modules have loggers, each with a handler of its own
    logging.disable(logging.ERROR)
    nowhere = io.StringIO()
    try:
        with redirect_stdout(nowhere), redirect_stderr(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(below)
