"""The term of the heads: divergence of their outputs, hard labels, masked tokens."""

from __future__ import annotations

import torch
from fastkd_kernels import LogitsHead, logits_divergence
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from fastkd.errors import UserError
from fastkd.objective.divisors import IGNORED
from fastkd.objective.term import Batch, Match, ModelPair, Side, Term
from fastkd.recipe.losses import Losses


class LogitsTerm(Term):
    """`logits`, then `labels` or `mlm`, of a recipe.

    A language model's logits are never stored: both models hand over what their heads multiply,
    and one op makes divergence and cross-entropy from it. Under ZeRO-3 the student's head belongs
    to another module than this one; `fastkd.engine` registers it here, so that it is whole.
    """

    def __init__(self, losses: Losses, pair: ModelPair) -> None:
        super().__init__()
        self.loss = losses.logits
        self.hard = "labels" if losses.labels else "mlm" if losses.mlm else None
        self.pair = pair
        self.is_language_model = pair.head in ("causal_lm", "masked_lm")
        if pair.outputs == 1 and not self.is_language_model:
            _check_regression(losses)
        soft = "rows" if self.is_language_model else "examples"
        matches = [Match("logits", "logits", "", "rows" if soft == "rows" else "examples")]
        if self.hard:
            matches.append(Match(self.hard, self.hard, "", "labels"))
        self.matches = tuple(matches if self.loss else matches[1:])

    def layers(self, side: Side) -> dict[str, set[int]]:
        return {}

    @property
    def wants_logits(self) -> bool:
        return True

    def forward(self, batch: Batch) -> Tensor:
        """Losses [1] or [2], fp32."""
        own = _output(batch.student.logits)
        labels = batch.labels if self.hard else None
        if self.is_language_model:
            return self._divergence(own, batch, labels)
        losses = [self._divergence(own, batch, None)] if self.loss else []
        if labels is not None:
            assert isinstance(own, Tensor)
            losses.append(_hard_loss(own, labels).reshape(1))
        return torch.cat(losses)

    def _divergence(self, own: Tensor | LogitsHead, batch: Batch, labels: Tensor | None) -> Tensor:
        assert self.loss is not None, "the recipe refuses labels of a language model without logits"
        kind = self.loss.kind
        found = logits_divergence(
            own,
            _output(batch.teacher.logits),
            # a recipe's word for the same loss
            kind="cross_entropy" if kind == "soft_ce" else kind,
            temperature=self.loss.temperature,
            scale_by_temperature=self.loss.scale_by_temperature,
            beta=self.loss.beta,
            skew=self.loss.skew,
            mask=batch.mask if self.is_language_model else None,
            labels=labels,
        )
        return found.reshape(1) if isinstance(found, Tensor) else torch.stack(found)


def _output(logits: Tensor | LogitsHead | None) -> Tensor | LogitsHead:
    assert logits is not None, "a model with a head was captured with its logits"
    return logits


def _hard_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of classes, or squared error of one number; a mean over labelled examples."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logits.shape[-1] == 1:
        return mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
    return cross_entropy(logits, labels, ignore_index=IGNORED)


def _check_regression(losses: Losses) -> None:
    if losses.logits is not None and losses.logits.kind != "mse":
        raise UserError(
            f"losses.logits.kind is {losses.logits.kind}, but the models' heads give one number, "
            "which has no probabilities; set it to mse"
        )
