"""The output of any submodule of a model, by its path."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkd.capture.states import Slot
from fastkd.errors import UserError


def find_module(model: PreTrainedModel, path: str) -> nn.Module:
    """The submodule of a path such as `encoder.layer.1.output`.

    Raises:
        UserError: there is none, with paths that are near.
    """
    modules: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if name}
    if path not in modules:
        close = difflib.get_close_matches(path, modules, n=3) or list(modules)[:3]
        raise UserError(
            f"{type(model).__name__} has no module {path!r}; did you mean {' or '.join(close)}?"
        )
    return modules[path]


def module_recorder(slot: Slot, path: str) -> Callable[..., None]:
    """A forward hook that writes what a module gives to a slot; of a tuple the first.

    Raises:
        UserError: when the hook runs: no tensor, or a second call within a pass.
    """

    def hook(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        states = slot.heard
        if states is None:
            return
        given = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(given, Tensor):
            raise UserError(
                f"module {path} ({type(module).__name__}) gives {type(given).__name__}, expected a "
                "tensor; name another module"
            )
        if path in states.modules:
            raise UserError(
                f"module {path} ({type(module).__name__}) is called more than once in a forward "
                "pass, so its output can't be captured; name another module"
            )
        states.modules[path] = given

    return hook
