"""From a recipe's section of a task to its data module: read, split, augmented, encoded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from fastkd.data.augmentation import Augmentation, augment
from fastkd.data.tasks.datamodule import TaskDataModule
from fastkd.data.tasks.glue import glue_task
from fastkd.data.tasks.questions import QuestionForm, Questions, read_questions
from fastkd.data.tasks.read import Examples, ExampleSource, read_examples
from fastkd.data.tasks.selection import SELECTION, first_of, split_off
from fastkd.data.tasks.task import Columns, Task
from fastkd.data.tasks.tokenized import EncodedExamples, Form, encode_examples
from fastkd.data.tasks.words import TaggedTexts, WordForm, read_words
from fastkd.errors import UserError, some_of
from fastkd.extras import need
from fastkd.head_spec import Labels
from fastkd.recipe import TaskAugmentation, TaskData

logger = logging.getLogger(__name__)

_Read = Examples | TaggedTexts | Questions
_READERS: dict[Labels | None, Callable[..., _Read]] = {
    "example": read_examples,
    "token": read_words,
    "span": read_questions,
}
"""By what a label is of, what reads a split."""


def task_of(section: TaskData) -> Task:
    """The task that a recipe names or describes.

    Raises:
        UserError: the extra of tasks is not installed, GLUE has none of this name, or the
            description contradicts itself.
    """
    need("a task", "tasks")
    columns = section.read_columns
    if columns is None:
        task = glue_task(section.name)
    else:
        task = Task(
            name=section.name,
            columns=Columns(texts=columns.texts, label=columns.label),
            kind=section.kind,
            labels=section.labels or (),
            meanings=tuple((meaning,) for meaning in section.meanings or ()),
            bounds=section.bounds,
            metrics=section.metrics or (),
        )
    given = section.class_weights
    if given is not None and task.regression:
        raise UserError(
            f"task.class_weights is given, but task {task.name} has scores and no classes; leave "
            "it out"
        )
    if isinstance(given, tuple) and len(given) != len(task.labels):
        raise UserError(
            f"task.class_weights has {len(given)} weights, expected {len(task.labels)}, one for "
            f"each of {some_of(task.labels)}"
        )
    return task


def prepare_task(
    section: TaskData,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    token_types: bool,
    counts_padding: bool,
    trains: bool,
    device: torch.device,
    build: bool,
    progress: bool,
) -> TaskDataModule:
    """The data module of a task, of examples that are not padded yet.

    Args:
        section: a recipe's.
        task: what the section names or describes.
        tokenizer: of the models.
        token_types: whether the models are told the texts of a pair apart.
        counts_padding: whether padded tokens count in the losses' means.
        trains: whether anything is trained on; where not, only what is scored is read, if no
            weights are those of the rest.
        device: where a masked language model that augments runs.
        build: whether this rank stores what is missing, and warns of what it reads; another finds
            it stored.
        progress: whether to show bars.

    Raises:
        UserError: data that can't be read, augmented or weighed.
    """
    encode = partial(
        _encode,
        section=section,
        tokenizer=tokenizer,
        token_types=token_types,
        build=build,
        progress=progress,
    )
    packed = section.padding == "none"
    selects = section.selection is not None and section.selection.scored
    if not (trains or selects or section.class_weights == "balanced"):
        scored = _read_scored(section, task, {}, None, warns=build)
        evaluations = {split: encode(examples) for split, examples in scored}
        # of what is trained on nothing is asked: some that are scored stand there
        train = next(iter(evaluations.values()))
        weights = _class_weights(section.class_weights, task, train)
        return TaskDataModule(task, train, evaluations, counts_padding, packed, weights)
    whole = _READERS[task.labels_of](task, section.source, section.train, section.cache)
    read, selection = _read_train(section, whole)
    examples: ExampleSource = read
    if section.augmentation is not None:
        assert isinstance(read, Examples), "a recipe augments texts alone"
        settings = Augmentation(**section.augmentation.model_dump())
        examples = augment(
            read, settings, tokenizer, cache=section.cache, device=device, progress=progress
        )
    scored = _read_scored(section, task, selection, whole, warns=build)
    evaluations = {split: encode(examples) for split, examples in scored}
    if build:
        _warn_of_classes(read, task)
    encoded = encode(examples)
    if section.augmentation is not None and len(encoded) == len(read):
        raise UserError(_nothing_augmented(section.augmentation, len(read)))
    weights = _class_weights(section.class_weights, task, encoded)
    return TaskDataModule(task, encoded, evaluations, counts_padding, packed, weights)


def _read_train(section: TaskData, whole: _Read) -> tuple[_Read, dict[str, _Read]]:
    """Of the split to train on, what is trained on, and what is split off to be scored."""
    read: _Read = whole
    selection: dict[str, _Read] = {}
    if section.selection is not None:
        assert isinstance(whole, Examples), "a recipe selects from texts alone"
        read, part = split_off(whole, section.selection.share)
        selection = {SELECTION: part} if section.selection.scored else {}
    if section.examples is not None:
        assert isinstance(read, Examples), "a recipe takes some of texts alone"
        read = first_of(read, section.examples)
    return read, selection


def _read_scored(
    section: TaskData,
    task: Task,
    selection: Mapping[str, _Read],
    train: _Read | None,
    *,
    warns: bool,
) -> Iterator[tuple[str, _Read]]:
    """Every split that is scored, each read once the one before is encoded; a selection of the
    train split stands for all of them."""
    read_split = _READERS[task.labels_of]
    for split in selection or section.evaluate or task.evaluations:
        scored = selection.get(split) or read_split(task, section.source, split, section.cache)
        if warns:
            _warn_of_scores(scored, train)
        yield split, scored


def _encode(
    examples: ExampleSource,
    section: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    token_types: bool,
    build: bool,
    progress: bool,
) -> EncodedExamples:
    form: Form | None = None
    if isinstance(examples, TaggedTexts):
        form = WordForm(examples)
    elif isinstance(examples, Questions):
        form = QuestionForm(examples, section.shared_tokens)
    return encode_examples(
        examples,
        tokenizer,
        max_length=section.max_length,
        token_types=token_types,
        cache=section.cache,
        build=build,
        progress=progress,
        form=form,
    )


def _class_weights(
    given: Literal["balanced"] | tuple[float, ...] | None, task: Task, train: EncodedExamples
) -> npt.NDArray[np.float64] | None:
    """[classes] as a recipe says, the smallest 1: of their ratios alone a mean depends, and the sum
    of a step's is then no smaller than 1."""
    if given is None:
        return None
    if given == "balanced":
        counts = np.bincount(train.labels, minlength=len(task.labels)).astype(np.float64)
        absent = [label for label, count in zip(task.labels, counts, strict=True) if not count]
        if absent:
            raise UserError(
                f"task.class_weights is balanced, but no example to train on is {absent[0]}, which "
                "then has no weight; give a list of weights"
            )
        weights = counts.sum() / (len(counts) * counts)
    else:
        weights = np.asarray(given, dtype=np.float64)
    found: npt.NDArray[np.float64] = weights / weights.min()
    return found


def _warn_of_scores(scored: _Read, train: _Read | None) -> None:
    if train is not None and scored.name != train.name and scored.digest == train.digest:
        logger.warning("%s holds the same examples as %s", scored.name, train.name)
    if len(scored.labels) and (scored.labels == scored.labels[0]).all():
        logger.warning(
            "%s: one label for all %d examples, so its scores say little", scored.name, len(scored)
        )


def _warn_of_classes(train: _Read, task: Task) -> None:
    held = set(train.labels.tolist())
    absent = [label for number, label in enumerate(task.labels) if number not in held]
    if absent:
        logger.warning("%s has no example of %s", train.name, some_of(absent))


def _nothing_augmented(section: TaskAugmentation, examples: int) -> str:
    sources = (section.masked_model, section.synonyms, section.glove)
    return (
        f"task.augmentation: no word of the {examples:,} examples has a candidate in "
        f"{' or '.join(filter(None, sources))}; name another source, raise "
        "task.augmentation.probability, or leave task.augmentation out"
    )
