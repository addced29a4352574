"""fastkd inside other people's training loops; each is imported when it is first used.

`DistillationTrainer` is transformers' `Trainer`, `DistillationMixin` what makes one of it, also of
sentence-transformers' `SentenceTransformerTrainer`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastkd.extras import need

if TYPE_CHECKING:
    from fastkd.integrations.trainer import DistillationMixin, DistillationTrainer

__all__ = ["DistillationMixin", "DistillationTrainer"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        need(f"fastkd.integrations.{name}", "trainer")
        return getattr(import_module("fastkd.integrations.trainer"), name)
    raise AttributeError(f"module 'fastkd.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
