"""The pooler that a student without a head is handed on with.

No loss reads a pooler, so none is trained and none is in the engine, where the optimiser would
decay it. But `AutoModel` builds one for BERT and its kin whatever the folder holds, and fills it at
random where its weights are missing: `pooler_output` would be noise, another one at every load.
There is no setting in a configuration that leaves it out. So it is added when the student is
written: the teacher's, unchanged, where the widths agree, because the student learns to give the
states that it was trained on; else one that passes the first token's state on, tanh(1 h + 0). The
configuration says so (`fastkd_pooler`), and a run with a head that starts from such a student takes
its own teacher's pooler, as if there were none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.models import POOLER_MARK, set_aside_pooler


def pooler_to_add(student: PreTrainedModel) -> tuple[str, dict[str, Tensor]]:
    """Where the pooler is from, `teacher` or `identity`, and its weights by the student's names.

    Both are empty for a model that has its pooler, or whose class has none.
    """
    aside = set_aside_pooler(student)
    if aside is None or not aside.weights:
        return "", {}
    width = student.config.hidden_size
    if aside.trained and all(w.shape[-1] == width for w in aside.weights.values()):
        return "teacher", _named(aside.weights, student)
    # one layer from a state to a state
    matrices = [name for name, weight in aside.weights.items() if weight.ndim == 2]
    assert len(matrices) == 1, "a pooler of another form is not set aside"
    made = {
        name: torch.eye(width) if weight.ndim == 2 else torch.zeros(width)
        for name, weight in aside.weights.items()
    }
    return "identity", _named(made, student)


def pooler_note(student: PreTrainedModel) -> list[str]:
    """What the user must know of the pooler."""
    origin, _ = pooler_to_add(student)
    if not origin:
        return []
    whole = student.dtype == torch.float32
    what = {
        "teacher": f"is the teacher's, {'unchanged' if whole else 'rounded as the student is'}",
        "identity": "passes the first token's state on",
    }
    return [f"pooler of the student (pooler_output): not trained, it {what[origin]}"]


def mark_pooler(student: PreTrainedModel, origin: str) -> None:
    """Write into a configuration where its pooler is from; nothing of one that was trained."""
    vars(student.config).pop(POOLER_MARK, None)
    if origin:
        setattr(student.config, POOLER_MARK, origin)


def _named(weights: Mapping[str, Tensor], student: PreTrainedModel) -> dict[str, Tensor]:
    # in the precision that the student's configuration names
    return {f"pooler.{name}": w.detach().to("cpu", student.dtype) for name, w in weights.items()}
