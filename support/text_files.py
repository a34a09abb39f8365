"""Text files as pieces that one process can tokenize: parquet, jsonl and txt, also compressed.

The cuts depend on the file alone, so that any process may continue from any of them:

    rows of a .parquet          | group 0 | group 1 | ...       a large row group in several parts
    lines of a .jsonl           |-- 4 MB --|-- 4 MB --| ...     after a line end
    documents of a .txt         |-- 4 MB --|-- 4 MB --| ...     after a separator
    a .txt that is one document |-- 4 MB --|-- 4 MB --| ...     where no token can span the cut

The main process finds the cuts. A worker then reads the rows of a parquet file itself; of the other
files it gets the bytes.
"""

import functools
import glob
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from support.errors import UserError
from support.launch import print_rank

# C4 and others call files of one object a line .json.
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt"}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # may follow .jsonl and .txt
PIECE = 4 << 20  # bytes of text, if rows and lines allow it
LARGE_GROUP = 8 * PIECE  # bytes; a larger row group is read in parts
MAX_PARTS = 16  # each part decodes the group from its beginning


def find_format(name: str) -> tuple[str, str | None] | None:
    """("parquet", "jsonl" or "txt"; compression or None) by a file's name; None if unknown."""
    path = Path(name.lower())
    if path.suffix == ".parquet":
        return "parquet", None
    compression = COMPRESSED.get(path.suffix)
    kind = FORMATS.get(path.with_suffix("").suffix if compression else path.suffix)
    return (kind, compression) if kind else None


def find_files(source: str, out: Path) -> list[Path] | None:
    """The files of a path, a directory or a glob, sorted by name; None if nothing is there.

    Files in `out` and hidden ones are not among them. Files of unknown kinds are left out with a
    message. Raises UserError if all are of unknown kinds.
    """
    path, is_directory, out = Path(source), os.path.isdir(source), out.resolve()
    if os.path.isfile(source):  # False for a name that is too long, where Path would raise
        found = [path]
    elif is_directory:
        names = (file.relative_to(path) for file in path.rglob("*"))
        found = [path / name for name in names if not any(p[0] == "." for p in name.parts)]
    else:
        found = [Path(name) for name in glob.glob(source, recursive=True)]
    found = [f for f in found if f.is_file() and (f == path or out not in f.resolve().parents)]
    if not found and not is_directory:
        return None
    files = sorted({file for file in found if find_format(file.name)})  # globs may repeat one
    if not files:
        raise UserError(
            f"source={source!r}: no file of a known kind; use .parquet, .jsonl or .txt, the last "
            "two also as .gz and .zst"
        )
    if others := sorted(set(found) - set(files)):
        print_rank(f"left out {len(others)} files of unknown kinds, the first is {others[0]}")
    return files


def describe_file(path: Path) -> dict:
    """What the manifest records of a file, to find out later whether it has changed."""
    status = path.stat()
    return {"file": path.name, "bytes": status.st_size, "modified": status.st_mtime_ns}


def estimate_tokens(source: dict) -> float:
    """About how many tokens a file of English holds, by its kind and its size in bytes."""
    kind, compression = find_format(source["file"])
    # Of FineWeb-Edu's parquet files, 28.5 GB with 9.95 B tokens, and of plain text.
    return source["bytes"] * (0.35 if kind == "parquet" else 0.66 if compression else 0.22)


def _read_error(path, reason) -> UserError:
    reason = " ".join(str(reason).split())[:200]
    return UserError(f"{path}: cannot be read ({reason}); fix it and run again")


def _column_error(location: str, column: str, names) -> UserError:
    columns = ", ".join(map(str, names)) or "none"
    return UserError(f"{location}: no column {column!r}; choose a --text_column: {columns}")


# -------------------------------------------------------------------------------------------------
# Cutting, in the main process


class Piece(NamedTuple):
    """Rows or bytes [start, stop) of file number `file`, and how a worker gets its texts."""

    file: int
    start: int
    stop: int
    begins: bool  # whether its first text is the beginning of a document
    read: tuple  # (function, *arguments); the function returns a list of str, None for a null


def split_into_pieces(path: Path, file: int, start: int, text_column: str, separator: str):
    """Yields the pieces of a file from `start` on: 0, or the `stop` of an earlier piece.

    file: its number; text_column: of parquet and jsonl
    separator: between the documents of a txt; "": a txt is one document
    Raises UserError if the file cannot be read or has no such column.
    """
    kind, compression = find_format(path.name)
    if kind == "parquet":
        yield from _split_parquet(path, file, start, text_column)
        return
    mark = b"\n" if kind == "jsonl" else os.fsencode(separator)
    for data in _read_blocks(path, compression, start, mark):
        read = (read_jsonl, str(path), text_column, start) if kind == "jsonl" else (read_txt, mark)
        stop = start + max(1, len(data))  # the position after an empty file differs from its start
        yield Piece(file, start, stop, mark != b"" or start == 0, (*read, data))
        start = stop


def open_parquet(path: Path | str, column: str):
    """A `pyarrow.parquet.ParquetFile`. Raises UserError if damaged or without the text column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # With a buffer a large group is read by pages; their checksums are verified, if any.
        file = pq.ParquetFile(
            pa.OSFile(os.fsencode(path)), buffer_size=1 << 20, page_checksum_verification=True
        )
        schema = file.schema_arrow
        names = schema.names
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name is not UTF-8
        raise _read_error(path, error) from None
    if column not in names:
        raise _column_error(str(path), column, names)
    if names.count(column) > 1:
        raise UserError(f"{path}: {names.count(column)} columns {column!r}; choose another")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if str(kind) not in kinds:
        raise UserError(f"{path}: text_column={column!r} holds {kind}; choose a column of text")
    return file


def _split_parquet(path: Path, file: int, start: int, column: str):
    """Yields row groups, large ones in parts of equal numbers of rows."""
    with open_parquet(path, column) as parquet:
        metadata, row = parquet.metadata, 0
    for group in range(metadata.num_row_groups):
        size, rows = metadata.row_group(group).total_byte_size, metadata.row_group(group).num_rows
        parts = min(MAX_PARTS, 1 + size // LARGE_GROUP)
        step = max(1, math.ceil(rows / parts))
        for first in range(0, rows, step):
            stop = min(first + step, rows)
            if row + first >= start:
                read = (read_parquet, str(path), column, group, first, stop)
                yield Piece(file, row + first, row + stop, True, read)
        row += rows


def _read_blocks(path: Path, compression: str | None, start: int, mark: bytes):
    """Yields the bytes of a file from `start` on, about PIECE at a time, cut after a `mark`."""
    import pyarrow as pa

    try:
        with _open_stream(path, compression, start) as stream:
            text, searched = bytearray(), 0
            # Up to a multiple of PIECE, so that the cuts after `start` depend on `start` alone.
            while block := stream.read(PIECE - len(text) % PIECE):
                text += block
                if len(text) % PIECE:  # fewer bytes than requested
                    continue
                if cut := _cut_after(mark, text, searched) if mark else _cut_line(text, searched):
                    yield bytes(text[:cut])
                    start += cut
                    del text[:cut]
                searched = len(text)
            if text or start == 0:  # an empty file may be a document, too
                yield bytes(text)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise _read_error(path, error) from None


def _open_stream(path: Path, compression: str | None, start: int):
    """The stream of the uncompressed bytes of a file from `start` on."""
    import pyarrow as pa

    raw = pa.OSFile(os.fsencode(path))
    if not compression:
        raw.seek(start)
        return raw
    if raw.size() == 0:
        raise EOFError("empty, but a compressed file has a header")
    stream = pa.CompressedInputStream(raw, compression)
    while start > 0 and (block := stream.read(min(start, PIECE))):
        start -= len(block)
    return stream


# Each returns the last place to cut `text`, or 0. The first `searched` bytes hold none.


def _cut_after(separator: bytes, text: bytearray, searched: int) -> int:
    # From left to right, as `split` does: three line ends contain b"\n\n" once, at their start.
    parts = text[max(0, searched - len(separator) + 1) :].split(separator)
    return len(text) - len(parts[-1]) if len(parts) > 1 else 0


def _cut_line(text: bytearray, searched: int) -> int:
    """Before a line end that is followed by a character other than white space.

    GPT-2's pre-tokenizer makes a token of that line end, and another of the white space before it,
    as at the end of a text: the tokens of the two parts are those of the text.
    """
    end = len(text) - 4  # the character after the line end must be complete
    while (i := text.rfind(b"\n", max(0, searched - 5), max(0, end))) > 0:
        after = bytes(text[i + 1 : i + 5]).decode(errors="ignore")[:1]
        if after and not after.isspace():
            return i
        end = i
    return 0


# -------------------------------------------------------------------------------------------------
# Reading, in the workers

_cached_parquet = functools.lru_cache(maxsize=2)(open_parquet)


def read_parquet(path: str, column: str, group: int, first: int, stop: int) -> list[str | None]:
    """Rows [first, stop) of a row group."""
    import pyarrow as pa

    texts, row = [], 0
    try:
        parquet = _cached_parquet(path, column)
        for batch in parquet.iter_batches(1024, [group], [column], use_threads=False):
            rows = batch.column(0)[max(0, first - row) : max(0, stop - row)]
            try:
                texts += rows.to_pylist()
            except UnicodeDecodeError:
                texts += rows.cast(pa.binary()).to_pylist()
            row += len(batch)
            if row >= stop:
                break
    except (pa.ArrowException, OSError) as error:
        raise _read_error(path, error) from None
    return [t.decode(errors="replace") if isinstance(t, bytes) else t for t in texts]


def read_jsonl(path: str, column: str, start: int, data: bytes) -> list[str | None]:
    """The column of each line's object. Empty lines are skipped. start: of the data in the file"""
    texts = []
    for line in data.split(b"\n"):
        location, start = f"the line at byte {start:,}", start + len(line) + 1
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode(errors="replace"))
        except (ValueError, RecursionError) as error:
            raise _read_error(path, f"{location} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise _read_error(path, f"{location} is not a JSON object")
        if column not in row:
            raise _column_error(f"{path}: in {location}", column, row)
        if not isinstance(row[column], str | None):
            raise _read_error(path, f"{column!r} in {location} is not text")
        texts.append(row[column])
    return texts


def read_txt(separator: bytes, data: bytes) -> list[str]:
    """The documents between separators, if there is one; no document is between two in a row."""
    parts = [part for part in data.split(separator) if part] if separator else [data]
    return [part.decode(errors="replace") for part in parts]
