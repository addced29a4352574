"""The section of a task: examples with labels, in place of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from fastkd.head_spec import HEADS, TASK_HEAD
from fastkd.recipe.models import Attention
from fastkd.recipe.train import RunOutput, Train
from fastkd.section import (
    LONGEST,
    MOST_ROWS,
    CachePlace,
    Name,
    Names,
    Place,
    Places,
    Section,
    Seed,
    short,
)
from fastkd.types import Metric, TaskKind


def _balanced_or_numbers(value: object) -> object:
    numbers = value if isinstance(value, list | tuple) else ()
    right = [isinstance(n, int | float) and n is not True and 0 < n <= 1e9 for n in numbers]
    if value != "balanced" and not (right and all(right)):
        raise ValueError(
            "expected balanced, or a list with a number above 0 for each class (given "
            f"{short(value)})"
        )
    return value


ClassWeights = Annotated[
    Literal["balanced"] | tuple[float, ...], BeforeValidator(_balanced_or_numbers)
]


class TaskColumns(Section):
    """Names of the columns that are read."""

    texts: Names
    """Column of the text, or the two columns of a pair."""
    label: Name
    """Column of the class or score."""


class TaskAugmentation(Section):
    """More training examples by replaced words (TinyBERT, arXiv 1909.10351, Algorithm 1)."""

    copies: int = Field(default=20, ge=1, le=10_000)
    """Copies of an example, at most: N_a of the paper."""
    probability: float = Field(default=0.4, gt=0, le=1)
    """Chance that a word is replaced: p_t of the paper."""
    candidates: int = Field(default=15, ge=1, le=100_000)
    """Words that one is replaced from: K of the paper."""
    source: Literal["masked_model", "neighbours"] = "masked_model"
    """Where words that are a single token take their candidates from."""
    masked_model: Place | None = None
    """Folder or hub name of a masked language model."""
    show_original: bool = False
    """Let that model read the original text behind the masked one, as the official code does."""
    glove: Place | None = None
    """File of word vectors, plain or gzipped."""
    synonyms: Place | None = None
    """File of `word TAB paraphrase`, plain or gzipped, in place of word vectors."""
    seed: Seed = 0
    """Seed of what is replaced by what."""
    batch_size: int = Field(default=64, ge=1, le=MOST_ROWS)
    """Masked texts in one forward pass; decides speed and memory alone."""


class TaskSelection(Section):
    """Training examples that are not trained on, so that recipes are chosen without the sets that
    they are judged by in the end."""

    share: float = Field(gt=0, lt=1)
    """Share of the examples of `train`. A hash of the text decides which, of a pair that of the
    first one: the same in every run, and all examples of a text are on one side."""
    scored: bool = True
    """Whether both models are scored on these examples, as the set `selection`, in place of the
    evaluation splits. Where not they stay out of training all the same: a last run that is scored
    on `dev` then trains on what the chosen one did."""


class TaskData(Section):
    """Texts or pairs of texts with classes or scores, padded to the longest of a batch, or not."""

    name: Name
    """Task of GLUE (CoLA, SST-2, MRPC, QQP, STS-B, MNLI, QNLI, RTE, WNLI), whose columns, labels
    and metrics are known; with `columns` any name."""
    source: Place
    """Folder of the official TSV files, or of CSV, JSON lines or Parquet (.tsv, .csv, .jsonl, also
    with .gz, and .parquet), a saved `datasets` folder, or a hub name such as `nyu-mll/glue`."""
    columns: TaskColumns | None = None
    """Columns of a task that GLUE doesn't have; where not given `tokens` and `tags` of words,
    which hold lists, `question`, `context` and `answers` of questions."""
    kind: TaskKind = TASK_HEAD
    """What is asked of both models: a class or score of a text or pair of texts, a class of each
    word of a text (`token_classification`), whose files may also be those of CoNLL (.conll), or
    which part of a text answers a question (`question_answering`), as in SQuAD."""
    labels: tuple[str, ...] | None = None
    """Every label of such a task as its files spell it, class 0 first."""
    meanings: tuple[Name, ...] | None = None
    """What each of these labels is called by the teacher or a data set, where the labels themselves
    are not, as `[negative, positive]` for 0 and 1."""
    bounds: tuple[float, float] | None = None
    """Smallest and largest score of such a task, in place of labels: a regression."""
    metrics: tuple[Metric, ...] | None = None
    """Metrics of such a task; accuracy, or Pearson's and Spearman's correlation if not given; of
    words `token_accuracy`, before it `entity_f1` where labels are `O`, `B-TYPE` and `I-TYPE`; of
    answers `answer_f1` and `exact_match`. Of words and answers the first one is the score."""
    class_weights: ClassWeights | None = None
    """What the examples of each class count in the mean of `losses.labels`, class 0 first, or
    `balanced`: examples / (classes x examples of the class), so that all classes count alike. Their
    ratios decide; all examples count alike where not given."""
    train: Place = "train"
    """Split that is trained on: its file's name without the ending."""
    evaluate: Places | None = None
    """Splits that both models are scored on; those of GLUE, or `dev`, where not given."""
    max_length: int = Field(default=128, ge=4, le=LONGEST)
    """Tokens of an example, special tokens included; longer ones are cut, the contexts of questions
    into several examples that overlap."""
    stride: int | None = Field(default=None, ge=0, lt=LONGEST)
    """Tokens that examples of one context share; a third of `max_length` where not given."""
    padding: Literal["buckets", "none"] = "buckets"
    """Whether the examples of a micro-batch, which are of similar length, are padded to the longest
    of them, or follow each other in one row without padding: the same losses up to rounding. `none`
    takes models that read such rows as they read padded batches, which is tried before a run."""
    augmentation: TaskAugmentation | None = None
    """How training examples are multiplied; not at all where not given."""
    selection: TaskSelection | None = None
    """Which examples of `train` are kept out of training, of a task of texts; none where not given.
    Those that are trained on are counted and multiplied without them."""
    examples: int | None = Field(default=None, ge=1, le=MOST_ROWS)
    """How many examples of `train` are trained on, at most, of a task of texts: those whose texts
    come first by a hash, whatever the order of the file; all where not given."""
    cache: CachePlace = "~/.cache/fastkd"
    """Folder of tokenised examples, shared by all runs and by all machines of one."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        own = [
            name
            for name in ("labels", "meanings", "bounds", "metrics")
            if getattr(self, name) is not None
        ]
        if self.stride is not None and HEADS[self.kind].labels != "span":
            raise ValueError(
                f"stride is for contexts of questions, but kind is {self.kind}; leave it out"
            )
        if self.kind != TASK_HEAD:
            self._check_kind()
        elif own and self.columns is None:
            raise ValueError(
                f"{own[0]} is given without columns; name the columns of a task of your own, or "
                f"leave {own[0]} out for a task of GLUE"
            )
        if self.evaluate is not None and self.selection is not None and self.selection.scored:
            raise ValueError(
                f"evaluate is {', '.join(self.evaluate)}, but selection.scored is true, so nothing "
                "else is scored; set selection.scored to false, or leave evaluate out"
            )
        if self.class_weights is not None and self.bounds is not None:
            raise ValueError(
                "class_weights and bounds are given, but scores have no classes; leave one of them "
                "out"
            )
        return self

    @property
    def read_columns(self) -> TaskColumns | None:
        """Columns of a task that GLUE doesn't have, those of its kind where none are given."""
        usual = HEADS[self.kind].columns
        if self.columns is not None or usual is None:
            return self.columns
        return TaskColumns(texts=usual[0], label=usual[1])

    @property
    def shared_tokens(self) -> int:
        """Tokens that examples of one context have in common."""
        return self.max_length // 3 if self.stride is None else self.stride

    def _check_kind(self) -> None:
        of_words = HEADS[self.kind].labels == "token"
        if of_words and self.labels is None:
            raise ValueError(
                f"labels: missing; kind is {self.kind}, so give every class of a word, such as "
                "[O, B-PER, I-PER]"
            )
        refused = {
            "labels": not of_words and self.labels is not None,
            "meanings": not of_words and self.meanings is not None,
            "bounds": self.bounds is not None,
            "augmentation": self.augmentation is not None,
            "selection": self.selection is not None,
            "examples": self.examples is not None,
            "class_weights": self.class_weights is not None,
            "padding: none": self.padding == "none",
        }
        for field, given in refused.items():
            if given:
                raise ValueError(
                    f"{field} is for another kind of task, but kind is {self.kind}; leave one of "
                    "them out"
                )


def check_predictions(task: TaskData | None, run: RunOutput) -> None:
    """Refuse predictions of what gives an example no class or score.

    Args:
        task: of the recipe.
        run: likewise.

    Raises:
        ValueError: saying what it is.
    """
    if run.predictions and (task is None or task.kind != TASK_HEAD):
        found = "the recipe has no task" if task is None else f"task.kind is {task.kind}"
        raise ValueError(
            f"run.predictions is true, but {found}; examples of a task of kind {TASK_HEAD} alone "
            "have a class or score each, so set it to false"
        )


def check_padding(task: TaskData | None, train: Train, attention: Mapping[str, Attention]) -> None:
    """Refuse what does not go together with batches that have no padding.

    Args:
        task: of the recipe.
        train: likewise.
        attention: of each model, by its field.

    Raises:
        ValueError: naming it.
    """
    if task is None or task.padding != "none":
        return
    for name, graph in (("compile", train.compile), ("cuda_graph", train.cuda_graph)):
        if graph:
            raise ValueError(
                f"task.padding is none, whose rows have another shape in every step, and "
                f"train.{name} keeps a graph of each; leave one of them out"
            )
    for field, name in attention.items():
        if name in ("eager", "flex_attention"):
            raise ValueError(
                f"task.padding is none, but {field} is {name}, which takes no packed sequences; "
                "set it to sdpa or flash_attention_2, or leave padding out"
            )
