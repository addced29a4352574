"""`DistillationTrainer`s under DDP; rank 0 prints what became of them as JSON.

Used under torchrun as `python ddp_trainer.py FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# the tests stand one folder above their helpers
sys.path.append(str(Path(__file__).parents[1]))

from test_integrations import UNREAD, losses_of, student, trainer

from fastkd import UserError


def made(**changes: Any) -> Any:
    return trainer(Path(sys.argv[1]), student(), **{"per_device_train_batch_size": 4, **changes})


def refused(found: Any, step: Any) -> str:
    try:
        step(found)
    except UserError as error:
        return str(error)
    return "nothing"


def main() -> None:
    whole = made()
    whole.train()
    found: dict[str, Any] = {"loss": losses_of(whole)}

    # an evaluation before it, of either kind
    evaluated = made(per_device_eval_batch_size=4)
    evaluated.evaluate()
    evaluated.train()
    found["evaluated"] = losses_of(evaluated)

    recomputed = made(losses=UNREAD, gradient_checkpointing=True)
    recomputed.train()
    found["recomputed"] = losses_of(recomputed)

    bare = made()
    batch = next(iter(bare.get_train_dataloader()))
    found["bare"] = refused(bare, lambda one: one.compute_loss(one.model, batch))
    told = made(losses=UNREAD, ddp_find_unused_parameters=False)
    found["told"] = refused(told, lambda one: one.train())
    if whole.args.process_index == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
