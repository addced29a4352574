"""fastkd: distil large transformers into small ones by matching what happens inside.

From Python: `distill`, `finetune`, `evaluate` and `inspect_layers` do what the commands of the same
names do; `Distiller` is the loss for a loop of one's own; `fastkd.integrations` has the `Trainer`.
`register_loss`, `register_layer_map` and `register_reader` take in what others write.
Names are loaded when they are first used, so that `import fastkd` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.api import RunResult, distill, evaluate, finetune
    from fastkd.capture import Capture
    from fastkd.data.text import register_reader
    from fastkd.distiller import Distiller
    from fastkd.errors import Interrupted, LostRank, UserError
    from fastkd.layer_map import LayerMap, Link, MapConfig, Progress, register_layer_map
    from fastkd.layer_similarity import inspect_layers
    from fastkd.losses import Batch, Captures, Loss, LossConfig, register_loss
    from fastkd.recipe import FinetuneRecipe, Recipe

    __version__: str

__all__ = [
    "Batch",
    "Capture",
    "Captures",
    "Distiller",
    "FinetuneRecipe",
    "Interrupted",
    "LayerMap",
    "Link",
    "Loss",
    "LossConfig",
    "LostRank",
    "MapConfig",
    "Progress",
    "Recipe",
    "RunResult",
    "UserError",
    "__version__",
    "distill",
    "evaluate",
    "finetune",
    "inspect_layers",
    "register_layer_map",
    "register_loss",
    "register_reader",
]

_MODULES = {
    "fastkd.api": ("RunResult", "distill", "evaluate", "finetune"),
    "fastkd.capture": ("Capture",),
    "fastkd.data.text": ("register_reader",),
    "fastkd.distiller": ("Distiller",),
    "fastkd.errors": ("Interrupted", "LostRank", "UserError"),
    "fastkd.layer_map": ("LayerMap", "Link", "MapConfig", "Progress", "register_layer_map"),
    "fastkd.layer_similarity": ("inspect_layers",),
    "fastkd.losses": ("Batch", "Captures", "Loss", "LossConfig", "register_loss"),
    "fastkd.recipe": ("FinetuneRecipe", "Recipe"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fastkd")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'fastkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
