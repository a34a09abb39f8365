"""Text files as pieces: their texts and tokens are those of the files, wherever the cuts are."""

import os
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fineweb_helpers import (
    INVALID,
    is_damaged,
    line_of,
    pack,
    some_documents,
    texts_of,
    tokens_of,
    write_jsonl,
    write_parquet,
    write_txt,
)

import fineweb
from support import text_files, tokenizer
from support.errors import UserError

# -------------------------------------------------------------------------------------------------
# Parquet


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "dictionary"])
def test_a_parquet_column_of_any_kind_of_text(tmp_path, kind):
    """With invalid UTF-8 (except in dictionaries, which pyarrow validates) and nulls."""
    documents = [*some_documents(kind, 30), *INVALID, None, b""]
    if kind == "dictionary":
        documents = [document for document in documents if not is_damaged(document)] * 2
    if kind == "string_view":
        binary = pa.array(documents, pa.binary_view())
        column = pa.Array.from_buffers(pa.string_view(), len(binary), binary.buffers())
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    else:
        write_parquet(tmp_path / "a.parquet", documents, kind)
    texts = []
    for piece in text_files.split_into_pieces(tmp_path / "a.parquet", 0, 0, "text", ""):
        function, *arguments = piece.read
        texts += function(*arguments)
    assert [text for text in texts if text is not None] == texts_of(documents)
    assert [text is None for text in texts] == [document is None for document in documents]


@pytest.mark.parametrize("group", [1, 10, 5000])
def test_a_row_group_in_parts_gives_the_same_rows(tmp_path, monkeypatch, group):
    """Read in 1,024 rows at a time, so that parts begin and end within them."""
    documents = [b"%d" % i * (i % 7) for i in range(2600 if group > 10 else 25)]
    write_parquet(tmp_path / "a.parquet", documents, group=group)
    for size in (1, 50, 3000, 10**6):
        monkeypatch.setattr(text_files, "LARGE_GROUP", size)
        pieces = list(text_files.split_into_pieces(tmp_path / "a.parquet", 5, 0, "text", ""))
        rows, stops = [], [0]
        for piece in pieces:
            function, *arguments = piece.read
            rows += function(*arguments)
            assert piece.file == 5 and piece.start == stops[-1]
            stops.append(piece.stop)
        assert rows == texts_of(documents)
        assert len(pieces) <= text_files.MAX_PARTS * -(-len(documents) // group)
        for i, stop in enumerate(stops):
            rest = text_files.split_into_pieces(tmp_path / "a.parquet", 5, stop, "text", "")
            assert list(rest) == pieces[i:]


KINDS = ("null", "large_string", "string_view", "dictionary", "dictionary of large")


@pytest.mark.parametrize(
    "kind, rows", [*((kind, rows) for kind in KINDS for rows in (3, 0)), ("no", 0), ("number", 0)]
)
def test_parts_without_texts_and_other_types_do_not_stop_the_dataset(tmp_path, kind, rows):
    """A part whose rows are all null, as pandas writes it, or that has no rows or columns."""
    kinds = {
        "null": pa.null(), "large_string": pa.large_string(), "string_view": pa.string_view(),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
        "dictionary of large": pa.dictionary(pa.int8(), pa.large_string()), "number": pa.int64(),
    }  # fmt: skip
    texts = [None] * rows if kind == "null" else ["one", None, "two"][:rows]
    column = pa.array(texts) if kind == "null" else pa.array(texts, pa.large_string())
    table = pa.table({} if kind == "no" else {"text": column.cast(kinds[kind])})
    pq.write_table(table, tmp_path / "a.parquet")
    read = []
    for piece in text_files.split_into_pieces(tmp_path / "a.parquet", 0, 0, "text", ""):
        function, *arguments = piece.read
        read += function(*arguments)
    assert read == texts


def test_a_column_is_found_by_its_full_name(tmp_path):
    table = {"text.html": ["no"], "body": ["yes"], "body.raw": ["no"], "text": ["no"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    (piece,) = text_files.split_into_pieces(tmp_path / "a.parquet", 0, 0, "body", "")
    function, *arguments = piece.read
    assert function(*arguments) == ["yes"]


# -------------------------------------------------------------------------------------------------
# jsonl and txt

ALPHABET = [
    *(word.encode() for word in ("a", "the", " the", "'s", "12", ".", "é", "中", "😀", "\u0301")),
    *(space.encode() for space in (" ", "\n", "\n", "\n\n", "\r\n", " \n", "\n ", "\t", "\r")),
    *(space.encode() for space in ("\x0b", "\x0c", "\x1c", "\x85", "\u00a0", "\u2028", "\u3000")),
    *(b"\xff", b"\xe4\xb8", b"\xf0\x9f", b"\xa0", b"<|endoftext|>", b"a word\x00", b"word" * 20),
]  # fmt: skip


@pytest.fixture
def engine(monkeypatch):
    """`fineweb.tokenize` in this process, as in a worker."""
    monkeypatch.setattr(fineweb, "encode", tokenizer.get_encoder(), raising=False)


@pytest.mark.parametrize("separator", [None, "", "\n", "\n\n", "\r\n\r\n", "aa", "é", "\n\na\n\n"])
def test_cuts_change_nothing(tmp_path, monkeypatch, engine, separator):
    """Pieces of a few bytes give the tokens of the file, and the same pieces from any cut on.

    separator: None for a jsonl. Some of them overlap themselves, some span the cuts.
    """
    several = 0
    for seed in range(60):
        choose = random.Random(f"{separator} {seed}")
        monkeypatch.setattr(text_files, "PIECE", choose.randint(7, 200))
        letters = choose.sample(ALPHABET, choose.choice([2, 5, len(ALPHABET)])) + [b"a", b"\n"]
        letters += [(separator or "").encode()] * 2
        parts = choose.choices(letters, k=choose.choice([0, 1, 10, 300]))
        ending = choose.choice(("", ".gz", ".zst"))
        if separator is None:
            path, documents = tmp_path / f"{seed}.jsonl{ending}", [*parts, None, b""]
            write_jsonl(path, documents, choose.choice([b"\n", b"\r\n", b"\n \n"]))
        else:
            path, documents = tmp_path / f"{seed}.txt{ending}", [b"".join(parts)]
            write_txt(path, documents[0])
            if separator:  # whose line ends match LF and CRLF
                mark = separator.replace("\r", "").replace("\n", "\r?\n").encode()
                documents = [part for part in re.split(mark, documents[0]) if part]
        arguments = ("text", separator or "")
        pieces = list(text_files.split_into_pieces(path, 0, 0, *arguments))
        results = [fineweb.tokenize(piece.begins, piece.read) for piece in pieces]
        tokens = np.concatenate([tokens for tokens, _ in results])
        assert np.array_equal(tokens, tokens_of(texts_of(documents))), (seed, pieces)
        assert sum(counts[0] for _, counts in results) == len(texts_of(documents))
        assert sum(counts[1] for _, counts in results) == documents.count(None)
        several += len(pieces) > 2
        for i, piece in enumerate(pieces):
            rest = text_files.split_into_pieces(path, 0, piece.stop, *arguments)
            assert list(rest) == pieces[i + 1 :], (seed, piece)
    assert several > 10


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n", "\r\n\r\n", " \n"])
def test_a_long_text_is_cut_whatever_ends_its_lines(tmp_path, monkeypatch, line_end):
    """So that memory stays bounded and the workers share it."""
    monkeypatch.setattr(text_files, "PIECE", 1000)
    (tmp_path / "a.txt").write_bytes(line_end.join(["A line of some words."] * 1000).encode())
    pieces = list(text_files.split_into_pieces(tmp_path / "a.txt", 0, 0, "text", ""))
    assert max(piece.stop - piece.start for piece in pieces) <= 2000


def test_lone_surrogates_of_json_become_replacement_characters(tmp_path, engine):
    lines = [r'{"text": "\ud800 x \udc00\ud83d"}', r'{"text": "\ud83d\ude00\ud83d"}', ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (piece,) = text_files.split_into_pieces(tmp_path / "a.jsonl", 0, 0, "text", "")
    tokens, _ = fineweb.tokenize(piece.begins, piece.read)
    assert np.array_equal(tokens, tokens_of(["\ufffd x \ufffd\ufffd", "😀\ufffd"]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz"])
def test_a_truncated_compressed_file_is_refused(tmp_path, monkeypatch, name):
    """Its end is not used as if it were complete."""
    data = b"".join(line_of(document) + b"\n" for document in some_documents(name, 50))
    (tmp_path / name).write_bytes(pack(name, data)[:-9])
    monkeypatch.setattr(text_files, "PIECE", 500)
    with pytest.raises(UserError, match="cannot be read"):
        list(text_files.split_into_pieces(tmp_path / name, 0, 0, "text", ""))


# -------------------------------------------------------------------------------------------------
# Finding the files


@pytest.mark.parametrize(
    "source, names",
    [
        (".", ["a-b/1.txt", "a/1.txt", "a/b/2.jsonl.zst", "c.json", "z.PARQUET"]),
        ("c.json", ["c.json"]),
        ("*/*.txt", ["a-b/1.txt", "a/1.txt"]),
        ("**/*", ["a-b/1.txt", "a/1.txt", "a/b/2.jsonl.zst", "c.json", "z.PARQUET"]),
        ("**", ["a-b/1.txt", "a/1.txt", "a/b/2.jsonl.zst", "c.json", "z.PARQUET"]),
        ("**/**/*.*", ["a-b/1.txt", "a/1.txt", "a/b/2.jsonl.zst", "c.json", "z.PARQUET"]),
        ("a*/**/*.*", ["a-b/1.txt", "a/1.txt", "a/b/2.jsonl.zst"]),
        ("nothing", None),
        ("*.txt", None),
    ],
)
def test_the_files_of_a_source(tmp_path, capsys, source, names):
    """Sorted by name, without hidden files, unknown kinds and the content of `out`."""
    out = tmp_path / "a" / "out"
    for name in (
        "z.PARQUET", "a/b/2.jsonl.zst", "a/1.txt", "a-b/1.txt", "c.json", "README.md", "d.gz",
        "d.parquet.gz", ".e.txt", ".git/f.txt", "a/.cache/deep/g.jsonl", "txt", "dir.txt/x.md",
        "a/out/manifest.json", "a/out/h.txt", "a/out/deep/i.txt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = text_files.find_files(str(tmp_path / source), out)
    expected = sorted(tmp_path / name for name in names) if names else None
    assert found == expected
    printed = capsys.readouterr().err
    assert ("README.md" in printed) == (source in (".", "**", "**/*", "**/**/*.*"))


@pytest.mark.parametrize("pattern", ["", "**", "**/*.txt", "*/**/*.txt", "**/**/*.txt"])
def test_links_are_followed_and_each_directory_is_read_once(tmp_path, pattern):
    """Loops of links end: to a parent, to itself, two in one directory, and between two."""
    source, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for directory in (source / "a", source / "b", elsewhere / "deep"):
        directory.mkdir(parents=True)
        (directory / "1.txt").write_text("x")
    (source / "linked").symlink_to(elsewhere)
    for link, target in (("a/up", ".."), ("a/again", "."), ("b/a", "../a"), ("a/b", "../b")):
        (source / link).symlink_to(target)
    (elsewhere / "deep" / "back").symlink_to(source)
    (source / "b" / "2.txt").symlink_to("1.txt")
    found = text_files.find_files(str(source / pattern), tmp_path / "out")
    names = sorted(f"{file.parent.resolve().name}/{file.name}" for file in found)
    assert names == ["a/1.txt", "b/1.txt", "b/2.txt", "deep/1.txt"]


@pytest.mark.parametrize("pattern", ["", "*", "gone.txt", "**/*.txt"])
@pytest.mark.parametrize("target", ["nowhere.txt", "gone.txt"])
def test_a_dangling_link_is_named(tmp_path, pattern, target):
    """To a file that is not there, or to itself."""
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "gone.txt").symlink_to(target)
    with pytest.raises(UserError, match=r"gone\.txt: .*link"):
        text_files.find_files(str(tmp_path / pattern), tmp_path / "out")


def test_a_dangling_link_to_a_directory_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "disk2").symlink_to("/mnt/not_mounted/data")
    with pytest.raises(UserError, match=r"disk2: .*link"):
        text_files.find_files(str(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("pattern", ["", "**", "*/*", "**/*.txt"])
def test_files_that_macos_adds_are_not_read(tmp_path, capsys, pattern):
    names = ("a/._1.txt", "a/.DS_Store", "__MACOSX/a/1.txt", "__MACOSX/a/._1.txt", "._a/1.txt")
    for name in ("a/1.txt", *names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = text_files.find_files(str(tmp_path / pattern), tmp_path / "out")
    assert found == [tmp_path / "a/1.txt"] and capsys.readouterr().err == ""


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
@pytest.mark.parametrize("what", ["b", "b/2.txt"])
def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, pattern, what):
    """A directory without permission to list it, or to look at its files (root always may)."""
    (tmp_path / "b").mkdir()
    for name in ("1.txt", "b/2.txt"):
        (tmp_path / name).write_text("x")
    real = {name: getattr(os, name) for name in ("scandir", "stat")}

    def guard(name):
        def call(path=".", *arguments, **settings):
            denied = str(tmp_path / what)
            if (name, str(path)) in (("scandir", denied), ("stat", str(tmp_path / "b/2.txt"))):
                raise PermissionError(13, "Permission denied", path)
            return real[name](path, *arguments, **settings)

        return call

    for name in real:
        monkeypatch.setattr(os, name, guard(name))
    with pytest.raises(UserError, match=rf"{what}: cannot be read .*ermission"):
        text_files.find_files(str(tmp_path / pattern), tmp_path / "out")


def test_directories_without_a_file_of_a_known_kind_are_refused(tmp_path):
    (tmp_path / "x.md").write_text("x")
    with pytest.raises(UserError, match="no file of a known kind"):
        text_files.find_files(str(tmp_path), tmp_path / "out")
