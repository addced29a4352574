"""What was measured since the last line of metrics, and the end of a run whose numbers are none."""

from __future__ import annotations

import math
import time
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastkd.data.datamodule import MicroBatches
from fastkd.errors import UserError
from fastkd.layer_map import Progress
from fastkd.training.finite import blame, teacher_fault
from fastkd.training.setup import Run
from fastkd.training.teacher import NoTeacher

SMALLER = "start again with a smaller train.learning_rate, in another run.output"


class Window:
    """Losses since the last line of metrics, kept on the device.

    Args:
        run: which trains.
        micro_batches: what the steps read; where they stand is kept, so that a step can be looked
            at again.
        step: steps that are done.
    """

    def __init__(self, run: Run, micro_batches: MicroBatches, step: int) -> None:
        self.run = run
        self.micro_batches = micro_batches
        self._rate = self._next_rate = self._scheduled_rate()
        self._restart(step)

    def _restart(self, step: int) -> None:
        labels, device = self.run.objective.labels, self.run.ranks.device
        self.sum = torch.zeros(2, len(labels), device=device)
        # the first step of each whose loss was not finite, 0 where all were
        self.broken = torch.zeros(2, len(labels), dtype=torch.int64, device=device)
        self.start = self.step = step
        self.position = self.micro_batches.state_dict()
        self.skipped_before: int = self.run.engine.skipped_steps
        self.time = time.perf_counter()

    @property
    def skipped(self) -> int:
        """Steps that the engine is known to have left out because of their gradient; without a loss
        scale that would shrink after one, none of them comes back. The same on all ranks."""
        skipped: int = self.run.engine.skipped_steps - self.skipped_before
        return skipped

    def add(self, losses: Tensor) -> None:
        """Add the losses of a step whose update is made."""
        self.step += 1
        # by now the schedule stands at the step after
        self._rate, self._next_rate = self._next_rate, self._scheduled_rate()
        self.sum += losses
        fresh = (self.broken == 0) & ~torch.isfinite(losses)
        self.broken.masked_fill_(fresh, self.step)

    def exclude(self, seconds: float) -> None:
        """Leave time that was not spent on steps out of the throughput."""
        self.time += seconds

    def close(self, stop: bool) -> tuple[dict[str, Any], bool]:
        """Means since the last call, over all ranks, and whether any rank wants to stop.

        Raises:
            UserError: a loss, the total or the gradient is not finite, or a step was skipped.
        """
        run, steps = self.run, self.step - self.start
        flag = self.sum.new_tensor([float(stop)])
        *sums, stops = run.ranks.sum(torch.cat([self.sum.flatten(), flag])).tolist()
        # now the device has made all steps
        run.profile.collect()
        labels = run.objective.labels
        means = [value / steps for value in sums]
        losses = dict(zip(labels, means[: len(labels)], strict=True))
        weighted = dict(zip(labels, means[len(labels) :], strict=True))
        total = sum(weighted.values())
        # also brings a `LocalEngine` to know what it has skipped
        norm = run.engine.get_global_grad_norm()
        norm = None if norm is None else float(norm)
        if not all(map(math.isfinite, (*means, total))):
            self._refuse_losses(losses, weighted)
        # DeepSpeed writes -1 where it found no norm
        if self.skipped or (norm is not None and not 0 <= norm < math.inf):
            self._refuse_gradient(weighted)
        counted, each = run.datamodule.counted
        rows = steps * run.recipe.train.batch_size
        record = {
            "loss": total,
            "losses": losses,
            "weighted": weighted,
            "learning_rate": self._rate,
            "gradient_norm": norm,
            f"{counted}_per_second": rows * each / (time.perf_counter() - self.time),
        }
        self._restart(self.step)
        return record, stops > 0

    def _scheduled_rate(self) -> float:
        """The learning rate that the next step is made with, of the student's own groups."""
        return float(self.run.engine.get_lr()[0])

    def _refuse_losses(self, losses: dict[str, float], weighted: dict[str, float]) -> NoReturn:
        step, places = self._first()
        labels = self.run.objective.labels
        if not step and self.skipped:
            # what was skipped comes again, and adds up
            self._refuse_gradient(weighted)
        if step:
            where = f"at step {step}"
        else:
            # each step's part was, and their sum is not
            step, where = self.step, f"between steps {self.start + 1} and {self.step}"
            values = [*losses.values(), *weighted.values()]
            places = [n for n, value in enumerate(values) if not math.isfinite(value)]
        raw = [labels[place] for place in places if place < len(labels)]
        found = raw or [f"weighted {labels[place - len(labels)]}" for place in places]
        name = f"loss {found[0]}" if found else "the total of the losses"
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        fault = self._teacher_at(step)
        remedy = SMALLER if raw else self._lighter(weighted)
        raise UserError(
            f"{name}{more} is not finite {where}: {blame(fault, self.run.teacher, remedy)}"
        )

    def _refuse_gradient(self, weighted: dict[str, float]) -> NoReturn:
        several = self.step > self.start + 1
        where = f"steps {self.start + 1} to {self.step}" if several else f"step {self.step}"
        fault = self._teacher_at(self.step)
        skipped = f", and {self.skipped} of them skipped" if self.skipped else ""
        if self.skipped and not several:
            skipped = ", and the step was skipped"
        raise UserError(
            f"the gradient of {where} is not finite{skipped}, though every loss is: "
            f"{blame(fault, self.run.teacher, self._lighter(weighted))}"
        )

    def _lighter(self, weighted: dict[str, float]) -> str:
        if isinstance(self.run.teacher, NoTeacher):
            return SMALLER
        label = max(weighted, key=lambda key: abs(weighted[key]))
        return (
            f"most of the total is {label} (weighted {weighted[label]:.3g}); give "
            f"losses.{label.split('/')[0]} a smaller weight, in another run.output"
        )

    def _first(self) -> tuple[int, list[int]]:
        """The first step with a broken loss on any rank, and which; 0 where there is none."""
        ranks = self.run.ranks
        shape = ranks.world_size, *self.broken.shape
        mine = torch.zeros(shape, dtype=torch.float64, device=self.broken.device)
        mine[ranks.rank] = self.broken
        steps = ranks.sum(mine)
        if not steps.any():
            return 0, []
        first = int(steps[steps > 0].min())
        return first, (steps == first).any(dim=0).flatten().nonzero().flatten().tolist()

    def _teacher_at(self, step: int) -> str | None:
        """What of the teacher is not finite at a step of the window, which is read again."""
        run, micro_batches = self.run, self.micro_batches
        micro_batches.load_state_dict(self.position)
        for earlier in range(self.start, step - 1):
            micro_batches.next_step(earlier)
        run.objective.at(Progress(step - 1, micro_batches.epoch))
        batches = [run.move(inputs) for inputs in micro_batches.next_step(step - 1)]
        return teacher_fault(run.teacher, batches, run.ranks)
