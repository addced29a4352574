"""Run a recipe and press Ctrl-C in its third step: `python interrupted_run.py recipe.yaml ...`"""

import os
import signal
import sys
from typing import Any

from fastkd import train
from fastkd.cli import main

if __name__ == "__main__":
    original = train.train_step
    calls = 0

    def train_step(*arguments: Any) -> Any:
        global calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    train.train_step = train_step
    sys.argv = ["fastkd", "distill", *sys.argv[1:]]
    main()
