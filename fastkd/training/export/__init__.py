"""Write the student as others expect to find it, and say beforehand what can't be handed on."""

from fastkd.training.export.sentences import check_prompts
from fastkd.training.export.student import (
    export_notes,
    export_student,
    exported_modules,
    load_projections,
)

__all__ = [
    "check_prompts",
    "export_notes",
    "export_student",
    "exported_modules",
    "load_projections",
]
