"""A micro-batch in one CUDA graph: both models, losses and backward without a launch from Python.

Small steps wait for the host, which starts some thousand kernels; a graph starts them all. It is
recorded once a shape of the inputs and reads and writes the same memory at every replay: inputs are
copied in, gradients add up where they stand, and weights of losses are refreshed in place. Torch
moves the state of random numbers on at every replay, so dropout is drawn anew. What Python decides
in a step is decided once, when it is recorded: `Objective.changes_on_host` names what that would
make wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.errors import FOREIGN_ERRORS, UserError, one_line
from fastkd.losses.objective import Objective
from fastkd.types import Inputs

Step = Callable[[Inputs, Tensor], Tensor]
"""Forward and backward of a micro-batch and its scales; what each loss added [2, labels]."""
Replay = Callable[[], Any]
Record = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Makes of a function what replays it, and the tensor that it returns at every replay."""
MOST_SHAPES = 32
"""Shapes that are recorded, those that come first; steps of others run from Python."""
_WARM_UP = 3


class GraphedStep:
    """A step that is recorded the first time inputs of a shape come, and replayed from then on."""

    def __init__(
        self,
        step: Step,
        objective: Objective,
        trained: Iterable[nn.Parameter],
        record: Record | None = None,
    ) -> None:
        """Take down what is to be recorded.

        Args:
            step: adds to the gradients in place.
            objective: whose weights are refreshed.
            trained: parameters, each with a gradient tensor that stays its own.
            record: a `Recorder` where not given.

        Raises:
            UserError: losses that Python changes from step to step.
        """
        reason = objective.changes_on_host
        if reason is not None:
            raise UserError(
                f"train.cuda_graph is on, but {reason}, which a recorded step would repeat; leave "
                "one of them out"
            )
        self._step = step
        self._objective, self._weights = objective, objective.weights
        self._trained = list(trained)
        self._record = record or Recorder(self._trained[0].device)
        self._graphs: dict[object, tuple[Inputs, Tensor, Replay, Tensor]] = {}
        self._weights.hold(torch.zeros((), device=self._trained[0].device))

    def __call__(self, inputs: Inputs, scale: Tensor) -> Tensor:
        """Make a step; what it returns is overwritten by the next one.

        Args:
            inputs: on the device.
            scale: fp32 [DIVISORS], see `Objective.forward`.

        Raises:
            UserError: something in it waits for the GPU.
        """
        key = self._key(inputs)
        if key not in self._graphs:
            if len(self._graphs) == MOST_SHAPES:
                self._weights.refresh()
                return self._step(inputs, scale)
            self._graphs[key] = self._recorded(inputs, scale)
        given, its_scale, replay, parts = self._graphs[key]
        for name, tensor in inputs.items():
            given[name].copy_(tensor, non_blocking=True)
        its_scale.copy_(scale, non_blocking=True)
        self._weights.refresh()
        replay()
        return parts

    def _key(self, inputs: Inputs) -> object:
        """What a graph is of: shapes, and which layers are compared, as no map can be known not to
        move that comes from outside."""
        shapes = tuple((name, *tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        return shapes, self._objective.linked

    def _recorded(self, inputs: Inputs, scale: Tensor) -> tuple[Inputs, Tensor, Replay, Tensor]:
        given, its_scale = {name: t.clone() for name, t in inputs.items()}, scale.clone()
        gradients = [parameter.grad for parameter in self._trained]
        kept = [gradient.clone() for gradient in gradients if gradient is not None]
        self._weights.refresh()
        replay, parts = self._record(lambda: self._step(given, its_scale))
        # what the warm-up added
        for parameter, gradient, before in zip(self._trained, gradients, kept, strict=True):
            assert gradient is not None and parameter.grad is gradient, "gradients stay"
            gradient.copy_(before)
        return given, its_scale, replay, parts


def check_graphs(device: torch.device, *, by_deepspeed: bool, recomputes: bool) -> None:
    """See that steps can be recorded here.

    Args:
        device: of the run.
        by_deepspeed: whether the student stands in its engine.
        recomputes: whether blocks are run again in the backward, with random numbers that Python
            puts back.

    Raises:
        UserError: they can't, and why.
    """
    if device.type != "cuda":
        raise UserError(
            f"train.cuda_graph is on, but this run is on a {device.type.upper()}; take a GPU, or "
            "leave cuda_graph out"
        )
    if recomputes:
        raise UserError(
            "train.cuda_graph and gradient_checkpointing are on, which puts random numbers back in "
            "Python; add train.compile, or leave one of them out"
        )
    if by_deepspeed:
        raise UserError(
            "train.cuda_graph is on, but this run stands in DeepSpeed's engine, which works in "
            "Python between gradients; run one process without a deepspeed section, or leave "
            "cuda_graph out"
        )


class Recorder:
    """Records functions in CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """What replays a function, and the tensor that it returns at every replay.

        Raises:
            UserError: it does something that a graph can't hold.
        """
        # a run that is continued records at another step, and draws what it would have drawn
        with torch.cuda.device(self._device), torch.random.fork_rng([self._device]):
            if self._stream is None:
                # one for all shapes, as libraries keep memory for each; of a priority that no other
                # has, as streams are given out twice, and this one may copy nothing meanwhile
                self._stream = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
            side = self._stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    function()
            torch.cuda.current_stream().wait_stream(side)
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            broke: BaseException | None = None
            # the thread that prepares the next inputs allocates and copies meanwhile
            mode = "thread_local"
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode=mode):
                    try:
                        made = function()
                    except FOREIGN_ERRORS as error:
                        broke = error
                        raise
            except FOREIGN_ERRORS as error:
                # what ends a broken recording says no more than that it is broken, and stops there
                torch.cuda.set_stream(stream)
                reason = broke or error
                if isinstance(reason, torch.OutOfMemoryError):
                    raise reason from None
                raise UserError(
                    f"train.cuda_graph: this step can't be recorded ({type(reason).__name__}: "
                    f"{one_line(reason)}); leave cuda_graph out, in a new process"
                ) from reason
            self._pool = graph.pool()
        return graph.replay, made
