"""One rule for reading text, in every command: the encodings and line ends of Windows."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from fineweb_helpers import ENCODING, TEXT, in_order, pack, tokens_of

from support import text_encoding
from support.errors import SettingError
from support.shards import open_splits

pytest_plugins = ["fineweb_helpers"]
MARK = b"\xef\xbb\xbf"
WINDOWS = {
    "CRLF": TEXT[:3000].replace("\n", "\r\n").encode(),
    "a UTF-8 byte order mark": MARK + TEXT[:3000].encode(),
    "both": MARK + TEXT[:3000].replace("\n", "\r\n").encode(),
    "a second mark is text": MARK + MARK + "Ünited".encode() * 20,
    "only carriage returns": b"one\rtwo\r\rthree\r" * 9,
    "a line end first": MARK + b"\r\n\r\na" * 9,
    "a few NUL": b"\0one two three four" * 9,
    "a million spaces": b"a" + b" " * 1_100_000 + b"b",
}
FOREIGN = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")


def text_of(data: bytes) -> str:
    """The expected text of a file."""
    return data.removeprefix(MARK).decode()


@pytest.mark.parametrize("case", WINDOWS)
def test_the_trainer_and_fineweb_read_the_same_tokens(case, tmp_path, run_here):
    data = WINDOWS[case]
    (tmp_path / "x.txt").write_bytes(data)
    streams = open_splits(str(tmp_path / "x.txt")).values()
    trainer = np.concatenate([stream.read(0, len(stream)) for stream in streams])
    run_here(tmp_path / "x.txt", tmp_path / "out")
    assert np.array_equal(in_order(tmp_path / "out"), [50256, *trainer])
    if case != "a million spaces":  # which tiktoken itself does not encode
        assert trainer.tolist() == ENCODING.encode_ordinary(text_of(data))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("size", [4, 9, 1000, 4 << 20])
def test_a_byte_order_mark_is_dropped_from_each_file(name, size, tmp_path, run_here):
    """Wherever the file is cut; only its first bytes are a mark."""
    (tmp_path / "in").mkdir()
    for prefix in ("1", "2"):
        lines = b'{"text": "\xef\xbb\xbfone"}\r\n{"text": "two"}\r\n'
        data = MARK + (lines if "jsonl" in name else b"\n" + MARK + b"one\ntwo\n")
        (tmp_path / "in" / (prefix + name)).write_bytes(pack(name, data))
    run_here(tmp_path / "in", tmp_path / "out", changes={"support.text_files.PIECE": size})
    texts = ["\ufeffone", "two"] if "jsonl" in name else ["\n\ufeffone\ntwo\n"]
    assert np.array_equal(in_order(tmp_path / "out"), tokens_of(texts * 2))


@pytest.mark.parametrize("encoding", FOREIGN)
def test_utf_16_and_utf_32_are_refused(encoding, tmp_path, refused):
    """With a byte order mark or without; also packed, and as the last of several files."""
    (tmp_path / "1.txt").write_text(TEXT)
    rows = '{"text": "One."}\n{"text": "Two."}\n'
    for name in ("2.txt", "2.txt.gz", "2.jsonl", "2.jsonl.zst"):
        data = (rows if "jsonl" in name else TEXT[:9000]).encode(encoding)
        (tmp_path / name).write_bytes(pack(name, data))
        refused(name, "UTF-16", "iconv", source=tmp_path)
        if name == "2.txt":
            with pytest.raises(SettingError, match=r"2\.txt.*UTF-16.*iconv"):
                open_splits(name)
        (tmp_path / name).unlink()


def test_utf_16_in_which_few_bytes_are_nul_is_known_by_its_mark(tmp_path, refused):
    (tmp_path / "a.txt").write_bytes("床前明月光".encode("utf-16"))
    refused("a.txt", "UTF-16", "iconv", source="a.txt")


def test_decode():
    assert text_encoding.decode(MARK + "é\r\n\ufeff".encode()) == "é\r\n\ufeff"
    assert text_encoding.decode(MARK) == text_encoding.decode(b"") == ""
    for start, data in ((3, b"caf\xe9"), (6, MARK + b"caf\xe9")):
        with pytest.raises(ValueError, match=f"UTF-8 at byte {start};.*iconv"):
            text_encoding.decode(data)
    with pytest.raises(ValueError, match=r"UTF-16.*iconv"):
        text_encoding.decode("One.".encode("utf-16"))


@pytest.mark.parametrize("separator", [r"\n\n", r"\r\n\r\n", r"\n\r\n"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_separator_of_line_ends_matches_lf_and_crlf(separator, line_end, tmp_path, run_here):
    documents = [f"one{line_end}two", "three", f"four{line_end}"]
    text = (line_end * 2).join([*documents[:2], "", documents[2]]) + line_end
    (tmp_path / "a.txt").write_bytes(text.encode())
    run_here(tmp_path / "a.txt", tmp_path / "out", separator=separator)
    # Of three line ends the first two are the separator.
    assert np.array_equal(in_order(tmp_path / "out"), tokens_of([*documents[:2], "four"]))


def test_a_carriage_return_in_a_separator(tmp_path, run_here):
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\r\rthree")
    run_here(tmp_path / "a.txt", tmp_path / "out", separator=r"\r\r")
    assert np.array_equal(in_order(tmp_path / "out"), tokens_of(["one\rtwo", "three"]))


@pytest.mark.parametrize("name", ["NOTES.TXT", "Notes.Txt"])
def test_a_text_is_known_by_its_suffix_in_any_case(name, tmp_path):
    (tmp_path / name).write_text("Some words. " * 9)
    assert sum(map(len, open_splits(str(tmp_path / name)).values())) == 28


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_checkout_with_autocrlf_has_the_same_bytes(tmp_path):
    """The default of Git for Windows, tried on a repository of the files whose bytes matter."""
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    shutil.copytree(ROOT / "support", origin / "support", ignore=shutil.ignore_patterns("__*"))
    shutil.copytree(ROOT / "docs", origin / "docs")
    for name in ("input.txt", "train_gpt2.py", ".gitattributes"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, origin)
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -q -m all"):
        subprocess.run(["git", *command.split()], cwd=origin, check=True)
    command = ["git", "-c", "core.autocrlf=true", "clone", "-q", str(origin), str(clone)]
    subprocess.run(command, check=True)
    files = [path.relative_to(origin) for path in origin.rglob("*") if path.is_file()]
    files = [path for path in files if path.parts[0] != ".git"]
    assert Path("support/gpt2.tiktoken") in files and Path("input.txt") in files
    changed = [
        path for path in files if (clone / path).read_bytes() != (origin / path).read_bytes()
    ]
    assert not changed, f"add {changed} to .gitattributes"
