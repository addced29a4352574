"""`fastkd study`: run a grid or a search over the fields of a recipe, and compare honestly.

A study is a YAML file (`spec`). It is worked out into conditions and runs (`plan`), queued in an
SQLite storage (`store`), worked through by child processes (`runner`, `child`), one claim a piece
of work (`claims`), and ends in tables with paired tests (`compare`, `results`, `tables`),
pictures and a report (`plots`, `page`).
"""

from fastkd.study.main import PROGRAM, run_study
from fastkd.study.spec import StudySpec, load_study

__all__ = ["PROGRAM", "StudySpec", "load_study", "run_study"]
