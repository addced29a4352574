"""Which peer does which job, with which models, on which batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.peers import brewer, decoders, distill_box, layers, sentences
from benchmarks.peers.layers import PROBABILITIES, SCORES
from benchmarks.peers.rows import Case, Group, Row, Step

# distribution, and the package that is imported
PEERS = {
    "TextBrewer": ("textbrewer", "textbrewer"),
    "torchdistill": ("torchdistill", "torchdistill"),
    "TRL": ("trl", "trl"),
    "Liger-Kernel": ("liger-kernel", "liger_kernel"),
    "sentence-transformers": ("sentence-transformers", "sentence_transformers"),
}
FASTKD, PLAIN = "fastkd", "plain PyTorch"
# modules that rows import late
OWN, BOX, TRL = "fastkd.distiller", "torchdistill.core.distillation", "trl"
GKD, LIGER, SENTENCE = "trl.experimental.gkd", "liger_kernel.chunked_loss", "sentence_transformers"


def _row(name: str, loss: str, make: Callable[[Case], Step], *imports: str) -> Row:
    return Row(name=name, loss=loss, make=make, imports=imports, plain=name == PLAIN)


def _inside(loss: str) -> tuple[Row, ...]:
    """Rows of losses inside, with attention of one kind."""
    rows = [
        _row(FASTKD, loss, partial(layers.fastkd_row, loss=loss), OWN),
        _row(PLAIN, loss, partial(layers.plain_row, loss=loss)),
        _row("torchdistill", loss, partial(distill_box.torchdistill_row, loss=loss), BOX),
    ]
    if loss == PROBABILITIES:
        rows.append(_row("TextBrewer", loss, brewer.textbrewer_row, "textbrewer"))
    return tuple(rows)


LAYERS = (*_inside(SCORES), *_inside(PROBABILITIES))
JS, MSE, CHUNK = decoders.LOSS, sentences.LOSS, decoders.CHUNK
DECODERS = (
    _row(FASTKD, JS, decoders.fastkd_row),
    _row(PLAIN, JS, decoders.plain_row),
    _row("TRL, GKDTrainer", JS, decoders.gkd_row, GKD),
    _row("TRL, DistillationTrainer", JS, decoders.distillation_trainer_row, TRL, "datasets"),
    _row("Liger-Kernel, whole batch", JS, partial(decoders.liger_row, chunk=1024), LIGER),
    _row(f"Liger-Kernel, {CHUNK} tokens", JS, partial(decoders.liger_row, chunk=CHUNK), LIGER),
)
SENTENCES = (
    _row(FASTKD, MSE, sentences.fastkd_row, OWN),
    _row(PLAIN, MSE, sentences.plain_row),
    _row("sentence-transformers", MSE, sentences.sentence_transformers_row, SENTENCE),
)
NOT_LAYERS = {
    "TextBrewer": "of scores: it reads what models output, which is probabilities",
    "TRL": "no losses inside a model",
    "Liger-Kernel": "no losses inside a model",
    "sentence-transformers": "losses of whole embeddings alone",
}
NOT_DECODERS = {
    "TextBrewer": "cross entropy or mean square, no Jensen-Shannon divergence",
    "torchdistill": "KL and others, no Jensen-Shannon divergence",
    "sentence-transformers": "no decoders",
}
NOT_SENTENCES = {
    "TextBrewer": "states alone, without a pooling",
    "torchdistill": "states alone, without a pooling",
    "TRL": "decoders alone",
    "Liger-Kernel": "no such loss",
}


INSIDE = "attention of the mapped blocks, their hidden states and the embeddings"
DIVERGENCE = "generalised Jensen-Shannon divergence of the next tokens of two Llamas, beta 0.5"
SQUARES = "mean square of mean-pooled embeddings of length one"
JOBS = {
    "layers": (INSIDE, LAYERS, NOT_LAYERS),
    "logits": (DIVERGENCE, DECODERS, NOT_DECODERS),
    "embeddings": (SQUARES, SENTENCES, NOT_SENTENCES),
}
# sizes, rows and tokens
SIZES: dict[str, tuple[tuple[str, int, int], ...]] = {
    "layers": tuple(
        (size, *shape)
        for size in ("BERT-base to 4 x 312", "MiniLM-L6 to 3 layers")
        for shape in ((8, 128), (2, 512), (1, 2048))
    ),
    "logits": (("32,000 words", 2, 512), ("128,000 words", 1, 512)),
    "embeddings": (("MiniLM-L6 to 3 layers", 32, 32), ("MiniLM-L6 to 3 layers", 8, 128)),
}
TINY: dict[str, tuple[tuple[str, int, int], ...]] = {
    "layers": (("tiny", 2, 16),),
    "logits": (("tiny words", 2, 16),),
    "embeddings": (("tiny, one width", 2, 16),),
}


def groups(device: str, *, quick: bool) -> list[Group]:
    """All jobs; of tiny models where it should be quick."""
    chosen = TINY if quick else SIZES
    return [
        Group(
            name=name,
            what=what,
            cases=tuple(Case(*size, device) for size in chosen[name]),
            rows=rows,
            cannot=cannot,
        )
        for name, (what, rows, cannot) in JOBS.items()
    ]
