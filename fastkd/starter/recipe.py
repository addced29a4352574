"""`fastkd init`: a first recipe for a teacher and some data, with a word about every choice.

What the teacher's folder says of itself decides: an embedding model is matched by what it gives
out, a decoder by its logits, an encoder by what is inside, a classifier of a task by both. Nothing
is loaded but small files, and of text that is here the first rows, which tell its columns.
"""

from __future__ import annotations

import re
import textwrap
from itertools import islice
from typing import Literal

from transformers import PreTrainedConfig

from fastkd.data.tasks import Task, glue_task, read_examples
from fastkd.data.text import TextSettings
from fastkd.data.text.files import Records, Source, TextFile, text_lines
from fastkd.data.text.hub import is_hub_name
from fastkd.data.text.sources import is_here, resolve
from fastkd.errors import UserError, printable
from fastkd.head_spec import HEADS
from fastkd.layer_map import make_layer_map
from fastkd.models import head_of_classes, read_config, resolve_model
from fastkd.models.sentence_folder import list_modules
from fastkd.plugins import load_plugins
from fastkd.recipe.yaml_text import quoted
from fastkd.section import check_place
from fastkd.starter.columns import column_lines
from fastkd.types import Head, ModelSource

Job = Literal["embedding", "decoder", "encoder", "task"]
_DECODER: Head = next(head for head, spec in HEADS.items() if spec.labels == "next_token")

_LOSSES: dict[Job, str] = {
    "embedding": """
      # what the model gives out: its own pooling makes one vector of a text
      embedding_output: {weight: 10}
      # how the texts of a batch lie to each other, and what is inside, may be added:
      # similarity: {weight: 100}
      # hidden: {weight: 10}
    """,
    "decoder": """
      # the next token's probabilities, never stored as logits, and what each layer hands on
      logits: {kind: kl, weight: 1}
      hidden: {kind: cosine, weight: 1}
    """,
    "encoder": """
      # scores of attention, hidden states and embeddings, as TinyBERT matches them; scores have
      # the largest gradient at the start, so the others weigh more
      attention: {kind: score_mse, weight: 1}
      hidden: {weight: 10}
      embedding: {weight: 10}
    """,
    "task": """
      # inside, and the teacher's answers; labels: {weight: 1} would add those of the file
      attention: {kind: score_mse, weight: 1}
      hidden: {weight: 1}
      logits: {kind: KIND, weight: 1}
    """,
}
# tokens of a block or row, where the model reads as many
_LENGTHS: dict[Job, int] = {"embedding": 128, "decoder": 512, "encoder": 128, "task": 128}
# how fast it learns; of five rates 3e-4 or 6e-4 was best for students on GLUE (docs/glue.md)
_RATES: dict[Job, str] = {
    "embedding": "3.0e-4",
    "decoder": "5.0e-4",
    "encoder": "3.0e-4",
    "task": "3.0e-4",
}
# of a text file, among which a document should have ended
_FIRST_LINES = 1000


def first_recipe(teacher: str, data: str, *, layers: int | None, task: str | None) -> str:
    """A recipe as text, with comments.

    Args:
        teacher: folder, hub name or `package:NAME/FOLDER`.
        data: what `data.train` takes, or the folder of the task.
        layers: of the student; half of the teacher's where not given.
        task: name of a task of GLUE that the teacher was tuned on.

    Raises:
        UserError: a teacher that can't be read, is no stack of layers or fits no job, more layers
            than it has, an unknown task, a name that no recipe can hold, or data of this machine
            without what is to be read.
    """
    for field, name in (("teacher", teacher), ("data", data)):
        try:
            check_place(name)
        except ValueError as error:
            raise UserError(f"{field}: {error}") from error
    source = ModelSource(teacher)
    config = read_config(resolve_model(source), f"teacher {teacher}")
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int) or depth < 2 or config.is_encoder_decoder:
        raise UserError(
            f"teacher {teacher}: a {config.model_type} with no single stack of layers; fastkd "
            "distils encoders and decoders"
        )
    if layers is not None and layers > depth:
        raise UserError(f"--layers {layers}, but the teacher has {depth}; give fewer")
    layers = layers or depth // 2
    job = _job(source, config, task)
    copied = ", ".join(map(str, make_layer_map("uniform", layers, depth).sources()))
    head = _HEAD.format(
        teacher=printable(teacher), depth=depth, width=config.hidden_size, layers=layers
    )
    read = _data(job, data, task, _length(job, config))
    body = _BODY.format(
        teacher=quoted(teacher),
        layers=layers,
        copied=copied,
        head=f"\n  head: {_DECODER}" if job == "decoder" else "",
        losses=_losses(job, task),
        data=read,
        rate=_RATES[job],
        output=quoted(f"runs/{_short(teacher)}-{layers}"),
    )
    return head + body


_HEAD = """\
# {teacher} of {depth} layers and width {width}, made smaller: {layers} layers.
#   fastkd doctor FILE      what the run will need, in time and memory
#   fastkd distill FILE     the run; --resume continues it
#   fastkd fields           everything that may stand here
"""
_BODY = """\
teacher:
  model: {teacher}
student:
  # copies of the teacher's layers {copied}; fastkd inspect shows which are alike
  layers: {layers}{head}
# student layer i learns from layer i M / N of the teacher's M
layer_map: uniform
losses:
{losses}
{data}
train:
  # a try: good students take thousands
  steps: 500
  # rows of a step; micro_batch_size cuts it where memory ends, with the same result
  batch_size: 32
  # its peak, after a tenth of the steps
  learning_rate: {rate}
  warmup_share: 0.1
  # of held-out data; beside a line of metrics
  evaluate_every: 100
  # what --resume goes on from after a crash; the newest two are kept
  checkpoint_every: 100
run:
  # student/, summary.json, report.html; never overwritten
  output: {output}
"""


def _job(source: ModelSource, config: PreTrainedConfig, task: str | None) -> Job:
    if task is not None:
        return "task"
    if list_modules(source, "none").modules:
        return "embedding"
    head = head_of_classes(set(config.architectures or ()))
    if HEADS[head].data == "task":
        raise UserError(
            f"teacher {source.name} has a head for {HEADS[head].hub_task}; give --task with its "
            "task of GLUE, or begin with a recipe of recipes/ for another one"
        )
    return "decoder" if head == _DECODER else "encoder"


def _losses(job: Job, task: str | None) -> str:
    text = textwrap.indent(textwrap.dedent(_LOSSES[job]).strip("\n"), "  ").rstrip()
    if task is None:
        return text
    # a score has no probabilities
    return text.replace("KIND", "mse" if glue_task(task).regression else "kl")


def _data(job: Job, data: str, task: str | None, length: int) -> str:
    given = quoted(data)
    if task is not None:
        name = quoted(glue_task(task).name)
        if is_here(data) or not is_hub_name(data):
            _check_task(glue_task(task), data)
        return f"task:\n  name: {name}\n  source: {given}\n  max_length: {length}"
    lines = [f"data:\n  train: {given}"]
    # readers of installed packages may know a format
    load_plugins()
    if is_here(data):
        lines += _columns(data, all_of_them=job == "embedding")
    if job == "embedding":
        lines.append("  # every row, or line, is a text by itself; sentence makes some of prose")
        lines.append(f"  documents: {'sentence' if data == 'python-docs' else 'row'}")
    # more than the default, so that little text has something to be judged by
    lines.append("  heldout_fraction: 0.05")
    lines.append(f"  # tokens that are read together\n  block_size: {length}")
    return "\n".join(lines)


def _check_task(task: Task, source: str) -> None:
    """See that a task's sets can be read."""
    for split in (task.train, *task.evaluations):
        read_examples(task, source, split, TextSettings(train=()).cache)


def _columns(data: str, *, all_of_them: bool) -> list[str]:
    """What a recipe says of the columns of text; nothing of text without any.

    Args:
        data: names files or folders of this machine.
        all_of_them: whether every column with text is read, or one.

    Raises:
        UserError: there is nothing, or no text in the first rows.
    """
    sources = resolve((data,), TextSettings(train=(data,), documents="row"))
    source = sources[0]
    if not isinstance(source, Records):
        if next(source.documents(), None) is None:
            raise UserError(f"{source.called()}: no text in it; give text to learn from")
        if not all_of_them and len(sources) == 1 and _is_one_document(source):
            return ["  # no empty line, which would end a document, is near", "  documents: line"]
        return []
    return column_lines(source, several=all_of_them)


def _is_one_document(source: Source) -> bool:
    """Whether text has several lines and, among its first, no empty one between two of them."""
    if not isinstance(source, TextFile):
        return False
    first = [bool(line.strip()) for line in islice(text_lines(source.path), _FIRST_LINES)]
    filled = "".join("x" if line else " " for line in first).strip()
    return len(filled) > 1 and " " not in filled


def _length(job: Job, config: PreTrainedConfig) -> int:
    longest = getattr(config, "max_position_embeddings", None)
    return min(_LENGTHS[job], longest) if isinstance(longest, int) else _LENGTHS[job]


def _short(teacher: str) -> str:
    """Short name of a teacher: of a package its name, of a folder or hub name the last part."""
    name = teacher.removeprefix("package:").split("/")[0 if teacher.startswith("package:") else -1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100] or "student"
