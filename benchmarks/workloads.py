"""Named workloads: the shapes that benchmarks time and that the compile test compiles."""

from typing import NamedTuple


class AttentionWorkload(NamedTuple):
    """One pair of attention layers; `dims` and `kv_heads` are student, teacher."""

    name: str
    batch: int
    heads: int
    kv_heads: tuple[int, int]
    tokens: int
    dims: tuple[int, int]
    causal: bool = False


class HiddenWorkload(NamedTuple):
    """One pair of hidden states; `widths` are student, teacher."""

    name: str
    batch: int
    tokens: int
    widths: tuple[int, int]


def _bert(tokens: int, batch: int) -> AttentionWorkload:
    name = f"bert-base-to-tinybert-4-{tokens}"
    return AttentionWorkload(name, batch, 12, (12, 12), tokens, (26, 64))


ATTENTION = {
    work.name: work
    for work in (
        _bert(128, 8),
        _bert(256, 4),
        _bert(512, 2),
        _bert(2048, 1),
        AttentionWorkload("bert-base-to-6-layers-512", 2, 12, (12, 12), 512, (64, 64)),
        AttentionWorkload("bert-base-to-6-layers-2048", 1, 12, (12, 12), 2048, (64, 64)),
        AttentionWorkload("minilm-6-to-3-128", 8, 12, (12, 12), 128, (32, 32)),
        AttentionWorkload("minilm-6-to-3-512", 2, 12, (12, 12), 512, (32, 32)),
        AttentionWorkload("llama-like-1024", 1, 32, (8, 8), 1024, (128, 128), causal=True),
    )
}

HIDDEN = {
    work.name: work
    for work in (
        HiddenWorkload("bert-base-to-tinybert-4", 8, 128, (312, 768)),
        HiddenWorkload("minilm-6-to-3", 8, 128, (384, 384)),
        HiddenWorkload("llama-like", 1, 512, (2048, 4096)),
    )
}
