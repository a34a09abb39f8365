"""Text files as pieces that one process can tokenize: parquet, jsonl and txt, also compressed.

The cuts depend on the file alone, so that any process may continue from any of them:

    rows of a .parquet          | group 0 | group 1 | ...       a large row group in several parts
    lines of a .jsonl           |-- 4 MB --|-- 4 MB --| ...     after a line end
    documents of a .txt         |-- 4 MB --|-- 4 MB --| ...     after a separator
    a .txt that is one document |-- 4 MB --|-- 4 MB --| ...     where no token can span the cut

The main process finds the cuts. A worker then reads the rows of a parquet file itself; of the other
files it gets the bytes.
"""

import contextlib
import functools
import glob
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from support import text_encoding
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

    Files in `out` and hidden ones are not among them. Links are followed, but each directory is
    read once. Files of unknown kinds are left out with a message.
    Raises UserError if all are of unknown kinds, and for what cannot be read or is a dangling link.
    """
    path, is_directory, out = Path(source), os.path.isdir(source), out.resolve()
    if os.path.isfile(source):  # False for a name that is too long, where Path would raise
        matches = [source]
    else:
        matches = _expand(Path(glob.escape(source), "**") if is_directory else path)
    found = {}  # a globbed directory may be reached by several paths
    for file in sorted(map(Path, matches)):
        directory = file.parent.resolve()
        if os.path.isdir(file) or (file != path and out in (directory, *directory.parents)):
            continue
        if not os.path.exists(file):
            raise _read_error(file, "a link to nothing, or no permission")
        found.setdefault((directory, file.name), file)
    if not found and not is_directory:
        return None
    files = [f for f in found.values() if find_format(f.name) and os.path.isfile(f)]
    if not files:
        raise UserError(
            f"source={source!r}: no file of a known kind outside --out; use .parquet, .jsonl or "
            ".txt, the last two also as .gz and .zst"
        )
    if others := sorted(set(found.values()) - set(files)):
        print_rank(f"left out {len(others)} files of unknown kinds, the first is {others[0]}")
    return files


def _expand(pattern: Path) -> list[str]:
    """All that matches a glob except hidden names; `**` is a directory and all below it."""
    parts = pattern.parts
    index = parts.index("**") if "**" in parts else len(parts)
    found = glob.glob(str(Path(*parts[:index])))
    if index == len(parts):
        return found
    directories = [directory for base in found for directory in _walk(base)]
    rest = parts[index + 1 :] or ("*",)
    return [file for d in directories for file in _expand(Path(glob.escape(d), *rest))]


def _walk(base: str):
    """Yields a directory and those below it, without hidden ones, each real one once."""

    def fail(error: OSError):
        raise _read_error(error.filename, error.strerror)

    seen = set()
    for directory, names, _ in os.walk(base, onerror=fail, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:
            names.clear()
            continue
        seen.add(real)
        # macOS adds a directory __MACOSX to archives.
        names[:] = sorted(name for name in names if name[0] != "." and name != "__MACOSX")
        yield directory


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
    return UserError(
        f"{path}: cannot be read ({reason}); fix it and run again, with another --out if shards "
        "were written"
    )


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
    mark = re.compile(b"\n") if kind == "jsonl" else compile_separator(separator)
    skip = find_start(path, text_column) if start == 0 else 0
    for data in _read_blocks(path, compression, start, mark):
        read = (read_txt, mark)
        if kind == "jsonl":
            read = (read_jsonl, str(path), text_column, start + skip)
        stop = start + max(1, len(data))  # the position after an empty file differs from its start
        yield Piece(file, start, stop, mark is not None or start == 0, (*read, data[skip:]))
        start, skip = stop, 0


def compile_separator(separator: str) -> re.Pattern | None:
    """A pattern of bytes for the separator, whose line ends match \\n and \\r\\n; None for ""."""
    parts = re.split(rb"\r?\n", os.fsencode(separator))
    return re.compile(rb"(?:\r\n|\n)".join(map(re.escape, parts))) if separator else None


def find_start(path: Path, text_column: str) -> int:
    """The byte at which the text of a file begins, after a byte order mark; 0 for parquet.

    Raises UserError if the file cannot be read, is in UTF-16, or has no such column: of a jsonl
    the first line is read, if it is not a very long one.
    """
    kind, compression = find_format(path.name)
    if kind == "parquet":
        open_parquet(path, text_column).close()
        return 0
    with _open_stream(path, compression, 0) as stream:
        data = stream.read(PIECE if kind == "jsonl" else text_encoding.HEAD)
        start = text_encoding.find_start(data[: text_encoding.HEAD])
    line, end, _ = data[start:].lstrip().partition(b"\n")
    if kind == "jsonl" and (end or len(data) < PIECE):
        read_jsonl(str(path), text_column, 0, line)
    return start


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
    if file.metadata.num_rows == 0:
        return file
    if column not in names:
        raise _column_error(str(path), column, names)
    if names.count(column) > 1:
        raise UserError(f"{path}: {names.count(column)} columns {column!r}; choose another")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if str(kind) not in (*kinds, "null"):  # null: no row has a text
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


def _read_blocks(path: Path, compression: str | None, start: int, mark: re.Pattern | None):
    """Yields the bytes of a file from `start` on, about PIECE at a time, cut after a `mark`."""
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


@contextlib.contextmanager
def _open_stream(path: Path, compression: str | None, start: int):
    """The uncompressed bytes of a file from `start` on; errors in the block become UserError."""
    import pyarrow as pa

    try:
        with pa.OSFile(os.fsencode(path)) as raw:
            if not compression:
                raw.seek(start)
                yield raw
                return
            if raw.size() == 0:
                raise EOFError("empty, but a compressed file has a header")
            with pa.CompressedInputStream(raw, compression) as stream:
                while start > 0 and (block := stream.read(min(start, PIECE))):
                    start -= len(block)
                yield stream
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise _read_error(path, error) from None


# Each returns the last place to cut `text`, or 0. The first `searched` bytes hold none.


def _cut_after(mark: re.Pattern, text: bytearray, searched: int) -> int:
    # From left to right, as `split` does: three line ends contain b"\n\n" once, at their start. A
    # pattern is at least as long as what it matches.
    parts = mark.split(text[max(0, searched - len(mark.pattern)) :])
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
            texts += rows.cast(pa.large_binary()).to_pylist()
            row += len(batch)
            if row >= stop:
                break
    except (pa.ArrowException, OSError) as error:
        raise _read_error(path, error) from None
    return [text if text is None else text.decode(errors="replace") for text in texts]


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


def read_txt(mark: re.Pattern | None, data: bytes) -> list[str]:
    """The documents between separators, if there is one; no document is between two in a row."""
    parts = [part for part in mark.split(data) if part] if mark else [data]
    return [part.decode(errors="replace") for part in parts]
