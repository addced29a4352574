"""Run a recipe while no file may grow beyond a limit from the third step on.

Used as `python full_disk_run.py BYTES recipe.yaml overrides...`.
"""

import resource
import sys
from typing import Any

from fastkd import train
from fastkd.cli import main

if __name__ == "__main__":
    limit = int(sys.argv[1])
    original = train.train_step
    calls = 0

    def train_step(*arguments: Any) -> Any:
        global calls
        calls += 1
        if calls == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return original(*arguments)

    train.train_step = train_step
    sys.argv = ["fastkd", "distill", *sys.argv[2:]]
    main()
