"""Join the ranks twice in one process, the second time rank 0 later than the others."""

import os
import time

import torch

from fastkd.distributed import joined_ranks

for turn in range(2):
    if turn and os.environ["RANK"] == "0":
        time.sleep(1)
    with joined_ranks() as ranks:
        total = ranks.sum(torch.tensor(ranks.rank + 1.0))
        if ranks.is_main:
            print(f"turn {turn}: {total.item():g}")
