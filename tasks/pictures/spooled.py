"""Tables that lie in an unnamed file of the scratch folder, sorted, of which a part at a time is in memory.

A table is sorted by distribution: a sample of the rows gives ranges of the sort columns with about `PART_ROWS` rows
each; every row is written to its range, and then the ranges are sorted one after the other. Memory does not grow with
the number of rows, but for the places of the parts in the file, less than a byte a row.
"""

from __future__ import annotations

import os
import weakref
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.runtime import workspace

PART_ROWS = 1 << 16
"""Rows that are sorted at a time."""
BATCH_ROWS = 1024
"""Rows that are read at a time."""
SAMPLED = 64
"""Rows of the sample from each `PART_ROWS`; more give ranges of more equal size."""

Source: TypeAlias = "Callable[[Sequence[str]], Iterable[pa.Table]]"
"""Reads the named columns of all rows, some rows at a time, in the same order at each call."""


class Spool:
    """Record batches of one schema in an unnamed file, which is deleted with the object."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._file = workspace.scratch_file()
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])

    def add(self, batch: pa.RecordBatch) -> int:
        """Append a batch; returns its number."""
        self._ends.append(self._ends[-1] + self._file.write(batch.serialize()))
        return len(self._ends) - 2

    def read(self, number: int) -> pa.RecordBatch:
        """Read a batch; several threads may do so at once."""
        self._file.flush()
        start, end = self._ends[number : number + 2]
        return pa.ipc.read_record_batch(pa.py_buffer(os.pread(self._file.fileno(), end - start, start)), self.schema)


class SpooledTable:
    """Rows of a table in a file."""

    def __init__(
        self,
        spool: Spool,
        starts: np.ndarray,
        start: int = 0,
        stop: int | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        """`starts` int64 [B + 1] are the rows with which the batches begin, and the number of all rows."""
        self._spool, self._starts = spool, starts
        self._start, self._stop = start, int(starts[-1]) if stop is None else stop
        self._columns = list(columns) if columns is not None else spool.schema.names

    def __len__(self) -> int:
        return self._stop - self._start

    def slice(self, start: int, stop: int) -> SpooledTable:
        """Return the rows from `start` up to `stop`, without reading them."""
        start, stop, _ = slice(start, stop).indices(len(self))
        start, stop = self._start + start, self._start + max(start, stop)
        return SpooledTable(self._spool, self._starts, start, stop, self._columns)

    def select(self, columns: Sequence[str]) -> SpooledTable:
        """Return some of the columns."""
        return SpooledTable(self._spool, self._starts, self._start, self._stop, columns)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows in order, at most `BATCH_ROWS` at a time."""
        first = int(np.searchsorted(self._starts, self._start, "right")) - 1
        for number in range(first, len(self._starts) - 1):
            begin = int(self._starts[number])
            if begin >= self._stop:
                return
            batch = self._spool.read(number)
            skipped = max(0, self._start - begin)
            yield batch.slice(skipped, min(self._stop - begin, len(batch)) - skipped).select(self._columns)

    def read(self) -> pa.Table:
        """Read all rows into memory."""
        schema = pa.schema([self._spool.schema.field(name) for name in self._columns])
        return pa.Table.from_batches(self.batches(), schema)

    def strings(self, name: str) -> Iterator[str]:
        """Yield the values of a column of strings."""
        for batch in self.batches():
            yield from batch.column(name).to_pylist()


class Column(Sequence[Any]):
    """A column of a table in a file as a sequence of Python values; reading them in order is fast."""

    def __init__(self, table: SpooledTable, name: str) -> None:
        self._table, self._name = table, name

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:  # an integer or a slice, as `Sequence` declares them
        places = range(len(self))[index]
        if isinstance(places, range):
            if places.step == 1:
                return list(Column(self._table.slice(places.start, places.stop), self._name))
            return [self[place] for place in places]
        (batch,) = self._table.slice(places, places + 1).batches()
        return batch.column(self._name)[0].as_py()

    def __iter__(self) -> Iterator[Any]:
        for batch in self._table.batches():
            yield from batch.column(self._name).to_pylist()


def sort(source: Source, columns: Sequence[str], by: Sequence[str], distinct: bool = False) -> SpooledTable:
    """Sort rows by columns without nulls, ascending; strings in the order of their code points.

    Args:
        source: the rows.
        columns: names of the columns that are kept.
        by: names of the columns to sort by, the first one first.
        distinct: keep one of several equal rows; only for a single column.
    """
    bounds = _bounds(source, by)
    spool, pieces = None, [array("q") for _ in range(len(bounds) + 1)]
    for table in _gathered(source(columns)):
        spool = spool or Spool(table.schema)
        _distribute(_ordered(table, by), by, bounds, spool, pieces)
    if spool is None:
        return SpooledTable(Spool(pa.schema([])), np.zeros(1, np.int64))
    done, starts = Spool(spool.schema), array("q", [0])
    for numbers in pieces:
        table = _ordered(pa.Table.from_batches(map(spool.read, numbers), spool.schema), by)
        if distinct:
            table = pa.table([pc.unique(table.column(0))], schema=spool.schema)
        for batch in table.combine_chunks().to_batches(BATCH_ROWS):
            done.add(batch)
            starts.append(starts[-1] + len(batch))
    pa.default_memory_pool().release_unused()
    return SpooledTable(done, np.array(starts))


def _bounds(source: Source, by: Sequence[str]) -> list[tuple[Any, ...]]:
    """Return the first row of each range but the first, as the values of `by`."""
    rows, step, sample = 0, max(1, PART_ROWS // SAMPLED), []
    for table in source(by):
        chosen = np.arange(-rows % step, len(table), step)
        sample += list(zip(*(table[name].take(chosen).to_pylist() for name in by), strict=True))
        rows += len(table)
    parts = -(-rows // PART_ROWS)
    sample.sort()
    return sorted({sample[len(sample) * number // parts] for number in range(1, parts)})


def _gathered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows of tables in tables of about `PART_ROWS` rows."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= PART_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _ordered(table: pa.Table, by: Sequence[str]) -> pa.Table:
    return table.sort_by([(name, "ascending") for name in by])


def _distribute(
    table: pa.Table, by: Sequence[str], bounds: Sequence[tuple[Any, ...]], spool: Spool, pieces: list[array[int]]
) -> None:
    """Write the rows of a sorted table to the ranges that `bounds` divide; `pieces` has the batches of each range."""
    table = table.combine_chunks()
    names = [table[name] for name in by]

    def values(row: int) -> tuple[Any, ...]:
        return tuple(column[row].as_py() for column in names)

    cuts = [0, *(bisect_left(range(len(table)), bound, key=values) for bound in bounds), len(table)]
    for numbers, start, stop in zip(pieces, cuts[:-1], cuts[1:], strict=True):
        for batch in table.slice(start, stop - start).to_batches():
            numbers.append(spool.add(batch))
