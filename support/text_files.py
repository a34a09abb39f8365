"""Text files as pieces that one process can tokenize: parquet, jsonl and txt, also compressed.

A file is cut at places that depend on the file alone, so that any process may go on from any of
them:

    rows of a .parquet          | group 0 | group 1 | ...       a large row group in several parts
    lines of a .jsonl           |-- 4 MB --|-- 4 MB --| ...     after a line end
    documents of a .txt         |-- 4 MB --|-- 4 MB --| ...     after a separator
    a .txt that is one document |-- 4 MB --|-- 4 MB --| ...     where no token can span the cut

The main process finds the cuts; of a parquet file a worker then reads the rows itself, of the
others it is handed the bytes.
"""

import contextlib
import functools
import glob
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from support.errors import UserError

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",  # as C4 and others call files of one object a line
    ".txt": "txt",
}
PACKED = {".gz": "gzip", ".zst": "zstd"}  # may follow .jsonl and .txt
PIECE = 4 << 20  # bytes of text, where rows and lines allow it
LARGE_GROUP = 8 * PIECE  # a row group of more is read in parts
MOST_PARTS = 16  # each part decodes the group from its beginning, so not too many


def format_of(name: str) -> tuple[str, str | None] | None:
    """("parquet", "jsonl" or "txt"; its compression) by a file's name, or None."""
    name = name.lower()
    packed = PACKED.get(Path(name).suffix)
    kind = FORMATS.get(Path(name).with_suffix("").suffix if packed else Path(name).suffix)
    return None if kind is None or (packed and kind == "parquet") else (kind, packed)


def find_local(source: str, out: Path, say) -> list[Path] | None:
    """The files that a path, a directory or a glob means, in the order of their names.

    None where it means none here. What lies in `out` is not meant; `say(line)` hears what else is
    left out of a directory.
    Raises UserError where there are files, but none of a known kind.
    """
    path, is_directory = Path(source), os.path.isdir(source)
    if os.path.isfile(source):  # which takes a name that is too long for none
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
    files = sorted({file for file in found if format_of(file.name)})  # a glob may say one twice
    if not files:
        raise UserError(
            f"source={source!r}: no file of a known kind; .parquet, .jsonl and .txt are read, the "
            "last two also as .gz and .zst"
        )
    for file in files:
        if os.fsencode(file) != str(file).encode(errors="replace"):
            raise UserError(f"{str(file)!r}: a file's name must be UTF-8; rename it")
    if others := sorted(set(found) - set(files)):
        names = ", ".join(str(file) for file in others[:3])
        say(f"left out, of no known kind: {names}{' ...' if len(others) > 3 else ''}")
    return files


def describe_local(path: Path) -> dict:
    """What is recorded of a file, to know whether it is still the same."""
    status = path.stat()
    return {"file": path.name, "bytes": status.st_size, "modified": status.st_mtime_ns}


def text_bytes(path: Path, column: str) -> float:
    """About how many bytes of text a file holds, without reading it."""
    kind, packed = format_of(path.name)
    if kind == "parquet":
        with open_parquet(path, column) as parquet:
            groups = range(parquet.metadata.num_row_groups)
            return sum(group_bytes(parquet.metadata, group, column) for group in groups)
    return path.stat().st_size * (3 if packed else 1)


def unreadable(path, error: Exception) -> UserError:
    """The error to raise for a file that cannot be read."""
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{path}: cannot be read ({reason}); mend it and run the same command again")


def no_column(where: str, column: str, names) -> UserError:
    """The error to raise where a file lacks the column of the texts."""
    return UserError(
        f"{where}: no column {column!r}; choose another --text_column, "
        f"there {'is' if len(names) == 1 else 'are'} {', '.join(map(str, names)) or 'none'}"
    )


# -------------------------------------------------------------------------------------------------
# Cutting, in the main process


class Piece(NamedTuple):
    """Rows or bytes [start, stop) of file number `file`, and how a worker gets its texts."""

    file: int
    start: int
    stop: int
    read: tuple  # (function, *arguments), which gives `Texts`
    done: float  # share of the file that lies before `stop`


def pieces_of(path: Path, file: int, start: int, text_column: str, separator: str):
    """Yields the pieces of a file from `start` (0, or the `stop` of an earlier piece) on.

    text_column: of parquet and jsonl
    separator: between the documents of a txt; "": a txt is one document
    Raises UserError where the file cannot be read or has no such column.
    """
    if format_of(path.name)[0] == "parquet":
        return parquet_pieces(path, file, start, text_column)
    return stream_pieces(path, file, start, text_column, separator)


def open_parquet(path: Path | str, column: str):
    """A `pyarrow.parquet.ParquetFile`. Raises UserError if damaged or without the text column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A buffer, so that a large group is read by pages; their checksums, where it has them.
        file = pq.ParquetFile(
            pa.OSFile(os.fsencode(path)), buffer_size=1 << 20, page_checksum_verification=True
        )
        schema = file.schema_arrow
        names = schema.names
    except (pa.ArrowException, OSError, ValueError) as error:  # a name that is no UTF-8
        raise unreadable(path, error) from None
    if column not in names:
        raise no_column(str(path), column, names)
    if names.count(column) > 1:
        raise UserError(f"{path}: {names.count(column)} columns {column!r}; name another")
    kind = schema.field(column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if str(kind) not in kinds:
        raise UserError(f"{path}: text_column={column!r} holds {kind}; name a column of text")
    return file


def group_bytes(metadata, group: int, column: str) -> int:
    """The uncompressed size of a column in a row group."""
    columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    return metadata.row_group(group).column(columns.index(column)).total_uncompressed_size


def parquet_pieces(path: Path, file: int, start: int, column: str):
    """Yields row groups, large ones in parts of equally many rows."""
    with open_parquet(path, column) as parquet:
        metadata = parquet.metadata
    row = 0
    for group in range(metadata.num_row_groups):
        parts = math.ceil(group_bytes(metadata, group, column) / LARGE_GROUP)
        parts, rows = min(MOST_PARTS, max(1, parts)), metadata.row_group(group).num_rows
        each = max(1, math.ceil(rows / parts))
        for first in range(0, rows, each):
            stop = min(first + each, rows)
            if row + first >= start:
                read = (read_parquet, str(path), column, group, first, stop)
                yield Piece(file, row + first, row + stop, read, (row + stop) / metadata.num_rows)
        row += rows


def stream_pieces(path: Path, file: int, start: int, column: str, separator: str):
    """Yields about PIECE bytes of a jsonl or txt at a time, cut where its kind allows it."""
    import pyarrow as pa

    kind, packed = format_of(path.name)
    if kind == "jsonl":
        read, find_cut = (read_jsonl, str(path), column), after_line
    elif separator:
        mark = os.fsencode(separator)
        read, find_cut = (read_separated, mark), functools.partial(after_separator, mark)
    else:
        read, find_cut = (read_text,), between_lines
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(pa.OSFile(os.fsencode(path)))
            stream, size = raw, raw.size()
            if packed and size == 0:
                raise EOFError("empty, which no packed file is")
            if packed:
                stream = stack.enter_context(pa.CompressedInputStream(raw, packed))
                skip(stream, start)
            else:
                raw.seek(start)
            text, searched = bytearray(), 0
            # Up to a multiple of PIECE, so that the cuts after `start` depend on `start` alone.
            while block := stream.read(PIECE - len(text) % PIECE):
                text += block
                if len(text) % PIECE:  # less came than was asked for
                    continue
                if cut := find_cut(text, searched):
                    part, done = bytes(text[:cut]), raw.tell() / size
                    yield Piece(file, start, start + cut, (*read, start, part), done)
                    start += cut
                    del text[:cut]
                searched = len(text)
            if text or start == 0:  # an empty file, too, may be a document
                stop = start + max(1, len(text))  # so that to go on from it is not to begin again
                yield Piece(file, start, stop, (*read, start, bytes(text)), 1.0)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise unreadable(path, error) from None


def skip(stream, count: int) -> None:
    """Reads `count` bytes and forgets them."""
    while count > 0 and (block := stream.read(min(count, PIECE))):
        count -= len(block)


# Each finds the last place to cut in `text`, whose first `searched` bytes hold none; 0 for none.


def after_line(text: bytearray, searched: int) -> int:
    """Where the last whole line ends that was found from `searched` on; 0: nowhere."""
    return text.rfind(b"\n", searched) + 1


def after_separator(separator: bytes, text: bytearray, searched: int) -> int:
    """Where the last separator ends that was found from `searched` on; 0: nowhere."""
    # Found from left to right, as `split` does: b"\n\n" stands once in three line ends, first.
    parts = text[max(0, searched - len(separator) + 1) :].split(separator)
    return len(text) - len(parts[-1]) if len(parts) > 1 else 0


def between_lines(text: bytearray, searched: int) -> int:
    """Before a line end that is followed by a character that is no white space.

    There GPT-2's pre-tokenizer makes that line end a token of its own, and what white space is
    before it another one, as at the end of a text: the tokens of the two sides are those of the
    whole.
    """
    end = len(text) - 4  # the character after it must be here in full
    while (i := text.rfind(b"\n", max(0, searched - 5), max(0, end))) > 0:
        after = bytes(text[i + 1 : i + 5]).decode(errors="ignore")[:1]
        if after and not after.isspace():
            return i
        end = i
    return 0


# -------------------------------------------------------------------------------------------------
# Reading, in the workers


class Texts(NamedTuple):
    """The texts of a piece (None: a null), whether the first one begins a document, and how many
    had bytes that are no UTF-8, which became U+FFFD."""

    texts: list
    begins: bool
    replaced: int


def decode(data: bytes) -> tuple[str, bool]:
    """(text, whether some of it was no UTF-8)."""
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return data.decode(errors="replace"), True


cached_parquet = functools.lru_cache(maxsize=2)(open_parquet)


def read_parquet(path: str, column: str, group: int, first: int, stop: int) -> Texts:
    """Rows [first, stop) of a row group."""
    import pyarrow as pa

    texts, replaced, row = [], 0, 0
    try:
        batches = cached_parquet(path, column).iter_batches(
            1024, [group], [column], use_threads=False
        )
        for batch in batches:
            rows = batch.column(0)[max(0, first - row) : max(0, stop - row)]
            try:
                texts += rows.to_pylist()
            except UnicodeDecodeError:
                texts += rows.cast(pa.binary()).to_pylist()
            row += len(batch)
            if row >= stop:
                break
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from None
    for i, text in enumerate(texts):
        if isinstance(text, bytes):
            texts[i], damaged = decode(text)
            replaced += damaged
    return Texts(texts, True, replaced)


def read_jsonl(path: str, column: str, start: int, data: bytes) -> Texts:
    """The column of each line's object; empty lines are skipped."""
    texts, replaced = [], 0
    for line in data.split(b"\n"):
        here, start = start, start + len(line) + 1
        if not line.strip():
            continue
        text, damaged = decode(line)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = f"the line at byte {here:,} is no JSON: {error}"
            raise unreadable(path, ValueError(reason)) from None
        if not isinstance(row, dict):
            raise unreadable(path, ValueError(f"the line at byte {here:,} is no JSON object"))
        if column not in row:
            raise no_column(f"{path}: in the line at byte {here:,}", column, row)
        if not isinstance(row[column], str | None):
            reason = f"{column!r} in the line at byte {here:,} is no text"
            raise unreadable(path, ValueError(reason))
        texts.append(row[column])
        replaced += damaged
    return Texts(texts, True, replaced)


def read_separated(separator: bytes, start: int, data: bytes) -> Texts:
    """The documents between separators; nothing between two of them is no document."""
    pairs = [decode(part) for part in data.split(separator) if part]
    return Texts([text for text, _ in pairs], True, sum(damaged for _, damaged in pairs))


def read_text(start: int, data: bytes) -> Texts:
    """All of one document, or the part from byte `start` on."""
    text, damaged = decode(data)
    return Texts([text], start == 0, int(damaged))
