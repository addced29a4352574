"""What `losses.logits`, `losses.labels` and `losses.mlm` share: one call for what a head gives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from fastkd_kernels import LogitsHead
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastkd.errors import UserError
from fastkd.head_spec import HEADS
from fastkd.layer_map import LayerMap
from fastkd.losses.base import Batch, Captures, Loss, LossConfig, LossGroup, Setting, Shared
from fastkd.losses.counts import Divisor
from fastkd.types import IGNORE_INDEX, Head

if TYPE_CHECKING:
    from fastkd.capture import Capture

Output = Tensor | LogitsHead
# finite at every temperature, and far below any logit
_NEVER = -1e6


class HeadGroup(LossGroup):
    """Divergences of what two heads give, then the loss of hard labels.

    Tokens that are classified are compared where they have a label, which is at the first of each
    word; those of a causal language model, where a batch has labels, where the next one is no -100.
    First and last tokens of spans are two distributions over the tokens of an example.

    A language model's logits are never stored: both models hand over what their heads multiply,
    and one op makes divergence and cross-entropy from it. Under ZeRO-3 the student's head belongs
    to another module than this one; `fastkd.training.engine` registers it here, and it is whole.
    """

    def __init__(self, members: Sequence[Loss], shared: Shared) -> None:
        super().__init__(members, shared)
        self.soft = [loss for loss in members if isinstance(loss, SoftLoss)]
        self.is_hard = any(isinstance(loss, HardLoss) for loss in members)

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """Losses [matches], fp32."""
        logits = _output(student)
        labels = batch.labels if self.is_hard else None
        if HEADS[self.shared.pair.head].language_model:
            return self._of_language_models(logits, _output(teacher), batch.predicted, labels)
        mask, spans = self._counted(batch), HEADS[self.shared.pair.head].labels == "span"
        losses = []
        for loss in self.soft:
            own, target = logits, _output(teacher)
            if spans:
                own, target = (over_tokens(of, batch.mask, raw=loss.raw) for of in (own, target))
            losses.append(_vector(loss.divergence(own, target, mask, None)))
        if labels is not None:
            assert isinstance(logits, Tensor)
            given = over_tokens(logits, batch.mask, raw=False) if spans else logits
            losses.append(_hard_loss(given, labels, batch.label_weights).reshape(1))
        return torch.cat(losses)

    def _counted(self, batch: Batch) -> Tensor | None:
        """Which rows of the logits count, bool of their shape without classes; `None`: all."""
        if not labels_count(self.shared.pair.head):
            return None
        assert batch.labels is not None, "where labels say which tokens count, they are given"
        return batch.labels != IGNORE_INDEX

    def _of_language_models(
        self, student: Output, teacher: Output, mask: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        first, *rest = self.soft
        found = _vector(first.divergence(student, teacher, mask, labels))
        if not rest:
            return found
        others = [_vector(loss.divergence(student, teacher, mask, None)) for loss in rest]
        return torch.cat([found[:1], *others, found[1:]])


class HeadLoss(Loss):
    """A member of a `HeadGroup`."""

    captures = Captures(logits=True)
    group: type[LossGroup] | None = HeadGroup

    @classmethod
    def reads_labels(cls, head: Head) -> bool:
        """Whether it reads the labels of a batch, of models that have a head."""
        return labels_count(head) or HEADS[head].labels == "next_token"


class SoftLoss(HeadLoss):
    """A loss of the teacher's logits."""

    @property
    def raw(self) -> bool:
        """Whether it compares logits as they are, a mean over classes, and no probabilities."""
        return False

    @abstractmethod
    def divergence(
        self, student: Output, teacher: Output, mask: Tensor | None, labels: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, fp32; with labels of a language model also their cross-entropy."""


class HardLoss(HeadLoss):
    """A loss of labels, which a language model's op computes together with the divergence."""

    mean_over: Divisor = "labels"
    once: ClassVar[bool] = True

    def __init__(
        self, name: str, config: LossConfig, layer_map: LayerMap | None, shared: Shared
    ) -> None:
        super().__init__(name, config, layer_map, shared)
        problem = shared.pair.no_classes[0]
        if problem is not None:
            raise UserError(
                f"losses.{name} learns one class, or one number, an example, but the problem_type "
                f"of the student's head is {problem}; leave losses.{name} out"
            )

    @classmethod
    def reads_labels(cls, head: Head) -> bool:
        return True

    @classmethod
    def check_setting(cls, name: str, config: LossConfig, setting: Setting) -> None:
        super().check_setting(name, config, setting)
        if HEADS[setting.head].language_model and "logits" not in setting.losses:
            raise ValueError(
                f"losses.{name} of a {setting.head} head is computed together with losses.logits, "
                "which is off; switch it on, with weight 0 where it should not count"
            )


def labels_count(head: Head) -> bool:
    """Whether what a head gives is compared where there is a label, and nowhere else."""
    return HEADS[head].labels == "token"


def over_tokens(logits: Output, mask: Tensor | None, *, raw: bool) -> Tensor:
    """Logits [batch, tokens, 2] of first and last tokens as distributions, [batch, 2, tokens].

    Padding has no probability; `raw` logits are 0 there, and weighted so that their mean square
    over all places is that over the tokens.
    """
    assert isinstance(logits, Tensor)
    found = logits.mT.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is None:
        return found
    shown = mask[:, None]
    if not raw:
        return found.masked_fill(~shown, _NEVER)
    share = shown.sum(dim=-1, keepdim=True).clamp(min=1) / mask.shape[1]
    return found.masked_fill(~shown, 0.0) / share.to(found.dtype).sqrt()


def _output(captured: Capture) -> Output:
    assert captured.logits is not None, "a model with a head was captured with its logits"
    return captured.logits


def _vector(found: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return found.reshape(1) if isinstance(found, Tensor) else torch.stack(found)


def _hard_loss(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Cross-entropy of classes, perhaps weighted, or squared error of one number; a mean over
    labels of examples, tokens or spans, of which a micro-batch may have none."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.ndim == 1 and logits.shape[-1] == 1:
        losses = (logits.squeeze(-1) - labels.to(logits.dtype)).square()
    else:
        losses = cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
    counted = (labels.flatten() != IGNORE_INDEX).to(logits.dtype)
    if weights is not None:
        # each as its example, or its token, counts
        counted = counted * weights.flatten().to(logits.dtype)
    return (losses * counted).sum() / counted.sum().clamp(min=torch.finfo(logits.dtype).tiny)
