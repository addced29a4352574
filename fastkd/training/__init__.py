"""The run: set-up, engine, loop, checkpoints, evaluation, export."""
