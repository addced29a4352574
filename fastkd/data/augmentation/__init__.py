"""More examples of a task, by words that are replaced."""

from fastkd.data.augmentation.augment import Augmentation, augment

__all__ = ["Augmentation", "augment"]
