"""What a run writes down, key by key: lines of metrics.jsonl, and summary.json.

The sections here describe what `fastkd.training` writes; a test reads real runs by them, in which
no key may be missing from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from entries import keys_table
from markup import page, prose, section

from fastkd.recipe.fields import Entry, fields_of
from fastkd.section import Section
from fastkd.training.metric_lines import evaluation_of

Scores = dict[str, dict[str, float]]
PATH = "reference/records.md"


class Baseline(Section):
    """What one answer to everything scores."""

    score: float
    """Of the best such answer, as `score`."""
    scores: Scores
    """As `scores`."""


class Judged(Section):
    """What held-out data says of a model besides losses; keys depend on what is read."""

    sentence_cosine: float | None = None
    """Mean cosine of student's and teacher's sentence embeddings; null where they can't be
    compared."""
    blocks: int | None = None
    """Blocks of text that were read."""
    tokens: int | None = None
    """Tokens of those."""
    rows: int | None = None
    """Rows of texts that were read."""
    agreement: dict[str, float] | None = None
    """Of models with a head on rows of texts: `spearman`, `same_first` or `same_class`, and
    `mean_absolute_difference` of both models' outputs."""
    perplexity: float | None = None
    """Of a causal language model."""
    pseudo_perplexity: float | None = None
    """Of the masked tokens of a masked language model."""
    score: float | None = None
    """The one number of a task: the mean over its metrics and sets."""
    scores: Scores | None = None
    """Every metric of a task by set and name."""
    examples: int | None = None
    """Examples of a task that were read."""
    baseline: Baseline | None = None
    """What one answer to everything scores."""
    class_f1: Scores | None = None
    """F1 of each class by set."""
    one_class: dict[str, str] | None = None
    """The class by set, where a model gives all of a set the same one."""
    pairs: dict[str, float] | None = None
    """Of `evaluate.pairs`, Spearman's correlation by name."""
    mteb: dict[str, float] | None = None
    """Of `evaluate.mteb`, the main score by task."""


class Evaluated(Judged):
    """Held-out numbers of the student."""

    losses: dict[str, float]
    """Raw losses by label: the loss, or loss/student layer-teacher layer."""
    total: float
    """Their weighted sum."""


class TrainLine(Section):
    """Means over the steps since the line before, over all ranks."""

    kind: Literal["train"]
    """Which of the three."""
    step: int
    """Optimiser steps that were made."""
    time: str
    """When it was written, UTC, ISO 8601."""
    loss: float
    """Weighted sum of the losses."""
    losses: dict[str, float]
    """Raw losses by label."""
    weighted: dict[str, float]
    """What each adds to the sum."""
    learning_rate: float
    """That the last step was made with."""
    gradient_norm: float | None
    """Of the last step, before clipping; null where the engine has none."""
    tokens_per_second: float | None = None
    """Throughput of blocks of text."""
    rows_per_second: float | None = None
    """Throughput of rows of texts."""
    examples_per_second: float | None = None
    """Throughput of a task."""


class HeldoutLine(Evaluated):
    """An evaluation of the student: before the first step, every `train.evaluate_every`, at the
    end."""

    kind: Literal["heldout"]
    """Which of the three."""
    step: int
    """Optimiser steps that were made."""
    time: str
    """When it was written, UTC, ISO 8601."""


class TeacherLine(Judged):
    """The evaluation of the teacher, once, where it has a score of its own."""

    kind: Literal["teacher"]
    """Which of the three."""
    step: int
    """Optimiser steps that were made."""
    time: str
    """When it was written, UTC, ISO 8601."""


class KeptBest(Section):
    """What `run.keep_best` decided."""

    metric: str
    """Its name."""
    value: float
    """Its best value."""


class Speed(Section):
    """Forward passes to the last hidden state, timed where the run ended."""

    tokens: dict[str, int]
    """Tokens of the sequence that each model reads, without padding."""
    threads: int | None = None
    """Of a CPU."""
    batches: dict[str, dict[str, dict[str, float]]]
    """By number of sequences and model: `milliseconds` of a pass, and `tokens_per_second`."""


class Profile(Section):
    """What `train.profile` measured, of a step."""

    steps: int
    """Steps that it is the mean of."""
    milliseconds: float
    """Of a step."""
    phases: dict[str, dict[str, float]]
    """By name: `milliseconds`, their `share`, what they cost the host and, of several ranks, the
    slowest."""
    memory_bytes: dict[str, int] | None = None
    """By what holds it, where `train.profile` counts memory."""


class Summary(Section):
    """summary.json of a finished run."""

    run: str
    """Its folder."""
    steps: int
    """Optimiser steps that it made."""
    exported_step: int
    """The step whose student was exported."""
    kept_best: KeptBest | None = None
    """Where `run.keep_best` chose it."""
    stopped_early: bool | None = None
    """Whether `train.early_stopping` ended it."""
    train_tokens: int | None = None
    """Tokens of text that it trained on, passes over the same ones counted again."""
    corpus_tokens: int | None = None
    """Tokens of text that there were; null of a stream."""
    train_rows: int | None = None
    """Rows that it trained on."""
    data_rows: int | None = None
    """Rows that there were."""
    train_examples: int | None = None
    """Examples of a task that it trained on."""
    task_examples: int | None = None
    """Examples that there were."""
    data_digests: dict[str, str]
    """Digests of what was read, by part; of pairs and tasks of mteb as well."""
    depths: tuple[int, int] | None
    """Layers of student and teacher; null of a fine-tuning run."""
    layer_map: list[tuple[int, int | str | None]] | None
    """Of each student layer what it learnt from; null of a fine-tuning run."""
    before: Evaluated | None
    """Held-out numbers before the first step; null with `run.lean`."""
    after: Evaluated | None
    """Those of the exported student."""
    worse: list[str]
    """What became worse, in words."""
    teacher: Judged | None = None
    """The teacher's, where it has a score of its own."""
    parameters: dict[str, int]
    """Parameters of student and teacher."""
    notes: list[str]
    """What is not in the exported student as in its teacher, in words."""
    speed: Speed | None = None
    """Latency and throughput of both; not with `run.lean`."""
    peak_memory_bytes: int
    """The most that the first rank held."""
    peak_memory_of: Literal["GPU", "process"]
    """Whose memory that is."""
    world_size: int
    """Ranks."""
    seconds: float
    """That it took, in all processes that worked on it."""
    profile: Profile | None = None
    """With `train.profile`."""
    disk_bytes: dict[str, int]
    """Files of student and teacher that are read of them."""
    stages: list[dict[str, Any]] | None = None
    """The summaries of a recipe's stages, each with its own losses; the whole has the times and
    steps of all, their largest peak of memory, `before` of the first, and all else of the last."""


LINES: dict[str, type[Section]] = {
    "train": TrainLine,
    "heldout": HeldoutLine,
    "teacher": TeacherLine,
}


def read_line(record: dict[str, Any]) -> Section:
    """A line of metrics.jsonl, checked column by column.

    Raises:
        ValidationError: a column that isn't here, or a value of another kind.
    """
    head = {key: value for key, value in record.items() if "/" not in key}
    return LINES[record["kind"]].model_validate(head | evaluation_of(record))


def record_pages() -> Iterator[tuple[str, str]]:
    """The page of what a run writes down."""
    lines = [
        _part(f"metrics.jsonl, kind {kind}", line, _columns(kind, line))
        for kind, line in LINES.items()
    ]
    about = (
        "`metrics.jsonl` has one flat JSON object a line, of three kinds, so that "
        "`pandas.read_json(path, lines=True)` is a table; `*` stands for names of a run, such as "
        "`hidden/1-2`. `run.monitor` gives a tracker the same numbers by the same names. "
        "`summary.json`, an object of objects, is written when a run ends. What does not apply "
        "has no key, or null where the table says so."
    )
    summary = _part("summary.json", Summary, fields_of(Summary))
    yield PATH, page("Files of a run", about, *lines, summary)


def _columns(kind: str, line: type[Section]) -> Iterator[Entry]:
    """The columns of a line: all but the first three are called after its kind."""
    entries = list(fields_of(line))
    for entry in entries:
        key = entry.key.replace(".", "/")
        if entry.takes.startswith("a section"):
            # what is inside it has lines of its own, or names that a run gives
            if any(other.key.startswith(f"{entry.key}.") for other in entries):
                continue
            takes = "text" if entry.key == "one_class" else "a number"
            entry = entry._replace(takes=takes)
            key += "/*"
        named = entry.key in ("kind", "step", "time")
        yield entry._replace(key=key if named else f"{kind}/{key}")


def _part(title: str, root: type[Section], entries: Iterable[Entry]) -> str:
    return section(title, f"{prose(root)}\n\n{keys_table(entries)}")
