"""Running a recipe, of distillation and fine-tuning alike.

`gather.py` gathers the `parts.py` of a run and `setup.py` lets it stand: to train, to be tried, or
to be evaluated. `loop.py` is the run: its stages, its steps, the step. `bookkeeping.py` writes down
what is due between steps, by way of `window.py` (metrics), `evaluate.py`, `checkpoint/` and
`summary.py` (`speed.py`: what its models take to run); `engine.py` is DeepSpeed, or
`local_engine.py` in one process, `optimizer.py` what they step with, `teacher.py` runs beside them,
`export/` what is handed on, `card/` what is said of it.
`run_folder.py`, `metrics_file.py`, `started_paths.py`, `hold.py`, `continuation.py` and
`beginnings.py` know the folder, `session.py` what stands around a run in a process.
"""
