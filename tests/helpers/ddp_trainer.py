"""A `DistillationTrainer` under DDP; rank 0 prints its losses as JSON.

Used under torchrun as `python ddp_trainer.py FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# the tests stand one folder above their helpers
sys.path.append(str(Path(__file__).parents[1]))

from test_integrations import losses_of, student, trainer

if __name__ == "__main__":
    made = trainer(Path(sys.argv[1]), student(), per_device_train_batch_size=4)
    made.train()
    if made.args.process_index == 0:
        print(json.dumps({"loss": losses_of(made)}))
