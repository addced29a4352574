"""What a run learns from and is measured on: text, or a task with labels, behind one protocol."""
