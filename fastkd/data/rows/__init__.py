"""Rows of texts, one or several a row, each read by itself and never glued to another.

    resolve -> read_rows -> split by text hash -> tokenise -> cache -> data.sampler

What a row is, its `RowForm`, follows from the recipe alone.
"""

from fastkd.data.rows.tokenized import EncodedRows, RowSets, RowSettings, prepare_rows

__all__ = ["EncodedRows", "RowSets", "RowSettings", "prepare_rows"]
