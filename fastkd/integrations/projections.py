"""What a checkpoint of a `Trainer` holds beside the student: the parameters of the losses."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastkd.errors import UserError
from fastkd.losses.objective import Objective

PROJECTIONS = "projections.safetensors"
_LOSSES, _RATES = "losses", "projection_learning_rates"


def save_projections(folder: Path, objective: Objective) -> None:
    """Write an objective's parameters, and which losses they are of."""
    weights = {k: v.contiguous() for k, v in objective.state_dict().items()}
    save_file(weights, folder / PROJECTIONS, _told(objective))


def read_projections(folder: Path, objective: Objective) -> dict[str, Tensor]:
    """The parameters in a checkpoint, for an objective of the same losses.

    Raises:
        UserError: the checkpoint holds none, or those of other losses.
    """
    path = folder / PROJECTIONS
    if not path.is_file():
        raise UserError(
            f"{folder} holds no {PROJECTIONS}, so it was not written by a distillation "
            "trainer; give one that was, or none"
        )
    with safe_open(path, "pt") as file:
        told = file.metadata() or {}
    kept: dict[str, Tensor] = load_file(path)
    use = "give the same, or begin anew from the checkpoint's model"
    for key, own in _told(objective).items():
        if told.get(key) != own:
            what = key.replace("_", " ")
            raise UserError(
                f"{folder} was written with the {what} {told.get(key, 'none'):.200}, but those "
                f"of the trainer are {own:.200}; {use}"
            )
    found, expected = _shapes(kept), _shapes(objective.state_dict())
    strange = next((n for n in expected | found if expected.get(n) != found.get(n)), None)
    if strange is not None:
        raise UserError(
            f"{folder} was written with another setting of the losses {told[_LOSSES]:.200}: of "
            f"{strange} it has {found.get(strange, 'none')}, where the trainer's losses have "
            f"{expected.get(strange, 'none')}; {use}"
        )
    return kept


def _told(objective: Objective) -> dict[str, str]:
    rates = objective.parameter_rates()
    return {_LOSSES: ", ".join(objective.labels), _RATES: json.dumps(rates, sort_keys=True)}


def _shapes(weights: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in weights.items()}
