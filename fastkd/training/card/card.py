"""A student's model card: what it is, what it was made of, how it scores, how it is loaded.

It is made of what the run's folder holds and its summary says, so that it says no more than they
do. Paths are replaced by names (`names.py`), the text of others is text, and nothing is longer than
a reader wants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fastkd.errors import printable
from fastkd.files.disk import disk_errors, write_whole
from fastkd.models import model_sources
from fastkd.recipe import AnyRecipe, Recipe, write_yaml
from fastkd.reporting.html import fenced, markdown, markdown_table, shortened
from fastkd.reporting.report import (
    exported_step,
    loss_rows,
    model_heads,
    model_rows,
    score_tables,
)
from fastkd.training.card.licence import Licence, licence_of
from fastkd.training.card.loading import SENTENCES, Loading, loading_of
from fastkd.training.card.names import PublicText, is_path, public_tree
from fastkd.training.environment import environment
from fastkd.training.run_folder import RunFolder
from fastkd.types import Head, ModelSource

CARD_TAG = "fastkd"
"""Tag of every card, by which `fastkd push` knows its own."""
# characters of a line, lines of the recipe, rows of a table
_LINE = 400
_RECIPE = 400
_ROWS = 80


def write_card(
    run: RunFolder,
    recipe: AnyRecipe,
    summary: dict[str, Any],
    digests: Mapping[str, Mapping[str, str]],
) -> None:
    """Write README.md of a run's student, which is there.

    Args:
        run: its folder.
        recipe: with its numbers of steps.
        summary: that the run will have.
        digests: of the files of its models, by field, as in `models.json`.

    Raises:
        UserError: the disk is full.
    """
    with disk_errors(run.student):
        write_whole(run.student / "README.md", str(make_card(run, recipe, summary, digests)))


def make_card(
    run: RunFolder,
    recipe: AnyRecipe,
    summary: dict[str, Any],
    digests: Mapping[str, Mapping[str, str]],
) -> ModelCard:
    """Make the card that `write_card` writes, of the same arguments."""
    head: Head = recipe.student.head if isinstance(recipe, Recipe) else recipe.task.kind
    tree, made_on = recipe.model_dump(mode="json"), environment()
    public, said = public_tree(tree), PublicText(tree)
    sources = model_sources(recipe)
    licences = {field: licence_of(source) for field, source in sources.items()}
    name, loading = said(run.path.resolve().name), loading_of(recipe, head, run.student)
    sections = {
        "": _introduction(public, recipe, made_on),
        "Loading it": _loading(loading),
        "What is not as in its teacher": [f"- {_text(said(note))}" for note in summary["notes"]],
        "Held-out losses": _held_out(summary),
        "Scores": _scores(summary),
        "Size and speed": _size(summary, made_on),
        "Made from": _sources(sources, public, licences, digests),
        "Data": _data(public, summary),
        "Limits": _limits(recipe, summary, said),
        "Recipe": _recipe(public, recipe, summary),
    }
    metadata = _metadata(name, loading, recipe, licences, summary)
    lines = [f"# {_text(name)}"]
    for title, section in sections.items():
        if section:
            lines += [*(["", f"## {title}"] if title else []), "", *section]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def _metadata(
    name: str,
    loading: Loading,
    recipe: AnyRecipe,
    licences: Mapping[str, Licence],
    summary: Mapping[str, Any],
) -> ModelCardData:
    """What the hub reads: only what it can find there."""
    task, library = loading.hub_task, loading.library
    method = "knowledge-distillation" if isinstance(recipe, Recipe) else "fine-tuning"
    texts: Sequence[str] = [] if recipe.task is None else [recipe.task.source]
    if isinstance(recipe, Recipe) and recipe.data is not None:
        texts = recipe.data.train
    known = set(licences.values())
    return ModelCardData(
        base_model=[s.name for s in model_sources(recipe).values() if _is_of_hub(s.name)] or None,
        datasets=[text.partition(":")[0] for text in texts if _is_of_hub(text)] or None,
        library_name=library,
        pipeline_tag=task,
        tags=[CARD_TAG, method, *([SENTENCES] if library == SENTENCES else [])],
        # of several models the one that holds for all
        **(known.pop().metadata() if len(known) == 1 else {}),
        **_results(name, task, recipe, summary),
    )


def _results(
    name: str, hub_task: str, recipe: AnyRecipe, summary: Mapping[str, Any]
) -> dict[str, Any]:
    """Scores of a task as the hub's tables take them."""
    scores = summary["after"].get("scores")
    if not scores or recipe.task is None:
        return {}
    task = _plain(recipe.task.name)
    found = [
        EvalResult(
            task_type=hub_task,
            dataset_type=task,
            dataset_name=task,
            dataset_split=_plain(split),
            metric_type=metric,
            metric_value=value,
        )
        for split, metrics in scores.items()
        for metric, value in metrics.items()
    ]
    return {"model_name": _plain(name), "eval_results": found}


def _introduction(
    public: Mapping[str, Any], recipe: AnyRecipe, made_on: Mapping[str, Any]
) -> list[str]:
    by = f"by fastkd {made_on['packages']['fastkd']}"
    if isinstance(recipe, Recipe):
        given, teacher = public["teacher"], _text(public["teacher"]["model"])
        of = f" of {recipe.student.layers} layers" if recipe.student.layers else ""
        teachers = [teacher, *(_text(other["model"]) for other in given["others"][:_ROWS])]
        return [f"A student{of}, distilled from {', '.join(teachers)} {by}."]
    name, task = _text(public["model"]["name"]), _text(public["task"]["name"])
    return [f"{name}, fine-tuned on {task} {by}."]


def _loading(loading: Loading) -> list[str]:
    """Code that reads it; MODEL is its folder, or where it was pushed to."""
    found = fenced("\n".join(loading.code), "python")
    found += ["", "MODEL is the folder that holds this card, or the repository that it stands in."]
    labels = loading.labels
    if labels:
        more = f", and {len(labels) - _ROWS} more" if len(labels) > _ROWS else ""
        found += ["", f"Labels, in order: {', '.join(map(_text, labels[:_ROWS]))}{more}."]
    return found


def _held_out(summary: dict[str, Any]) -> list[str]:
    rows = loss_rows(summary)
    lines = markdown_table(("term/student-teacher", "before", "after"), rows[:_ROWS])
    if len(rows) > _ROWS:
        lines += ["", f"{len(rows) - _ROWS} more are left out."]
    return lines


def _scores(summary: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for columns, rows in score_tables(summary):
        lines += markdown_table(columns, rows[:_ROWS])
        if len(rows) > _ROWS:
            lines += ["", f"{len(rows) - _ROWS} more are left out."]
    return lines


def _size(summary: dict[str, Any], made_on: Mapping[str, Any]) -> list[str]:
    on = str(made_on["gpu"])
    if summary["peak_memory_of"] == "process":
        on = f"a CPU ({made_on['machine']}), {summary['speed']['threads']} thread(s)"
    packages = [f"{name} {version}" for name, version in made_on["packages"].items()]
    return [
        *markdown_table(("", *model_heads(summary)), model_rows(summary)[:_ROWS]),
        "",
        f"Timed on {_text(on)}: medians of a few passes to the last hidden state, of copies "
        "of one held-out sequence.",
        "",
        f"Made with Python {made_on['python']}, {_text(', '.join(packages))}.",
    ]


def _sources(
    sources: Mapping[str, ModelSource],
    public: Mapping[str, Any],
    licences: Mapping[str, Licence],
    digests: Mapping[str, Mapping[str, str]],
) -> list[str]:
    """Models with their licences, and the digests of what was read of them."""
    lines = []
    for field, source in sources.items():
        revision = f", revision {source.revision}" if source.revision else ""
        licence = licences[field]
        called = " ".join(part for part in (licence.identifier, licence.name, licence.link) if part)
        said = f"licence {called}, as its own card says" if called else "licence unknown"
        lines.append(f"- {field}: {_text(_named(public, field) + revision)}; {_text(said)}")
        files = digests.get(field, {})
        weights = [name for name in files if name.endswith((".safetensors", ".bin"))]
        for name in [*(["commit"] if "commit" in files else []), *weights[:8]]:
            kind = "commit" if name == "commit" else f"sha256 of {name}"
            lines.append(f"  - {_text(kind)}: {_text(files[name])}")
    if any(not licence.identifier for licence in licences.values()):
        lines += ["", "Ask whoever made a model of unknown licence before you hand this one on."]
    return lines


def _named(public: Any, field: str) -> str:
    """What a field that names a model says, as in `model_sources`."""
    for key in field.split("."):
        public = public[int(key) - 1]["model"] if isinstance(public, list) else public[key]
    return str(public)


def _data(public: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    data, task = public.get("data"), public.get("task")
    names: dict[str, Sequence[str]] = {}
    if data is not None:
        names = {"trained on": data["train"], "held out": data.get("heldout") or ["a part of it"]}
    elif task is not None:
        names = {"task": [task["name"]], "from": [task["source"]], "trained on": [task["train"]]}
        names["scored on"] = list(summary["after"].get("scores", {}))
    lines = [f"- {what}: {_text(', '.join(found))}" for what, found in names.items()]
    for what in ("tokens", "examples", "rows"):
        key = f"train_{what}"
        if key in summary:
            lines.append(f"- {summary[key]:,} {what} in {summary['steps']:,} steps")
    kept = exported_step(summary)
    lines += [] if kept is None else [f"- exported: {_text(kept)}"]
    for part, digest in summary.get("data_digests", {}).items():
        lines.append(f"- digest of {_text(part)}: {_text(digest)}")
    return lines


def _limits(recipe: AnyRecipe, summary: Mapping[str, Any], said: PublicText) -> list[str]:
    if recipe.task is not None:
        longest = f"examples of up to {recipe.task.max_length:,} tokens"
    else:
        assert isinstance(recipe, Recipe) and recipe.data is not None, "data or a task"
        kind = "rows of up to" if recipe.data.by_rows else "blocks of"
        longest = f"{kind} {recipe.data.block_size:,} tokens"
    known = "its teacher's" if isinstance(recipe, Recipe) else "those of the model it was made from"
    return [
        f"- It was trained on {longest}; longer ones were not tried.",
        "- It was measured on the held-out data above and nowhere else.",
        f"- Biases and limits are likely {known}.",
        *(f"- Worse than before training: {_text(said(word))}" for word in summary["worse"]),
    ]


def _recipe(public: Mapping[str, Any], recipe: AnyRecipe, summary: Mapping[str, Any]) -> list[str]:
    command = "distill" if isinstance(recipe, Recipe) else "finetune"
    ranks = summary["world_size"]
    start = "fastkd" if ranks == 1 else f"torchrun --nproc-per-node {ranks} -m fastkd"
    lines = write_yaml(public).rstrip().split("\n")
    kept = [shortened(line, _LINE) for line in lines[:_RECIPE]]
    if len(lines) > _RECIPE:
        kept.append(f"# {len(lines) - _RECIPE} more lines are left out")
    return [
        "Every default is written out; files and folders stand by their names alone.",
        "",
        *fenced(f"{start} {command} recipe.yaml", "sh"),
        "",
        *fenced("\n".join(kept), "yaml"),
    ]


def _is_of_hub(name: str) -> bool:
    # of a name on the hub a colon stands behind the slash: before it stands a reader or a scheme
    owner, slash, _ = name.partition("/")
    return bool(slash) and ":" not in owner and not is_path(name)


def _plain(text: str) -> str:
    return printable(shortened(text, _LINE))


def _text(text: str) -> str:
    return markdown(shortened(text, _LINE))
