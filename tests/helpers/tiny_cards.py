"""What a run's summary says that a model card reads, without a run."""

from __future__ import annotations

from typing import Any

_JUDGED = {"losses": {"hidden/1-2": 1.0}, "total": 1.0}


def tiny_summary(**changes: Any) -> dict[str, Any]:
    """Of a distillation on text that has made one step."""
    passes = {"milliseconds": 1.5, "tokens_per_second": 8e3}
    tokens = {"teacher": 8, "student": 8}
    return {
        **{"before": _JUDGED, "after": _JUDGED, "steps": 1, "worse": [], "notes": []},
        **{"train_tokens": 64, "data_digests": {"train": "0123"}, "world_size": 1},
        "peak_memory_of": "process",
        "parameters": {"teacher": 2000, "student": 1000},
        "disk_bytes": {"teacher": 1 << 20, "student": 1 << 19},
        "speed": {"tokens": tokens, "threads": 1, "batches": {"1": {"student": passes}, "32": {}}},
        **changes,
    }
