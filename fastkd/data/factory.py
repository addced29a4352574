"""From a recipe's section to what a run reads; the first rank prepares, then the others open."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fastkd.data.augmentation import Augmentation, augment
from fastkd.data.datamodule import DataModule
from fastkd.data.rows import RowSets, RowSettings, prepare_rows
from fastkd.data.rows.datamodule import RowDataModule
from fastkd.data.sequences import uses_token_types
from fastkd.data.tasks import (
    Columns,
    EncodedExamples,
    Examples,
    Task,
    encode_examples,
    glue_task,
    padding_id,
    read_examples,
)
from fastkd.data.tasks.datamodule import TaskDataModule
from fastkd.data.tasks.questions import QuestionForm, Questions, read_questions
from fastkd.data.tasks.read import ExampleSource
from fastkd.data.tasks.selection import SELECTION, first_of, split_off
from fastkd.data.tasks.tokenized import Form
from fastkd.data.tasks.words import TaggedTexts, WordForm, read_words
from fastkd.data.text import TextSettings, prepare_corpus
from fastkd.data.text.cache import tokenizer_digest
from fastkd.data.text.datamodule import TextDataModule
from fastkd.data.text.mlm import Masking
from fastkd.data.text.tokenize import stream_workers
from fastkd.distributed import Ranks
from fastkd.errors import UserError, some_of
from fastkd.extras import need
from fastkd.head_spec import HEADS, Labels
from fastkd.recipe import AnyRecipe, Data, Recipe, TaskAugmentation, TaskData
from fastkd.row_form import RowForm

logger = logging.getLogger(__name__)

T = TypeVar("T")
_TEXT_FIELDS = tuple(field.name for field in fields(TextSettings))


def make_datamodule(
    recipe: AnyRecipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    ranks: Ranks,
    *,
    masking: Masking | None = None,
    counts_padding: bool = False,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_config: PreTrainedConfig | None = None,
    trains: bool = True,
    default_prompt: str = "",
    progress: bool,
) -> DataModule:
    """Read, tokenise and store the data of a recipe, or open what an earlier run stored.

    Args:
        recipe: of either kind.
        tokenizer: of the models.
        config: of the model that is read with first: whether it is told the texts of a pair apart,
            and which token pads.
        ranks: this process among all; every rank calls this.
        masking: replaces tokens of text for a loss that asks what they were.
        counts_padding: whether padded tokens of examples count in the losses' means.
        teacher_tokenizer: of a teacher that reads rows of texts by a tokenizer of its own.
        teacher_config: of that teacher.
        trains: whether anything is trained on; where not, what is held out alone is read, if that
            is data of its own and no weights are those of the rest.
        default_prompt: what stands before texts of rows that have no prompt of their own.
        progress: whether to show bars.

    Raises:
        UserError: data that can't be read, or that other ranks read otherwise.
    """
    by = [(tokenizer, config)]
    if teacher_tokenizer is not None:
        assert teacher_config is not None, "a teacher with a tokenizer has a configuration"
        by.append((teacher_tokenizer, teacher_config))
    made: DataModule
    if recipe.task is not None:
        made = _task_datamodule(
            recipe.task,
            tokenizer,
            config,
            ranks,
            progress=progress,
            counts_padding=counts_padding,
            trains=trains,
        )
    else:
        assert isinstance(recipe, Recipe), "a recipe has data or a task"
        assert recipe.data is not None, "a recipe has data or a task"
        data = text_settings(recipe.data)
        if not trains and data.heldout is not None:
            data = replace(data, train=())
        if recipe.row_form is not None:
            form = recipe.row_form.with_default(default_prompt)
            made = _row_datamodule(recipe, form, data, by, ranks, counts_padding, progress=progress)
        else:
            assert teacher_tokenizer is None, "blocks and examples are read by one tokenizer"
            made = _text_datamodule(data, tokenizer, masking, ranks, progress=progress)
    ranks.require_same(
        partial(_digests, made, [each for each, _ in by]),
        "let every machine see the same files, or copy those of rank 0 to it",
    )
    return made


def _digests(made: DataModule, tokenizers: Sequence[PreTrainedTokenizerBase]) -> dict[str, str]:
    """Digests of all that a rank reads, by what the user knows it as."""
    found = {"tokenizer": " ".join(map(tokenizer_digest, tokenizers))}
    for part, digest in made.digests.items():
        found[f"data ({part})"] = digest
    if isinstance(made, TextDataModule):
        held_out = hashlib.sha256(made.corpus.heldout.numpy().tobytes()).hexdigest()
        found["data (in blocks)"] = f"{made.corpus.fingerprint} {held_out}"
    return found


def text_settings(section: Data) -> TextSettings:
    """The plain counterpart of a section, but for what is of rows alone."""
    return TextSettings(**{name: getattr(section, name) for name in _TEXT_FIELDS})


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


def _text_datamodule(
    data: TextSettings,
    tokenizer: PreTrainedTokenizerBase,
    masking: Masking | None,
    ranks: Ranks,
    *,
    progress: bool,
) -> TextDataModule:
    if data.streaming and data.workers is None:
        data = replace(data, workers=stream_workers(ranks.here))
    corpus = _in_turn(
        ranks,
        lambda first: prepare_corpus(data, tokenizer, build=first, progress=first and progress),
    )
    return TextDataModule(corpus, data.block_size, masking, ranks)


def _row_datamodule(
    recipe: Recipe,
    form: RowForm,
    data: TextSettings,
    by: Sequence[tuple[PreTrainedTokenizerBase, PreTrainedConfig]],
    ranks: Ranks,
    counts_padding: bool,
    *,
    progress: bool,
) -> RowDataModule:
    """Rows as each tokenizer reads them for a model of a configuration, the student's first."""
    own, *teachers = [_encoded_rows(data, form, *one, ranks, progress=progress) for one in by]
    for theirs in teachers:
        own = own.with_teacher(theirs)
    outputs = by[0][1].num_labels if HEADS[recipe.student.head].data == "task" else None
    return RowDataModule(own, data.heldout_blocks, outputs, counts_padding)


def _encoded_rows(
    data: TextSettings,
    form: RowForm,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    ranks: Ranks,
    *,
    progress: bool,
) -> RowSets:
    # where texts stand alone, all types are those that a model takes for granted
    types = form.paired and uses_token_types(config, tokenizer)
    settings = RowSettings(text=data, form=form, token_types=types)
    made = _in_turn(
        ranks,
        lambda first: prepare_rows(settings, tokenizer, build=first, progress=first and progress),
    )
    return made.padded_with(padding_id(config, tokenizer, made.sequences))


def _task_datamodule(
    section: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    ranks: Ranks,
    *,
    progress: bool,
    counts_padding: bool,
    trains: bool,
) -> TaskDataModule:
    task = task_of(section)
    types = uses_token_types(config, tokenizer)

    def encode(examples: ExampleSource, first: bool) -> EncodedExamples:
        form: Form | None = None
        if isinstance(examples, TaggedTexts):
            form = WordForm(examples)
        elif isinstance(examples, Questions):
            form = QuestionForm(examples, section.shared_tokens)
        return encode_examples(
            examples,
            tokenizer,
            max_length=section.max_length,
            token_types=types,
            cache=section.cache,
            build=first,
            progress=first and progress,
            form=form,
        )

    read_split = _READERS[task.labels_of]

    def score(
        first: bool, given: Mapping[str, _Read], whole: _Read | None
    ) -> dict[str, EncodedExamples]:
        found = {}
        for split in given or section.evaluate or task.evaluations:
            scored = given.get(split) or read_split(task, section.source, split, section.cache)
            if first:
                _warn_of_scores(scored, whole)
            found[split] = encode(scored, first)
        return found

    packed = section.padding == "none"
    selects = section.selection is not None and section.selection.scored
    reads_train = trains or selects or section.class_weights == "balanced"

    def prepare(first: bool) -> TaskDataModule:
        if not reads_train:
            evaluations = score(first, {}, None)
            # of what is trained on nothing is asked: some that are scored stand there
            train = next(iter(evaluations.values()))
            weights = _class_weights(section.class_weights, task, train)
            return TaskDataModule(task, train, evaluations, counts_padding, packed, weights)
        whole = read_split(task, section.source, section.train, section.cache)
        read: _Read = whole
        sets: dict[str, _Read] = {}
        if section.selection is not None:
            assert isinstance(whole, Examples), "a recipe selects from texts alone"
            read, part = split_off(whole, section.selection.share)
            sets = {SELECTION: part} if section.selection.scored else {}
        if section.examples is not None:
            assert isinstance(read, Examples), "a recipe takes some of texts alone"
            read = first_of(read, section.examples)
        examples: ExampleSource = read
        if section.augmentation is not None:
            assert isinstance(read, Examples), "a recipe augments texts alone"
            settings = Augmentation(**section.augmentation.model_dump())
            examples = augment(
                read,
                settings,
                tokenizer,
                cache=section.cache,
                device=ranks.device,
                progress=first and progress,
            )
        evaluations = score(first, sets, whole)
        if first:
            _warn_of_classes(read, task)
        encoded = encode(examples, first)
        if section.augmentation is not None and len(encoded) == len(read):
            raise UserError(_nothing_augmented(section.augmentation, len(read)))
        weights = _class_weights(section.class_weights, task, encoded)
        return TaskDataModule(task, encoded, evaluations, counts_padding, packed, weights)

    made = _in_turn(ranks, prepare)
    pad = padding_id(config, tokenizer, made.sets)
    padded = {name: replace(found, pad_id=pad) for name, found in made.evaluations.items()}
    return replace(made, train=replace(made.train, pad_id=pad), evaluations=padded)


_Read = Examples | TaggedTexts | Questions
_READERS: dict[Labels | None, Callable[..., _Read]] = {
    "example": read_examples,
    "token": read_words,
    "span": read_questions,
}
"""By what a label is of, what reads a split."""


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


def _in_turn(ranks: Ranks, prepare: Callable[[bool], T]) -> T:
    """Rank 0 prepares and stores, then the others open what it stored."""
    made: list[T] = []
    ranks.from_main(lambda: made.append(prepare(True)))
    if not ranks.is_main:
        made.append(prepare(False))
    return made[0]
