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

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",  # as C4 and others call files of one object a line
    ".txt": "txt",
}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # may follow .jsonl and .txt
PIECE = 4 << 20  # bytes of text, if rows and lines allow it
LARGE_GROUP = 8 * PIECE  # bytes; a larger row group is read in parts
MAX_PARTS = 16  # each part decodes the group from its beginning


def find_format(name: str) -> tuple[str, str | None] | None:
    """("parquet", "jsonl" or "txt"; compression or None) by a file's name; None if unknown."""
    path = Path(name.lower())
    compression = COMPRESSED.get(path.suffix)
    kind = FORMATS.get(path.with_suffix("").suffix if compression else path.suffix)
    return None if kind is None or (compression and kind == "parquet") else (kind, compression)


def find_files(source: str, out: Path) -> list[Path] | None:
    """The files of a path, a directory or a glob, sorted by name; None if nothing is there.

    Files in `out` and hidden ones are not among them. Files of unknown kinds are left out with a
    message. Raises UserError if all are of unknown kinds.
    """
    path, is_directory = Path(source), os.path.isdir(source)
    if os.path.isfile(source):  # False for a name that is too long, where Path would raise
        found = [path]
    elif is_directory:
        names = (file.relative_to(path) for file in path.rglob("*"))
        found = [path / name for name in names if not any(p[0] == "." for p in name.parts)]
    else:
        found = [Path(name) for name in glob.glob(source, recursive=True)]
    found = [file for file in found if file.is_file()]
    if found != [path]:
        found = [file for file in found if out.resolve() not in file.resolve().parents]
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


def estimate_tokens(name: str, size: int) -> float:
    """About how many tokens a file of English holds, by its kind and its size in bytes."""
    kind, compression = find_format(name)
    # Of FineWeb-Edu's parquet files, 28.5 GB with 9.95 B tokens, and of plain text.
    return size * (0.35 if kind == "parquet" else 0.22 * (3 if compression else 1))


def _read_error(path, reason) -> UserError:
    reason = " ".join(str(reason).split())[:200]
    return UserError(f"{path}: cannot be read ({reason}); fix it and run again")


def _column_error(location: str, column: str, names) -> UserError:
    return UserError(
        f"{location}: no column {column!r}; choose another --text_column, "
        f"there {'is' if len(names) == 1 else 'are'} {', '.join(map(str, names)) or 'none'}"
    )


# -------------------------------------------------------------------------------------------------
# Cutting, in the main process


class Piece(NamedTuple):
    """Rows or bytes [start, stop) of file number `file`, and how a worker gets its texts."""

    file: int
    start: int
    stop: int
    read: tuple  # (function, *arguments); the function returns `Texts`
    done: float  # share of the file that lies before `stop`


def split_into_pieces(path: Path, file: int, start: int, text_column: str, separator: str):
    """Yields the pieces of a file from `start` on: 0, or the `stop` of an earlier piece.

    file: its number; text_column: of parquet and jsonl
    separator: between the documents of a txt; "": a txt is one document
    Raises UserError if the file cannot be read or has no such column.
    """
    if find_format(path.name)[0] == "parquet":
        return _split_parquet(path, file, start, text_column)
    return _split_stream(path, file, start, text_column, separator)


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
        metadata = parquet.metadata
    columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    number, row = columns.index(column), 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).column(number).total_uncompressed_size
        parts, rows = math.ceil(size / LARGE_GROUP), metadata.row_group(group).num_rows
        parts = min(MAX_PARTS, max(1, parts))
        step = max(1, math.ceil(rows / parts))
        for first in range(0, rows, step):
            stop = min(first + step, rows)
            if row + first >= start:
                read = (read_parquet, str(path), column, group, first, stop)
                yield Piece(file, row + first, row + stop, read, (row + stop) / metadata.num_rows)
        row += rows


def _split_stream(path: Path, file: int, start: int, column: str, separator: str):
    """Yields about PIECE bytes of a jsonl or txt at a time."""
    import pyarrow as pa

    if find_format(path.name)[0] == "jsonl":
        read, find_cut = (read_jsonl, str(path), column), _cut_after_line
    elif separator:
        mark = os.fsencode(separator)
        read, find_cut = (read_separated, mark), functools.partial(_cut_after_separator, mark)
    else:
        read, find_cut = (read_text,), _cut_between_lines
    try:
        compression = find_format(path.name)[1]
        with pa.OSFile(os.fsencode(path)) as raw, _open_stream(raw, compression, start) as stream:
            text, searched = bytearray(), 0
            # Up to a multiple of PIECE, so that the cuts after `start` depend on `start` alone.
            while block := stream.read(PIECE - len(text) % PIECE):
                text += block
                if len(text) % PIECE:  # fewer bytes than requested
                    continue
                if cut := find_cut(text, searched):
                    part, done = bytes(text[:cut]), raw.tell() / raw.size()
                    yield Piece(file, start, start + cut, (*read, start, part), done)
                    start += cut
                    del text[:cut]
                searched = len(text)
            if text or start == 0:  # an empty file may be a document, too
                stop = start + max(1, len(text))  # a position after it must differ from its start
                yield Piece(file, start, stop, (*read, start, bytes(text)), 1.0)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise _read_error(path, error) from None


def _open_stream(raw, compression: str | None, start: int):
    """The stream of the uncompressed bytes of a file from `start` on."""
    import pyarrow as pa

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


def _cut_after_line(text: bytearray, searched: int) -> int:
    return text.rfind(b"\n", searched) + 1


def _cut_after_separator(separator: bytes, text: bytearray, searched: int) -> int:
    # From left to right, as `split` does: three line ends contain b"\n\n" once, at their start.
    parts = text[max(0, searched - len(separator) + 1) :].split(separator)
    return len(text) - len(parts[-1]) if len(parts) > 1 else 0


def _cut_between_lines(text: bytearray, searched: int) -> int:
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


class Texts(NamedTuple):
    """The texts of a piece."""

    texts: list  # str, or None for a null
    begins: bool  # whether the first text is the beginning of a document
    replaced: int  # texts with invalid UTF-8, which became U+FFFD


def _decode(data: bytes) -> tuple[str, bool]:
    """(text, whether some of it was invalid UTF-8)."""
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return data.decode(errors="replace"), True


_cached_parquet = functools.lru_cache(maxsize=2)(open_parquet)


def read_parquet(path: str, column: str, group: int, first: int, stop: int) -> Texts:
    """Rows [first, stop) of a row group."""
    import pyarrow as pa

    texts, replaced, row = [], 0, 0
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
    for i, text in enumerate(texts):
        if isinstance(text, bytes):
            texts[i], invalid = _decode(text)
            replaced += invalid
    return Texts(texts, True, replaced)


def read_jsonl(path: str, column: str, start: int, data: bytes) -> Texts:
    """The column of each line's object. Empty lines are skipped."""
    texts, replaced = [], 0
    for line in data.split(b"\n"):
        location, start = f"the line at byte {start:,}", start + len(line) + 1
        if not line.strip():
            continue
        text, invalid = _decode(line)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _read_error(path, f"{location} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise _read_error(path, f"{location} is not a JSON object")
        if column not in row:
            raise _column_error(f"{path}: in {location}", column, row)
        if not isinstance(row[column], str | None):
            raise _read_error(path, f"{column!r} in {location} is not text")
        texts.append(row[column])
        replaced += invalid
    return Texts(texts, True, replaced)


def read_separated(separator: bytes, start: int, data: bytes) -> Texts:
    """The documents between separators. Two separators in a row have no document between them."""
    pairs = [_decode(part) for part in data.split(separator) if part]
    return Texts([text for text, _ in pairs], True, sum(invalid for _, invalid in pairs))


def read_text(start: int, data: bytes) -> Texts:
    """The part of a document that begins at byte `start`."""
    text, invalid = _decode(data)
    return Texts([text], start == 0, int(invalid))
