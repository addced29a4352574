"""A run's folder, held against other processes while a run writes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fastkd.distributed import Ranks
from fastkd.files.lock import held
from fastkd.recipe import AnyRecipe
from fastkd.reporting.console import Reporter
from fastkd.training.run_folder import RunFolder


@contextmanager
def hold_run(
    folder: RunFolder, recipe: AnyRecipe, ranks: Ranks, *, resume: bool, reporter: Reporter
) -> Iterator[dict[str, Any] | None]:
    """Keep other processes out of a run's folder while the context is open; collective.

    Nothing stays of the folder where the run is not claimed meanwhile.

    Args:
        folder: where the recipe writes to.
        recipe: what is to be run there.
        ranks: of which the first one holds the folder.
        resume: whether a run may be there.
        reporter: what the user sees.

    Yields:
        The summary of a run that is finished, else `None`.

    Raises:
        UserError: the folder is taken, in use, or holds a run of another recipe.
    """

    def enter() -> dict[str, Any] | None:
        # a folder that is somebody else's is left as it is, without a lock in it
        folder.check_ours()
        if not stack.enter_context(held(folder.path)):
            reporter.say(
                f"warning: {folder.path} can't be locked; start nothing else that writes it"
            )
        finished = folder.check(recipe, resume=resume)
        folder.tidy()
        return finished

    with ExitStack() as stack:
        finished = ranks.from_main(enter)
        if finished is not None:
            reporter.say(f"{folder.path} is finished; remove it to run again")
        yield finished
