"""What DeepSpeed saves and loads, in files of ours.

DeepSpeed's engine hands every state that it saves to a checkpoint engine, an object with `save` and
`load`, and restores itself from what that loads. Its own one writes pickles and loads them with
`weights_only=False`: whoever can write to a checkpoint runs code at the next resume. In its place
stands one that writes `states`, which hold tensors and plain values and nothing else.

The road not taken is torch's loader with `weights_only=True` and a list of allowed classes: the
states of DeepSpeed hold objects of its own (loss scalers, slices, configurations), the list would
follow its releases, and a pickle is still an interpreter that runs before anything can be checked.
Gathering the state here, past DeepSpeed's own code, would be a second copy of what it knows about
ZeRO. As it is, what is restored is what DeepSpeed saved, bit for bit, at all stages.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastkd.files.sealed import Written
from fastkd.training.checkpoint.states import (
    SUFFIX,
    Tree,
    read_state,
    write_state,
)

# only tools that convert checkpoints read these
_LEFT_OUT = frozenset(
    {
        "ds_config",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "buffer_names",
        "param_slice_mappings",
        "universal_checkpoint_info",
    }
)
_OPTIMIZER = "optimizer_state_dict"
_SCALER = "loss_scaler"


def use_own_files(engine: Any) -> Any:
    """Let a DeepSpeed engine save to and load from files of ours.

    Returns:
        What stands in place of its checkpoint engine; `written` holds the files of the last save.
    """
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class OwnFiles(CheckpointEngine):  # type: ignore[misc]
        """DeepSpeed's states as files of ours; paths are DeepSpeed's, with our suffix."""

        def __init__(self) -> None:
            super().__init__()
            self.name = "fastkd"
            self.written: dict[str, Written] = {}

        def create(self, info: Any) -> None:
            self.written = {}

        def save(self, state_dict: dict[str, Any], path: str) -> None:
            self.written[Path(path).name] = write_state(Path(path), _plain(state_dict))

        def load(self, path: str, map_location: Any = None) -> Tree:
            return _with_scaler(read_state(Path(path)), engine.optimizer)

        def commit(self, info: Any) -> bool:
            return True

    if getattr(engine.checkpoint_engine, "name", None) != "fastkd":
        engine.checkpoint_engine = OwnFiles()
        for name in ("_get_ckpt_name", "_get_rank_zero_ckpt_name"):
            setattr(engine, name, _with_suffix(getattr(engine, name)))
        # a script that reads pickles
        engine._copy_recovery_script = lambda path: None
    return engine.checkpoint_engine


def _with_suffix(name: Callable[..., str]) -> Callable[..., str]:
    return lambda *args, **options: name(*args, **options).removesuffix(".pt") + SUFFIX


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A state without what is not needed, its loss scaler as numbers."""
    kept = {key: value for key, value in state.items() if key not in _LEFT_OUT}
    inner = kept.get(_OPTIMIZER)
    if isinstance(inner, dict):
        inner = {key: value for key, value in inner.items() if key not in _LEFT_OUT}
        if _SCALER in inner:
            inner[_SCALER] = scaler_numbers(inner[_SCALER])
        kept[_OPTIMIZER] = inner
    return kept


def _with_scaler(state: Tree, optimizer: Any) -> Tree:
    inner = state.get(_OPTIMIZER)
    if isinstance(inner, dict) and _SCALER in inner:
        numbers = inner[_SCALER]
        inner[_SCALER] = optimizer.loss_scaler
        _restore_scaler(optimizer.loss_scaler, numbers)
    return state


def scaler_numbers(scaler: Any) -> dict[str, Any]:
    """The numbers of a loss scaler; its dtype is that of the engine."""
    return {key: value for key, value in vars(scaler).items() if isinstance(value, int | float)}


def _restore_scaler(scaler: Any, numbers: dict[str, Any]) -> None:
    """Put numbers into a loss scaler of the same kind.

    Raises:
        ValueError: it is of another kind.
    """
    there = scaler_numbers(scaler)
    if numbers.keys() != there.keys():
        raise ValueError(f"it has a loss scaler with {', '.join(numbers)}; this run {list(there)}")
    vars(scaler).update(numbers)
