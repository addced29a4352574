"""What a model is worth in numbers that need no losses: titles and values of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Judged = Mapping[str, Any]
"""What an evaluation says besides the losses, as in metrics.jsonl."""
_TITLES = {"perplexity": "perplexity", "pseudo_perplexity": "pseudo-perplexity of masked tokens"}


def score_values(judged: Judged) -> dict[str, str]:
    """Every score of an evaluation by its title, written out; empty of text without any."""
    found: dict[str, float] = {}
    if "score" in judged:
        found["score"] = judged["score"]
        found |= _by_split(judged["scores"], "{}, {}")
        # of classes alone
        found |= _by_split(judged.get("class_f1", {}), "{}, F1 of {}")
    found |= {f"{name}, Spearman": value for name, value in judged.get("pairs", {}).items()}
    found |= judged.get("mteb", {})
    written = {title: f"{value:.4f}" for title, value in found.items()}
    return written | {
        title: f"{judged[key]:,.2f}" for key, title in _TITLES.items() if key in judged
    }


def headline_scores(judged: Judged) -> dict[str, float]:
    """The scores that a run is followed by, the larger the better."""
    task = {"score": judged["score"]} if "score" in judged else {}
    return {**task, **judged.get("pairs", {}), **judged.get("mteb", {})}


def score_table(columns: Mapping[str, Judged]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of a table of scores, what one answer to everything scores first.

    Args:
        columns: evaluations by the head of their column; the last one decides which rows there are.
    """
    *_, last = columns.values()
    baseline = {"one answer": last["baseline"]} if "baseline" in last else {}
    values = {name: score_values(judged) for name, judged in {**baseline, **columns}.items()}
    *_, titles = values.values()
    rows = [(title, *(found.get(title, "-") for found in values.values())) for title in titles]
    return ("", *values), rows


def one_class(judged: Judged) -> str | None:
    """What a model predicts where it is the same for all of a set; `None` where it never is."""
    said = [f"{label} for all of {split}" for split, label in judged.get("one_class", {}).items()]
    return ", ".join(said) or None


def score_parts(judged: Judged) -> list[str]:
    """The scores of an evaluation, for a line of a log."""
    parts = [f"score {judged['score']:.4f}"] if "score" in judged else []
    several = len(judged.get("scores", {})) > 1
    for name, scores in judged.get("scores", {}).items():
        parts += [
            f"{name} {metric} {value:.4f}" if several else f"{metric} {value:.4f}"
            for metric, value in scores.items()
        ]
    for section in ("pairs", "mteb"):
        parts += [f"{name} {value:.4f}" for name, value in judged.get(section, {}).items()]
    parts += [f"{title} {judged[key]:,.2f}" for key, title in _TITLES.items() if key in judged]
    return parts


def _by_split(values: Mapping[str, Mapping[str, float]], title: str) -> dict[str, float]:
    return {
        title.format(split, name): value
        for split, named in values.items()
        for name, value in named.items()
    }
