"""`fastkd study`: run a grid or a search over the fields of a recipe, and compare honestly.

A study is a YAML file (`spec`), worked out into conditions and runs (`plan`, `chosen`, with what it
may choose by in `choosing` and seeds in `seeding`), which queue
in SQLite (`storage`) for child processes (`runner`, `worker`, `forks`), with one lock a
piece of work (`locks`). What its runs predicted (`predictions`) becomes intervals and answers to
its hypotheses (`statistics`, `results`, `comparing`), tables, pictures and a report (`tables`,
`plots`, `report`).

It needs the extra `study`. Runs are `fastkd` commands in processes of their own, and are known by
their folders.
"""

from fastkd.study.main import run_study
from fastkd.study.spec import StudySpec, load_study

__all__ = ["StudySpec", "load_study", "run_study"]
