"""Capture of a model that `torch.compile` compiles.

A hook that writes into a container is a side effect to the compiler: it is traced with the pass
that it stood in, and one that came later is never called. So the hooks stand before anything is
traced, and what they record is what the compiled function returns: model and hooks are one graph,
without a break. Losses and gradients are those of an eager pass up to rounding.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import FunctionType
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from fastkd.capture.alone import alone
from fastkd.capture.recording import hooks
from fastkd.capture.states import Capture, Slot, missing
from fastkd.errors import UserError, one_line

BACKEND = "inductor"
_numbers = itertools.count()


class CompiledCapture:
    """What `capture` records of a model's passes, with those compiled as wholes.

        recorded = CompiledCapture(model, {"attention": {1, 2}, "hidden": {2}})
        with recorded:                       # the hooks stand
            states = recorded({"input_ids": ids, "attention_mask": mask})

    The context may be entered many times, and nothing is compiled anew for it. Shapes that change
    are compiled twice or three times and are symbols then, as `torch.compile` has it. Outside of
    its passes the model runs eagerly, as it is.
    """

    def __init__(self, model: PreTrainedModel, wanted: Mapping[str, Any]) -> None:
        """Take down what is to be compiled.

        Args:
            model: as `capture` takes it, whole on one device.
            wanted: further keyword arguments of `capture`.

        Raises:
            UserError: no compiler of C++ or C on this machine, or the model is compiled already.
        """
        check_not_compiled(model)
        check_compiler(model.device)
        self.model = model
        self._wanted = {
            "attention": wanted.get("attention", ()),
            "hidden": wanted.get("hidden", ()),
            "logits": wanted.get("logits", False),
            "outputs": wanted.get("outputs", False),
            "modules": wanted.get("modules", ()),
        }
        self._slot = Slot()
        self._stack = ExitStack()
        name = f"{type(model).__name__}_pass_{next(_numbers)}"
        self._run = torch.compile(_own(_record, name), fullgraph=True, backend=BACKEND)

    def open(self) -> Self:
        """Let the hooks stand, as on entering the context."""
        with alone(self.model, guarded=False):
            self._stack.enter_context(hooks(self.model, self._slot, **self._wanted))
        return self

    def close(self) -> None:
        """Take them away, as on leaving it."""
        with alone(self.model, guarded=False):
            self._stack.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def __call__(
        self, inputs: Mapping[str, Any], wanted: Mapping[str, Any] | None = None
    ) -> Capture:
        """Run the model and give what was recorded.

        Args:
            inputs: its keyword arguments, and those of `capture_keywords`.
            wanted: what must have been recorded; all that was asked for where not given.

        Raises:
            UserError: the compiler can't take the model as one graph, or a wanted layer left
                nothing.
        """
        from torch._dynamo.config import patch
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        name = type(self.model).__name__
        try:
            # blocks that are recomputed write to no slot the second time
            skips = patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
            with alone(self.model, guarded=False), skips:
                found = self._run(self.model, self._slot, dict(inputs))
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            raise UserError(
                f"{name} can't be compiled as a whole ({type(error).__name__}: {one_line(error)}); "
                "leave compile out"
            ) from error
        finally:
            self._slot.states = None
        states = Capture(*found)
        gone = missing(states, self._wanted if wanted is None else wanted)
        if gone:
            raise UserError(
                f"{name}: {', '.join(gone)} can't be captured of the compiled model; leave "
                "compile out"
            )
        return states


def _record(model: PreTrainedModel, slot: Slot, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """One pass; what it left, as `Capture` takes it."""
    states = slot.states = Capture()
    model(**inputs)
    slot.states = None
    return states.attention, states.hidden, states.logits, states.outputs, states.modules


def _own(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function of the same code that is its own to the compiler, which counts the graphs of a
    piece of code and remembers which of its sizes have changed."""
    code = function.__code__.replace(co_name=name)
    return FunctionType(code, function.__globals__, name)


def check_compiler(device: torch.device) -> None:
    """See that what `torch.compile` makes for a device can be built here: C++ for CPUs, and what
    loads Triton's kernels in C.

    Raises:
        UserError: there is no compiler, and what to install.
    """
    on_cpu = device.type == "cpu"
    variable = "CXX" if on_cpu else "CC"
    named = os.environ.get(variable)
    programs = [named] if named else ["g++"] if on_cpu else ["gcc", "clang"]
    if BACKEND == "inductor" and not any(map(shutil.which, programs)):
        raise UserError(
            f"compile: torch.compile needs {'g++' if on_cpu else 'gcc'}, and there is no "
            f"{' or '.join(programs)}; install it (apt install g++), name a compiler in "
            f"{variable}, or leave compile out"
        )


def check_not_compiled(model: PreTrainedModel) -> None:
    """See that a model and its parts run as they were written.

    Raises:
        UserError: `compile()` was called on one of them.
    """
    for path, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            where = f" ({path})" if path else ""
            raise UserError(
                f"{type(model).__name__} is compiled{where}, and hooks that come later are not "
                "called; give it as it was before compile(), and let fastkd compile it"
            )
