"""Text in, blocks of token ids out: documents are split, tokenised once and packed without padding.

    resolve -> documents -> split by text hash -> tokenise -> pack -> cache -> shuffled batches

Every rank counts the same global batch off and makes its own rows of it, so that the order never
depends on the number of ranks, and a stream's position is a few plain values that a checkpoint can
hold.
"""

from fastkd.data.text.corpus import Corpus, prepare_corpus
from fastkd.data.text.readers import register_reader
from fastkd.data.text.settings import TextSettings
from fastkd.data.text.stream import BlockStream

__all__ = ["BlockStream", "Corpus", "TextSettings", "prepare_corpus", "register_reader"]
