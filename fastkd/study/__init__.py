"""`fastkd study`: run a grid or a search over the fields of a recipe, and compare honestly.

A study is a YAML file (`spec`). It is worked out into conditions and runs (`plan`, `chosen`), queued
in an SQLite storage (`storage`), worked through by child processes (`runner`, `worker`), one lock a
piece of work (`locks`). What its runs predicted (`predictions`, `resampling`) becomes intervals and
answers to its hypotheses (`statistics`, `results`), tables, pictures and a report (`tables`,
`plots`, `report`).

Of the extra `study`: may import Optuna, matplotlib and SciPy, recipes, tasks, `reporting` and
`files`. Runs are `fastkd` commands in processes of their own, and are known by their folders.
"""

from fastkd.study.main import PROGRAM, run_study
from fastkd.study.spec import StudySpec, load_study

__all__ = ["PROGRAM", "StudySpec", "load_study", "run_study"]
