"""What is matched: losses, and how they add up.

A loss is one file that registers itself; `BUILT_IN` in `registry.py` names them. In it stand the
section of a recipe (`Config`), what is captured (`captures`), what a value is a mean over
(`mean_over`), and the computation: `forward`, or a group that computes several losses in one call
(`states.py`, `heads.py`, `embeddings.py`). `base.py` has the types, `registry.py` finds a loss by
name, `objective.py` adds all of them up and knows none by name, `factory.py` makes it for two
models, `counts.py` counts what values are means over, `step_weights.py` has what each loss is
multiplied with, `weighting.py`, `temperature.py` and `transports.py` move factors, `comparable.py`,
`relation_heads.py`, `pooling.py` and `pairs.py` are what several losses share, `gathering.py` what
losses need that compare all rows of a step with each other, `term_errors.py` names the losses of
what goes wrong.

A recipe is read by the losses that it names, so their files take of `capture` types alone and load
no transformers.
"""

from fastkd.losses.base import (
    Batch,
    Captures,
    Loss,
    LossConfig,
    LossGroup,
    LossInfo,
    ModelPair,
    Shared,
    Term,
)
from fastkd.losses.counts import (
    DIVISORS,
    count_divisors,
    target_labels,
)
from fastkd.losses.registry import register_loss
from fastkd.losses.relation_heads import check_relation_heads
from fastkd.types import model_inputs

__all__ = [
    "DIVISORS",
    "Batch",
    "Captures",
    "Loss",
    "LossConfig",
    "LossGroup",
    "LossInfo",
    "ModelPair",
    "Shared",
    "Term",
    "check_relation_heads",
    "count_divisors",
    "model_inputs",
    "register_loss",
    "target_labels",
]
