"""One thread at a time records a model: hooks, cuts and heads stand on the model itself.

Recordings of several threads wait for each other. A pass that another thread makes meanwhile, with
nothing to record, would run the model as the recording has it, and is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle

from fastkd.errors import UserError

_PATIENCE = 600.0
"""Seconds that a recording waits for another thread's, which may wait for it in turn."""


@dataclass
class _Hold:
    """Who records a model, and how many recordings that thread has open."""

    thread: int
    guard: RemovableHandle | None
    times: int = 0


_FREED = threading.Condition()
_HOLDS: WeakKeyDictionary[nn.Module, _Hold] = WeakKeyDictionary()


@contextmanager
def alone(model: nn.Module, *, guarded: bool = True) -> Iterator[None]:
    """Let no other thread record a model while the context is open; this one may do so again.

    Args:
        model: to be recorded.
        guarded: whether a pass of another thread is refused; the guard is a hook, which a compiler
            would trace.

    Raises:
        UserError: another thread has recorded it for minutes.
    """
    with _FREED:
        if not _FREED.wait_for(lambda: _is_mine(model), _PATIENCE):
            raise UserError(
                f"{type(model).__name__} has been recorded in another thread for "
                f"{_PATIENCE:.0f} s, and one thread at a time can; close the other `capture`, or "
                "give each thread a copy of the model"
            )
        hold = _HOLDS.get(model)
        if hold is None:
            guard = model.register_forward_pre_hook(_refuse_others) if guarded else None
            hold = _HOLDS[model] = _Hold(threading.get_ident(), guard)
        hold.times += 1
    try:
        yield
    finally:
        with _FREED:
            hold.times -= 1
            if not hold.times:
                if hold.guard is not None:
                    hold.guard.remove()
                _HOLDS.pop(model, None)
                _FREED.notify_all()


def _is_mine(model: nn.Module) -> bool:
    hold = _HOLDS.get(model)
    return hold is None or hold.thread == threading.get_ident()


def _refuse_others(model: nn.Module, _args: object) -> None:
    # a copy that was made meanwhile has the hook, and is nobody's
    if not _is_mine(model):
        raise UserError(
            f"{type(model).__name__} is being recorded in another thread (by `capture`, or by a "
            "Distiller's step), and a pass of this thread would not be the model's own; run one "
            "after the other, or give each thread a copy of the model"
        )
