"""What stands around a run in one process: its ranks, what it says, and what its errors become.

A process is left as it was found: its process group, if it had one, its random numbers, torch's
modes, what its libraries print. A notebook may run one recipe after the other.
"""

from __future__ import annotations

import os
import random
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from fastkd.distributed import Ranks, joined_ranks, lost_ranks, watched_ranks
from fastkd.errors import Interrupted, UserError
from fastkd.files.disk import disk_errors
from fastkd.rank_errors import said_once
from fastkd.recipe import AnyRecipe
from fastkd.reporting.console import Reporter
from fastkd.reporting.encoding import all_names_said
from fastkd.signals import Signalled
from fastkd.training.memory import memory_errors
from fastkd.training.usual_modes import usual_modes

_BUSY = threading.Lock()


@contextmanager
def session(
    recipe: AnyRecipe | None = None, *, quiet: bool = False
) -> Iterator[tuple[Ranks, Reporter]]:
    """Join the ranks and say what goes wrong in one line while the context is open.

    Args:
        recipe: of the run that writes; an evaluation has none.
        quiet: whether to say nothing but warnings.

    Yields:
        This process among all, and what speaks for the first of them.

    Raises:
        UserError: another run is going on in this process; a disk or a memory that is full. Of
            several ranks a `SharedError` where another one says it, else a `RankError`.
        Interrupted: SIGINT came twice, or before the first step.
        LostRank: another rank is gone.
    """
    if not _BUSY.acquire(blocking=False):
        raise UserError(
            "another run of fastkd is going on in this process, and they share its process group "
            "and its random numbers; wait for its end, or start this one in a process of its own"
        )
    try:
        with ExitStack() as stack:
            # outermost: the first rank says its mistake as soon as the others know of it
            meet = stack.enter_context(said_once())
            stack.enter_context(all_names_said())
            stack.enter_context(quietened())
            stack.enter_context(usual_modes())
            ranks = stack.enter_context(joined_ranks())
            meet(ranks)
            # of this rank's GPU, which is chosen by now
            stack.enter_context(kept_random_numbers())
            again = "start all ranks again" + (" with --resume to continue" if recipe else "")
            if recipe is not None:
                stack.enter_context(_stopped())
                stack.enter_context(disk_errors(Path(recipe.run.output)))
            stack.enter_context(lost_ranks(ranks.peers, ranks.rank, again))
            stack.enter_context(watched_ranks(ranks.peers, ranks.rank, again))
            if recipe is not None:
                stack.enter_context(memory_errors(recipe, ranks.device))
            yield ranks, Reporter(silent=quiet or not ranks.is_main)
    finally:
        _BUSY.release()


@contextmanager
def quietened() -> Iterator[None]:
    """Keep libraries' own bars and notices from tearing the run's output apart."""
    wanted = {"TOKENIZERS_PARALLELISM": "false"}
    if not torch.cuda.is_available():
        # DeepSpeed warns where it has to choose, also without ranks
        wanted["DS_ACCELERATOR"] = "cpu"
    added = wanted.keys() - os.environ.keys()
    os.environ.update({name: wanted[name] for name in added})
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed")
            yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _stopped() -> Iterator[None]:
    try:
        yield
    except Signalled as error:
        raise Interrupted(f"stopped by {error}; continue with --resume") from error


@contextmanager
def kept_random_numbers() -> Iterator[None]:
    """Let random numbers go on after the context as if nothing had been drawn in it."""
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
