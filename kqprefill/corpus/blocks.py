"""A block's records, and their results as a file: JSON lines, or Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time, timedelta
import io
import json
from typing import Any, BinaryIO
import zlib

from ..errors import InputError, KqprefillError
from ..terminal import json_line, json_value
from .inputs import Block, open_table, table_checksum
from .records import ASKED, BOM, OURS, Reader, Record
from .results import Wanted

EXTRAS = "extras"  # the column of what JSON lines hand on, in Parquet


def read_lines(block: Block, reader: Reader) -> Iterator[Record]:
    """The records of a block of lines, each made when it is asked for; empty lines are none. Raises KqprefillError
    where the file has changed or cannot be read."""
    try:
        with open(block.path, "rb") as file:
            file.seek(block.begin)
            data = file.read(block.end - block.begin)
    except OSError as error:
        raise KqprefillError(f"{block.path}: {error.strerror}") from None
    if zlib.crc32(data) != block.checksum:
        raise _changed(block)
    if block.begin == 0:
        data = data.removeprefix(BOM)
    for at, text in enumerate(io.BytesIO(data), block.first):
        if text.strip():
            yield reader.of_line(at, block.path, at + 1, block.end, text)


def read_rows(block: Block) -> Any:
    """The rows of a block of Parquet, a pyarrow.Table. Raises KqprefillError where the file has changed or cannot be
    read."""
    import pyarrow

    file = open_table(block.path)
    if table_checksum(block.path) != block.checksum:
        raise _changed(block)
    begin, groups, skipped = 0, [], 0
    for at in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(at).num_rows
        if begin + rows <= block.first:
            skipped = begin + rows
        elif begin < block.first + block.count:
            groups.append(at)
        begin += rows
    try:
        return file.read_row_groups(groups).slice(block.first - skipped, block.count)
    except (pyarrow.ArrowException, OSError) as error:
        raise KqprefillError(f"{block.path}: it is damaged: {' '.join(str(error).split())}") from None


def records_of(table: Any, reader: Reader, name: str, first: int = 0) -> Iterator[Record]:
    """The records of a pyarrow.Table's rows, one for each; the columns that are handed on stay in the table.

    name: of what the table is from, for messages; first: its first row's place there, from 0. A null is as good as a
    key that is not there.
    """
    asked = table.select([column for column in table.column_names if column in reader.asked])
    rows: list[dict[str, Any]] = asked.to_pylist() if asked.num_columns else [{}] * table.num_rows
    for at, row in enumerate(rows, first):
        content = {key: _without_nulls(value) for key, value in row.items() if value is not None}
        yield reader.of_row(at, name, at + 1, 0, content)


def handed_on(table: Any, name: str, keep_as: str | None) -> Any:
    """The columns of a pyarrow.Table of records that its results have, too. keep_as: as one column of structs.

    Raises InputError where one is called as a result's own.
    """
    others = table.select([column for column in table.column_names if column not in ASKED])
    if keep_as is not None:
        import pyarrow

        structs = others.to_struct_array() if others.num_columns else pyarrow.array([{}] * table.num_rows)
        return pyarrow.table({keep_as: structs})
    taken = sorted(OURS & set(others.column_names))
    if taken:
        raise InputError(
            f'{name}: the column "{taken[0]}" is called as one of the result\'s own; rename it, or put all other '
            "columns under one with --keep-as NAME"
        )
    return others


def write_lines(file: BinaryIO, lines: Sequence[Mapping[str, Any]], others: Any = None) -> None:
    """Results, which have what is handed on, as JSON lines. others: a pyarrow.Table of columns that are handed on
    instead, their values as JSON (`_plain`)."""
    more = [{}] * len(lines) if others is None else others.to_pylist()
    for line, extras in zip(lines, more):
        file.write(json_line({**line, **{key: _plain(value) for key, value in extras.items()}}, False))


def write_rows(file: BinaryIO, table: Any) -> None:
    """A pyarrow.Table of results as Parquet."""
    from .inputs import parquet

    parquet().write_table(table, file, compression="zstd")


def results_table(lines: Sequence[Mapping[str, Any]], wanted: Wanted) -> Any:
    """Results as a pyarrow.Table, whose columns and types are the same whatever the results: what a result has not is
    null."""
    import pyarrow

    schema = _schema(wanted)
    return pyarrow.Table.from_pylist([dict(line) for line in lines], schema=schema)


def joined(results: Any, others: Any) -> Any:
    """A pyarrow.Table of results with the columns of another, which has as many rows."""
    for field, column in zip(others.schema, others.columns):
        results = results.append_column(field, column)
    return results


def texts_of_extras(records: Sequence[Record], keep_as: str | None) -> Any:
    """What JSON lines hand on as a pyarrow.Table of one column of JSON texts: its type is the same in every block,
    whatever the lines hold."""
    import pyarrow

    own = [record.extras if keep_as is None else record.extras[keep_as] for record in records]
    column = pyarrow.array([json.dumps(extras, allow_nan=False) for extras in own], pyarrow.string())
    return pyarrow.table({keep_as or EXTRAS: column})


def _schema(wanted: Wanted) -> Any:
    import pyarrow as pa

    stretch = [
        ("n_tokens", pa.int64()),
        ("logprob", pa.float64()),
        ("mean_logprob", pa.float64()),
        ("perplexity", pa.float64()),
    ]
    kinds = {
        "token_logprobs": pa.list_(pa.float32()),
        "greedy_tokens": pa.list_(pa.int32()),
        "top_tokens": pa.list_(pa.list_(pa.int32())),
        "top_logprobs": pa.list_(pa.list_(pa.float32())),
    }
    stretch += [(key, kinds[key]) for key, asked in wanted.keys.items() if asked]
    choices = [("best", pa.int64()), ("best_per_token", pa.int64()), ("choices", pa.list_(pa.struct(stretch)))]
    return pa.schema([("index", pa.int64()), *stretch, *choices, ("error", pa.string())])


def _without_nulls(value: Any) -> Any:
    """A column's value without the fields that are null: a table's structs have all fields in every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """A table's value as JSON has it: bytes in base64, dates and times in ISO 8601, what is no number (NaN) as text,
    and what JSON knows nothing of as Python prints it."""
    if isinstance(value, bytes):
        from base64 import b64encode

        return b64encode(value).decode()
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return json_value(value) if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _changed(block: Block) -> KqprefillError:
    return KqprefillError(f"{block.path}: it has changed while it was being read")
