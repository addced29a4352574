"""From a recipe's section to what a run reads; the first rank prepares, then the others open."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TypeVar

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fastkd.data.datamodule import DataModule
from fastkd.data.rows import RowSets, RowSettings, prepare_rows
from fastkd.data.rows.datamodule import RowDataModule
from fastkd.data.sequences import uses_token_types
from fastkd.data.tasks import padding_id
from fastkd.data.tasks.datamodule import TaskDataModule
from fastkd.data.tasks.prepare import prepare_task, task_of
from fastkd.data.text import TextSettings, prepare_corpus
from fastkd.data.text.cache import tokenizer_digest
from fastkd.data.text.datamodule import TextDataModule
from fastkd.data.text.mlm import Masking
from fastkd.data.text.tokenize import stream_workers
from fastkd.distributed import Ranks
from fastkd.head_spec import HEADS
from fastkd.recipe import AnyRecipe, Data, Recipe, TaskData
from fastkd.row_form import RowForm

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
    readers = [(tokenizer, config)]
    if teacher_tokenizer is not None:
        assert teacher_config is not None, "a teacher with a tokenizer has a configuration"
        readers.append((teacher_tokenizer, teacher_config))
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
            made = _row_datamodule(
                recipe, form, data, readers, ranks, counts_padding, progress=progress
            )
        else:
            assert teacher_tokenizer is None, "blocks and examples are read by one tokenizer"
            made = _text_datamodule(data, tokenizer, masking, ranks, progress=progress)
    ranks.require_same(
        partial(_digests, made, [each for each, _ in readers]),
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
    readers: Sequence[tuple[PreTrainedTokenizerBase, PreTrainedConfig]],
    ranks: Ranks,
    counts_padding: bool,
    *,
    progress: bool,
) -> RowDataModule:
    """Rows as each tokenizer reads them for a model of a configuration, the student's first."""
    own, *teachers = [_encoded_rows(data, form, *one, ranks, progress=progress) for one in readers]
    for theirs in teachers:
        own = own.with_teacher(theirs)
    outputs = readers[0][1].num_labels if HEADS[recipe.student.head].data == "task" else None
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
    made = _in_turn(
        ranks,
        lambda first: prepare_task(
            section,
            task,
            tokenizer,
            token_types=types,
            counts_padding=counts_padding,
            trains=trains,
            device=ranks.device,
            build=first,
            progress=first and progress,
        ),
    )
    pad = padding_id(config, tokenizer, made.sets)
    padded = {name: replace(found, pad_id=pad) for name, found in made.evaluations.items()}
    return replace(made, train=replace(made.train, pad_id=pad), evaluations=padded)


def _in_turn(ranks: Ranks, prepare: Callable[[bool], T]) -> T:
    """Rank 0 prepares and stores, then the others open what it stored."""
    made: list[T] = []
    ranks.from_main(lambda: made.append(prepare(True)))
    return ranks.on_each(lambda: made[0] if made else prepare(False))
