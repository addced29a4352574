"""Checkpoints: what is in their files, what says that they are whole, and which one is continued.

Nothing in a checkpoint is a pickle, so that reading one can't run code.
"""

from fastkd.training.checkpoint.checkpoints import Checkpoints

__all__ = ["Checkpoints"]
