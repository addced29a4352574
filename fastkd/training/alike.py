"""Whether every rank has read the same models.

What trains is sent to all ranks by rank 0, and so is a teacher in shards. A teacher that stands on
every rank is what each of them found: with another one on a second machine a run would go on, and
end as the student of neither. Numbers are added up as integers, in which no order rounds, at the
speed of memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastkd.distributed import Ranks

# numbers of each weight that are looked at one by one
_SAMPLE = 512
# where a model was found, and by which release it was read
_NOT_ITS_OWN = ("_name_or_path", "transformers_version")


def check_alike(models: Mapping[str, PreTrainedModel], ranks: Ranks) -> None:
    """See that all ranks have read the same models; collective, and nothing on one rank.

    Args:
        models: as they were read, whole and on the CPU, by field of the recipe.
        ranks: this process among all.

    Raises:
        UserError: naming the first model that is another one on a rank than on rank 0.
    """
    ranks.require_same(
        partial(_digests, models),
        "let every machine see the same folder, or copy that of rank 0 to it",
    )


def _digests(models: Mapping[str, PreTrainedModel]) -> dict[str, str]:
    return {name: model_digest(model) for name, model in models.items()}


def model_digest(model: PreTrainedModel) -> str:
    """Digest of the configuration and the weights of a model."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_ITS_OWN}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)} {_sum(weight)}".encode())
    return digest.hexdigest()


def _sum(weight: Tensor) -> str:
    """Sum of the bits of a weight as integers, and some of its numbers as they stand."""
    numbers = weight.detach().flatten()
    sample = numbers[:: max(1, len(numbers) // _SAMPLE)].contiguous().view(torch.uint8).numpy()
    bits = numbers.view(torch.uint8).numpy()
    whole = len(bits) // 8 * 8
    total = bits[:whole].view(np.uint64).sum()
    return f"{total} {bits[whole:].tolist()} {hashlib.sha256(sample.tobytes()).hexdigest()}"
