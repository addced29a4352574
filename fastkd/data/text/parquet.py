"""Parquet files, read in batches by Arrow itself.

`datasets` can stream them too, but through a scanner that reads ahead in threads of its own: where
one is left unfinished, the process can abort at its exit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class ParquetRows:
    """Rows of a Parquet file, with what is read of a `datasets.Dataset`."""

    path: Path
    column_names: list[str]
    schema: pa.Schema = field(repr=False)
    """Arrow's types of all columns of the file."""

    @staticmethod
    def of(path: Path) -> ParquetRows:
        """Those of a file with all of its columns.

        Raises:
            ValueError: it is no Parquet file, or a damaged one (`pyarrow.ArrowInvalid`); other
                damage raises other errors of Arrow.
        """
        with pq.ParquetFile(path, memory_map=True) as file:
            return ParquetRows(path, file.schema_arrow.names, file.schema_arrow)

    @property
    def features(self) -> datasets.Features:
        """Types of the columns; `datasets` writes the names of classes into its files.

        Raises:
            ValueError: `datasets` has no such type, as for maps.
        """
        fields = [self.schema.field(name) for name in self.column_names]
        return datasets.Features.from_arrow_schema(pa.schema(fields, self.schema.metadata))

    def select_columns(self, names: Sequence[str]) -> ParquetRows:
        """These rows with some columns alone."""
        return replace(self, column_names=list(names))

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        """Values by column, up to so many rows at a time."""
        with pq.ParquetFile(self.path, memory_map=True) as file:
            batches = file.iter_batches(batch_size, columns=self.column_names, use_threads=False)
            for batch in batches:
                yield batch.to_pydict()
