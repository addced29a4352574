"""Losses and layer maps that a test brings in from outside, for as long as it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastkd.layer_map import registry as map_registry
from fastkd.layer_map import sections
from fastkd.losses import registry


@contextmanager
def registries_apart(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    """What is registered, and imported from `folder`, while this is open is gone after it."""
    registry.loss_names()
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    monkeypatch.setattr(map_registry, "_MAPS", dict(map_registry._MAPS))
    before = dict(sections.MAP_SECTIONS)
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(str(folder))
    yield
    sections.MAP_SECTIONS.clear()
    sections.MAP_SECTIONS.update(before)
    for name in set(sys.modules) - modules:
        path = getattr(sys.modules[name], "__file__", None) or ""
        if path.startswith(str(folder)):
            del sys.modules[name]
