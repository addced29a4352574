"""What a run learns from and is measured on: text, or a task with labels, behind one protocol."""

from fastkd.material.examples import TaskMaterial
from fastkd.material.make import make_material, task_of
from fastkd.material.protocol import Feed, Judge, Material, Part
from fastkd.material.text import TextMaterial

__all__ = [
    "Feed",
    "Judge",
    "Material",
    "Part",
    "TaskMaterial",
    "TextMaterial",
    "make_material",
    "task_of",
]
