"""A page for each loss: what it compares, its section of a recipe, what it asks for and refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from entries import fields_table, recipe_fields
from markup import bullets, code, line, page, prose, section, table
from messages import refusals

from fastkd.head_spec import HEADS
from fastkd.losses.base import Loss, LossConfig, LossGroup
from fastkd.losses.registry import BUILT_IN, loss_class
from fastkd.recipe.merge import Tree
from fastkd.recipe.presets import PRESETS

FOLDER = "reference/losses"
_CAPTURES = {
    "attention": "queries and keys of the mapped layers' attention",
    "hidden": "states of the mapped layers",
    "logits": "what the models' heads give",
    "outputs": "states after the final norm",
}
_MEANS = {
    "pairs": "query-key pairs",
    "tokens": "tokens",
    "rows": "tokens that are no padding",
    "examples": "sequences",
    "labels": "labels",
}


def loss_pages() -> Iterator[tuple[str, str]]:
    """Path and text of the index and of every loss of fastkd."""
    rows = [
        (f"[`{name}`]({name}.md)", line(prose(loss_class(name))), presets_link(with_loss(name)))
        for name in BUILT_IN
    ]
    yield (
        f"{FOLDER}/index.md",
        page(
            "Losses",
            "What `losses` of a recipe may name. Each has a `weight`, a `schedule` and options, "
            "and is logged apart, raw and weighted; a loss may stand several times, under names of "
            "your own, as in `low: {loss: hidden}`. [A loss of your own](../../extend/loss.md) is "
            "a class in a file. Some fit few models: [every family and what it "
            "allows](../../../benchmarks/results/families.md).",
            table(("loss", "what is compared", "presets"), rows),
            section("Fields that all have", fields_table(recipe_fields(), "losses.*.")),
        ),
    )
    for name in BUILT_IN:
        yield f"{FOLDER}/{name}.md", _page_of(name, loss_class(name))


def with_loss(name: str) -> list[str]:
    """The presets that a loss is part of."""
    return presets_with(lambda tree: name in tree.get("losses", {}))


def presets_with(chosen: Callable[[Tree], bool]) -> list[str]:
    """The presets whose sections of a recipe are chosen."""
    return [name for name, preset in PRESETS.items() if chosen(preset())]


def presets_link(names: list[str]) -> str:
    """Links to presets, seen from a page beside the index of losses or layer maps."""
    return ", ".join(f"[`{name}`](../presets.md#{name})" for name in names)


def _page_of(name: str, loss: type[Loss]) -> str:
    names = {
        **dict.fromkeys(("name", "self.name", "loss.name"), name),
        "setting.field": "student.head",
        "' or '.join(cls.heads)": " or ".join(loss.heads),
    }
    said = refusals(_sources(loss), names)
    return page(
        f"`{name}`",
        prose(loss),
        section(
            "Fields",
            "Beside those that [all losses have](index.md#fields-that-all-have):\n\n"
            + (fields_table(recipe_fields(), f"losses.{name}.") or "none."),
        ),
        section("Presets", presets_link(with_loss(name))),
        section("What it needs", bullets(_needs(loss))),
        section(
            "What refuses it",
            "Each is one line before a run begins; … stands for what depends on the recipe."
            f"\n\n{bullets(map(code, said))}"
            if said
            else "",
        ),
    )


def _needs(loss: type[Loss]) -> Iterator[str]:
    if set(loss.heads) != set(HEADS):
        yield f"Models with a head: {', '.join(map(code, loss.heads))} (`student.head`)."
    reads = [text for field, text in _CAPTURES.items() if getattr(loss.captures, field)]
    if loss.captures.hidden and not loss.is_mapped():
        reads = ["what enters the first block"]
    if loss.captures.attention and loss.captures.values:
        reads.append("values of the same")
    yield f"Of both models it reads {' and '.join(reads)}."
    same = [head for head in loss.heads if loss.compares_tokens(head)]
    if len(same) == len(loss.heads):
        yield "Both models read the same tokens: they share a tokenizer."
    elif same:
        yield f"With a head {' or '.join(map(code, same))} both models share a tokenizer."
    else:
        yield "The models may have tokenizers of their own (`data.documents: row`)."
    if loss.is_mapped():
        yield "A [layer map](../maps/index.md): the recipe's, or one of its own."
    if loss.least_rows != 1:
        yield "It compares the rows of a step with each other, of all micro-batches and ranks."
    elif isinstance(loss.mean_over, str):
        yield f"It is a mean over the {_MEANS[loss.mean_over]} of a step, however that is cut."
    if loss.official_kind is not None:
        yield f"`losses.reduction: tinybert` is defined for `kind: {loss.official_kind}` alone."
    if loss.once:
        yield "A recipe can have it once."


def _sources(loss: type[Loss]) -> Iterator[object]:
    """What may refuse a loss: its section, itself and what computes it, without what all share."""
    classes = [*loss.Config.__mro__, *loss.__mro__]
    if loss.group is not None:
        classes += loss.group.__mro__
    shared = {*Loss.__mro__, *LossGroup.__mro__, *LossConfig.__mro__}
    yield from (one for one in dict.fromkeys(classes) if one not in shared)
    if set(loss.heads) != set(HEADS):
        yield Loss.check_setting
