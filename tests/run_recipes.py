"""Run or resume variants of a recipe one after another in one process: imports are most of a test.

Used as `python run_recipes.py recipe.yaml '[["train.steps=1", ...], ...]'`, also under torchrun.
"""

import json
import sys

from fastkd.console import Reporter
from fastkd.engine import start_ranks, stop_ranks
from fastkd.recipe import load_any_recipe
from fastkd.stages import run_recipe

if __name__ == "__main__":
    ranks = start_ranks()
    for overrides in json.loads(sys.argv[2]):
        recipe = load_any_recipe(sys.argv[1], overrides)
        run_recipe(recipe, ranks, resume=True, reporter=Reporter(silent=not ranks.is_main))
    stop_ranks()
