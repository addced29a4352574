"""Named workloads: the shapes that benchmarks time, that are compiled, and that the floor lists.

A workload has one shape and two batches: `batch` fits two CPU cores and `device_batch` fills a
GPU; 0 where it is not run there. `on_cpu` and `on_device` choose, so that benchmarks read `batch`.
"""

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

# numbers of layer pairs that one call is timed with
PAIRS = (1, 4, 12)


class AttentionWorkload(NamedTuple):
    """One pair of attention layers; `dims` and `kv_heads` are student, teacher."""

    name: str
    batch: int
    device_batch: int
    heads: int
    kv_heads: tuple[int, int]
    tokens: int
    dims: tuple[int, int]
    causal: bool = False


class IndexerWorkload(NamedTuple):
    """One lightning indexer and the attention of its layer; `dims` are indexer, teacher."""

    name: str
    batch: int
    device_batch: int
    index_heads: int
    heads: int
    kv_heads: int
    tokens: int
    dims: tuple[int, int]
    sinks: bool = False
    causal: bool = True


class HiddenWorkload(NamedTuple):
    """One pair of hidden states; `widths` are student, teacher."""

    name: str
    batch: int
    device_batch: int
    tokens: int
    widths: tuple[int, int]


class LogitsWorkload(NamedTuple):
    """Hidden states in front of both heads; `widths` are student, teacher."""

    name: str
    batch: int
    device_batch: int
    tokens: int
    widths: tuple[int, int]
    vocabulary: int


Workload = TypeVar("Workload", AttentionWorkload, IndexerWorkload, HiddenWorkload, LogitsWorkload)


def on_cpu(workloads: Iterable[Workload]) -> list[Workload]:
    """Those that a CPU takes."""
    return [work for work in workloads if work.batch]


def on_device(workloads: Iterable[Workload]) -> list[Workload]:
    """Those that a GPU takes, with `batch` the batch of the device."""
    return [work._replace(batch=work.device_batch) for work in workloads if work.device_batch]


def _bert(tokens: int, batch: int, device_batch: int) -> AttentionWorkload:
    name = f"bert-base-to-tinybert-4-{tokens}"
    return AttentionWorkload(name, batch, device_batch, 12, (12, 12), tokens, (26, 64))


def _llama(tokens: int, batch: int, device_batch: int) -> AttentionWorkload:
    shape = (32, (8, 8), tokens, (128, 128))
    return AttentionWorkload(f"llama-like-{tokens}", batch, device_batch, *shape, causal=True)


ATTENTION = {
    work.name: work
    for work in (
        _bert(128, 8, 64),
        _bert(256, 4, 0),
        _bert(512, 2, 16),
        _bert(2048, 1, 4),
        AttentionWorkload("bert-base-to-6-layers-512", 2, 16, 12, (12, 12), 512, (64, 64)),
        AttentionWorkload("bert-base-to-6-layers-2048", 1, 4, 12, (12, 12), 2048, (64, 64)),
        AttentionWorkload("minilm-6-to-3-128", 8, 64, 12, (12, 12), 128, (32, 32)),
        AttentionWorkload("minilm-6-to-3-512", 2, 16, 12, (12, 12), 512, (32, 32)),
        _llama(1024, 1, 0),
        _llama(2048, 1, 1),
        _llama(8192, 0, 1),
    )
}


def _indexer(tokens: int, batch: int, device_batch: int) -> IndexerWorkload:
    """DeepSeek-V3.2's indexer, 64 heads of 128, on attention of 32 heads and 8 key heads."""
    shape = (64, 32, 8, tokens, (128, 128))
    return IndexerWorkload(f"indexer-gqa-{tokens}", batch, device_batch, *shape, sinks=True)


INDEXER = {
    work.name: work
    for work in (
        IndexerWorkload("indexer-small-512", 1, 0, 8, 12, 4, 512, (64, 64)),
        _indexer(512, 1, 0),
        _indexer(2048, 0, 1),
        _indexer(8192, 0, 1),
        # DeepSeek-V3.2 itself: 128 heads of 128 + 64
        IndexerWorkload("indexer-mla-2048", 0, 1, 64, 128, 128, 2048, (128, 192)),
    )
}

HIDDEN = {
    work.name: work
    for work in (
        HiddenWorkload("bert-base-to-tinybert-4", 8, 64, 128, (312, 768)),
        HiddenWorkload("bert-base-to-tinybert-4-512", 2, 16, 512, (312, 768)),
        HiddenWorkload("minilm-6-to-3", 8, 64, 128, (384, 384)),
        HiddenWorkload("llama-like", 1, 0, 512, (2048, 4096)),
        HiddenWorkload("llama-like-2048", 0, 1, 2048, (2048, 4096)),
        HiddenWorkload("llama-like-8192", 0, 1, 8192, (2048, 4096)),
    )
}


def _logits(size: str, vocabulary: int, widths: tuple[int, int], cpu: int) -> list[LogitsWorkload]:
    """At 256 to 8192 tokens; on the CPU up to `cpu` of them."""
    return [
        LogitsWorkload(f"logits-{size}-{n}", int(n <= cpu), 1, n, widths, vocabulary)
        for n in (256, 1024, 2048, 8192)
    ]


LOGITS = {
    work.name: work
    for work in (
        *_logits("8k", 8192, (512, 1024), 2048),
        *_logits("32k", 32000, (1024, 2048), 1024),
        *_logits("128k", 128256, (2048, 4096), 0),
    )
}
