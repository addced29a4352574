"""Run fastkd in several ranks, each in a folder of its own, as on machines that share none.

Used as `python run_apart.py FOLDER distill recipe.yaml ...`, under a launcher; rank 1 stands in
FOLDER/1.
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    os.chdir(Path(sys.argv.pop(1), os.environ["RANK"]))
    runpy.run_module("fastkd", run_name="__main__")
