"""Write the student as others expect to find it, and say beforehand what can't be handed on."""

from fastkd.training.export.student import (
    export_notes,
    export_student,
    load_projections,
    whole_weights,
)

__all__ = ["export_notes", "export_student", "load_projections", "whole_weights"]
