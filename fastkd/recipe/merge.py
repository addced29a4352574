"""One mapping laid over another: a recipe over its preset, a stage over its recipe."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

Tree = dict[str, Any]


def laid_over(
    base: Mapping[str, Any], given: Mapping[str, Any], whole: Collection[str] = ()
) -> Tree:
    """What `given` says, and of `base` what it doesn't; sections are merged key by key.

    Args:
        base: is left as it is.
        given: wins.
        whole: keys, at any depth, whose sections take the place of those of `base`.
    """
    merged = dict(base)
    for key, value in given.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and key not in whole:
            merged[key] = laid_over(below, value, whole)
        else:
            merged[key] = value
    return merged
