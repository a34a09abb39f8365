"""fineweb.py's shards are those of a plain loop over the documents, whatever happens on the way.

The oracle takes one document at a time through `tiktoken.encode_ordinary`, puts <|endoftext|>
before each, and saves the slices with `numpy.save`. Real processes are compared with it byte for
byte: every kind of source, hostile text, any number of workers and ranks, any start method, kills
at random and at chosen instants, damaged shards made anew.
"""

import base64
import collections
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import gigatoken
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import ROOT, environment
from filelock import FileLock

import fineweb
import train_gpt2
from support import text_files, token_shards, tokenizer
from support.errors import SettingError, UserError

# -------------------------------------------------------------------------------------------------
# The oracle

ENCODING = tokenizer.get_encoding()


def tokens_of(documents: list[str]) -> np.ndarray:
    """uint16: the documents one after another, <|endoftext|> before each."""
    ids = []
    for document in documents:
        ids += [50256, *ENCODING.encode_ordinary(document)]
    return np.array(ids, dtype=np.uint16)


def shards_of(tokens, shard_size: int, val_tokens: int = 0) -> dict[str, bytes]:
    """{name: contents} of the shards that one process makes of these tokens."""
    if not val_tokens:
        small = len(tokens) < 2 * shard_size
        val_tokens = max(1, len(tokens) // 10) if small else shard_size
    cuts = [0, *range(val_tokens, len(tokens), shard_size), len(tokens)]
    shards = {}
    for number, (start, stop) in enumerate(zip(cuts, cuts[1:])):
        file, split = io.BytesIO(), "train" if number else "val"
        np.save(file, tokens[start:stop])
        shards[f"edufineweb_{split}_{number:06d}.npy"] = file.getvalue()
    return shards


def shards_in(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.npy"))}


def in_order(out: Path) -> np.ndarray:
    """All tokens in a directory of shards: those of val, then those of train by file name."""
    files = sorted(out.glob("*_val_*.npy")) + sorted(out.glob("*_train_*.npy"))
    return np.concatenate([np.load(file) for file in files])


def manifest_of(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def no_leftovers(out: Path) -> bool:
    """Whether a finished directory holds nothing but shards, manifests and locks."""
    known = r"edufineweb_(train|val)(_\d{5})?_\d{6}\.npy|manifest(_\d{5})?\.json|\.lock_\d{5}"
    return all(re.fullmatch(known, path.name) for path in out.iterdir())


# -------------------------------------------------------------------------------------------------
# Texts, and files that hold them

WORDS = (ROOT / "input.txt").read_text(encoding="utf-8").split(" ")
INVALID = [b"caf\xe9 au lait", b"\xff\xfe", b"cut \xe4\xb8", b"\xed\xa0\x80 \xc0\x80", b"\xf4\x90a"]
HOSTILE = [
    "床前明月光,疑是地上霜。 日本語のテキスト、カタカナ。 한국어 㐀 𠀀𪜶",
    "بِسْمِ اللَّهِ ١٢٣٤ السلام عليكم\u200f؟ \u202bעברית\u202c 123",
    "👩\u200d👩\u200d👧 👍🏽 🏳\ufe0f\u200d🌈 🇩🇪🇫🇷 ❤\ufe0fa👨\u200d💻b\u200d 1\ufe0f\u20e3",
    "".join(map(chr, range(0x20))) + "a\x00b\x7f\x80\x85\x9f \x1b[31m\r\n\x0b\x0c\ufeff\u2028x",
    "special <|endoftext|> as text<|endoftext|><|endoftext|>",
    "Unicode 17: \u088f \u0c5c\u0cdc \ua7ce\ua7d2 \U00010940 \U00011de0\U00011de9 \U00016ea0 a",
    "I'm you'RE 'tis ''s a'lll  don’t\n\n\n \t\r\n  x  \u00a0\u3000 ",
    "",
]


def words(choose: random.Random, most: int = 150) -> str:
    start = choose.randrange(len(WORDS) - most)
    return " ".join(WORDS[start : start + choose.randint(1, most)])


def some_documents(seed, count: int, nulls: bool = True) -> list[bytes | None]:
    """Words for the most part; some hostile, some that are no UTF-8, an empty one, nulls."""
    choose = random.Random(seed)
    documents = [words(choose).encode() for _ in range(count)]
    rare = [choose.choice(HOSTILE).encode(), choose.choice(INVALID), b"", *[None] * nulls]
    for document in rare:
        documents.insert(choose.randrange(len(documents)), document)
    return documents


def texts_of(documents: list[bytes | None]) -> list[str]:
    """The rule for what is no UTF-8, and for nulls."""
    return [document.decode(errors="replace") for document in documents if document is not None]


def is_damaged(document: bytes | None) -> bool:
    return document is not None and "\ufffd" in document.decode(errors="replace")


def column_of(documents: list[bytes | None], kind: str) -> pa.Array:
    """Of type "string", "large_binary", ..., with whatever bytes there are."""
    if kind == "dictionary":
        distinct = sorted({document for document in documents if document is not None})
        index = [None if document is None else distinct.index(document) for document in documents]
        return pa.DictionaryArray.from_arrays(index, column_of(distinct, "string"))
    binary = pa.array(documents, kind.replace("string", "binary"))
    return pa.Array.from_buffers(pa.type_for_alias(kind), len(binary), binary.buffers())


def write_parquet(path: Path, documents, kind: str = "string", group: int = 7) -> None:
    table = pa.table({"id": range(len(documents)), "text": column_of(documents, kind)})
    pq.write_table(table, path, row_group_size=group)


def pack(name: str, data: bytes) -> bytes:
    """As the end of the name asks for, in two members one after the other."""
    half = len(data) // 2
    if name.endswith(".gz"):
        return gzip.compress(data[:half]) + gzip.compress(data[half:])
    if name.endswith(".zst"):
        zstd = pa.Codec("zstd")
        return b"".join(zstd.compress(part, asbytes=True) for part in (data[:half], data[half:]))
    return data


def line_of(document: bytes | None) -> bytes:
    """A JSON object with these very bytes in its text."""
    text = None if document is None else document.decode(errors="surrogateescape")
    row = json.dumps({"id": 1, "text": text}, ensure_ascii=False)
    return row.encode(errors="surrogateescape")


def write_jsonl(path: Path, documents, line_end: bytes = b"\n") -> None:
    path.write_bytes(pack(path.name, b"".join(line_of(doc) + line_end for doc in documents)))


def write_txt(path: Path, document: bytes) -> None:
    path.write_bytes(pack(path.name, document))


class Corpus(NamedTuple):
    path: Path
    files: list[str]
    texts: list[str]
    totals: dict  # documents, nulls, replaced
    tokens: np.ndarray

    def shards(self, shard_size: int, val_tokens: int = 0) -> dict[str, bytes]:
        return shards_of(self.tokens, shard_size, val_tokens)


def corpus_of(path: Path, documents: dict[str, list]) -> Corpus:
    """documents: of each file, in any order"""
    files = sorted(documents, key=lambda name: Path(name).parts)
    flat = [document for file in files for document in documents[file]]
    totals = {
        "documents": len(flat) - flat.count(None),
        "nulls": flat.count(None),
        "replaced": sum(map(is_damaged, flat)),
    }
    names = [Path(file).name for file in files]
    return Corpus(path, names, texts_of(flat), totals, tokens_of(texts_of(flat)))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Corpus:
    """A directory with files of all kinds, some of which are to be left alone."""
    directory = tmp_path_factory.mktemp("mixed")
    documents = {name: some_documents(name, 12) for name in PARQUET | JSONL}
    documents["dictionary.parquet"] = [words(random.Random(i)).encode() for i in range(9)] * 2
    documents |= {name: some_documents(name, 1, False)[i : i + 1] for i, name in enumerate(TXT)}
    documents["text/long.txt"] = [" ".join(WORDS[:3000]).encode() + b"\xff\n and \xe9 so on"]
    for name, held in documents.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in PARQUET:
            write_parquet(path, held, PARQUET[name])
        elif name in JSONL:
            write_jsonl(path, held, JSONL[name])
        else:
            write_txt(path, held[0])
    for name in (".hidden.txt", "README.md", "text/notes.text", "text/shard.npy"):
        (directory / name).write_text("left out", encoding="utf-8")
    return corpus_of(directory, documents)


PARQUET = {
    "a.parquet": "string",
    "large.parquet": "large_string",
    "Binary.PARQUET": "binary",
    "large_binary.parquet": "large_binary",
    "dictionary.parquet": "dictionary",
}
JSONL = {  # with the ends of their lines
    "b.jsonl": b"\n",
    "c.jsonl.gz": b"\r\n",
    "d.jsonl.zst": b"\n\n  \n",
    "sub/e.json.gz": b"\n",
    "sub-/f.ndjson": b"\n",
    "sub/g.JSON": b"\n",
}
TXT = ("text/a.txt", "text/b.txt.gz", "text/c.txt.zst", "text/empty.txt")
SHARD = 1000  # tokens, for the directory above: 26 shards

# -------------------------------------------------------------------------------------------------
# Processes

LAUNCHERS = ("SLURM", "LOCAL_", "HF_", "RANK", "WORLD_SIZE")
ENVIRONMENT = {n: v for n, v in environment().items() if not n.startswith(LAUNCHERS)}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1"}

# fineweb.py after what a test wants otherwise: constants, the start method, less patience.
DRIVER = """
import importlib, json, sys
import fineweb, filelock
method, changes = json.loads(sys.argv[1])
if method:
    fineweb.START_METHOD = method
for name, value in changes.items():
    module, constant = name.rsplit(".", 1)
    setattr(importlib.import_module(module), constant, value)
patient = filelock.FileLock
filelock.FileLock = lambda path, timeout: patient(path, timeout=min(timeout, LOCK_S))
sys.argv[1:] = sys.argv[2:]
""".replace("LOCK_S", "10")
RUN = "fineweb.run_main(fineweb.main)\n"
SMALL_PIECES = {"support.text_files.PIECE": 700, "support.text_files.LARGE_GROUP": 1000}
SLOW = SMALL_PIECES | {"fineweb.SAVE_S": 0.01}  # records its place after almost every piece


def command(source, out, *, method=None, changes=None, driver=DRIVER + RUN, **settings):
    """The command line of a run: of the script itself, or of the driver."""
    program = [str(ROOT / "fineweb.py")]
    if method or changes or driver != DRIVER + RUN:
        program = ["-c", driver, json.dumps([method, changes or {}])]
    settings = {"source": source, "out": out, "workers": 1} | settings
    return [sys.executable, *program, *(f"--{name}={value}" for name, value in settings.items())]


def start(*arguments, env=None, **settings) -> subprocess.Popen:
    """A run in a group of its own, so that all its processes can be found."""
    return subprocess.Popen(
        command(*arguments, **settings), env=ENVIRONMENT | (env or {}), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, code: int | None = 0) -> subprocess.CompletedProcess:
    """Its end, which must come with this exit code (None: any) and no traceback."""
    try:
        output, errors = process.communicate(timeout=90)
    finally:
        process.kill()
    assert code is None or process.returncode == code, output + errors
    assert "Traceback" not in errors, errors
    if code == 2:
        assert errors.count("error:") == 1 and errors.splitlines()[-1].startswith("error:"), errors
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run(*arguments, code: int | None = 0, **settings) -> subprocess.CompletedProcess:
    return finish(start(*arguments, **settings), code)


def start_ranks(world: int, *arguments, names=("RANK", "WORLD_SIZE"), **settings):
    """All ranks at the same time."""
    variables = [dict(zip(names, (str(rank), str(world)))) for rank in range(world)]
    return [start(*arguments, env=env, **settings) for env in variables]


def members(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it has ended meanwhile
        if int(its_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until(condition, what: str, seconds: float = 60):
    """What `condition()` returns, once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return found


def wait_until_alone(group: int) -> None:
    wait_until(lambda: not members(group), "workers outlive their parent", 20)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the main process alone; its workers must end by themselves."""
    process.kill()
    process.wait()
    wait_until_alone(process.pid)
    process.communicate()


def wait_for_records(process: subprocess.Popen, out: Path, shards: int = 2) -> None:
    """Until a run has recorded its place and finished some shards, and is still at work."""
    wait_until(lambda: len(list(out.glob("*.npy"))) >= shards or process.poll(), "no shards")
    wait_until(lambda: list(out.glob("manifest*.partial.json")) or process.poll(), "no record")
    assert process.poll() is None, process.communicate()


# -------------------------------------------------------------------------------------------------
# The whole job

VARIANTS = {
    "the script itself": dict(workers=0),
    "two workers, spawn": dict(workers=2, method="spawn", changes=SMALL_PIECES),
    "five workers, fork": dict(workers=5, method="fork", changes=SMALL_PIECES),
    "two workers, forkserver": dict(workers=2, method="forkserver", changes=SLOW),
    "tiktoken": dict(engine="tiktoken", method="fork", changes={"support.text_files.PIECE": 64}),
}


@pytest.fixture(scope="module")
def finished(mixed, tmp_path_factory) -> Path:
    """The directory made by the script itself."""
    out = tmp_path_factory.mktemp("finished") / "shards"
    done = run(mixed.path, out, shard_size=SHARD, **VARIANTS["the script itself"])
    (out.parent / "output").write_text(json.dumps([done.stdout, done.stderr]))
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shards_are_those_of_the_plain_loop(mixed, finished, tmp_path, variant):
    """For every kind of file, any number of workers, any way to start them, and both engines."""
    out = tmp_path / "shards"
    if variant == "the script itself":
        out = finished
    else:
        run(mixed.path, out, shard_size=SHARD, **VARIANTS[variant])
    assert shards_in(out) == mixed.shards(SHARD)
    assert no_leftovers(out)


def test_the_manifest_and_the_last_line_have_the_totals(mixed, finished):
    manifest, contents = manifest_of(finished), shards_in(finished)
    stdout, stderr = json.loads((finished.parent / "output").read_text())
    total = len(mixed.tokens)
    assert manifest["totals"] == mixed.totals | {"val_tokens": SHARD, "train_tokens": total - SHARD}
    ids = sum(len(ENCODING.encode_ordinary(text)) for text in mixed.texts)
    assert total == ids + mixed.totals["documents"]
    assert [source["file"] for source in manifest["sources"]] == mixed.files
    assert [shard["file"] for shard in manifest["shards"]] == list(
        sorted(contents, key=lambda name: name.split("_")[-1])
    )
    for shard in manifest["shards"]:
        data = contents[shard["file"]]
        assert shard["bytes"] == len(data) and shard["split"] in shard["file"]
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        assert shard["tokens"] == len(np.load(io.BytesIO(data)))
    assert manifest["tokenizer"]["sha256"] == tokenizer.RANKS_SHA256
    last = stdout.splitlines()[-1]
    for number in (len(contents), total, SHARD, *mixed.totals.values()):
        assert f"{number:,} " in last, last
    assert "needs about" in stderr and "are free" in stderr
    assert "left out" in stderr and "README.md" in stderr and ".hidden" not in stderr


def test_the_trainer_reads_the_stream(mixed, finished):
    train, val = train_gpt2.open_tokens(str(finished))
    assert np.array_equal(val.read(0, len(val)), mixed.tokens[:SHARD])
    assert np.array_equal(train.read(0, len(train)), mixed.tokens[SHARD:])
    assert all(token_shards.are_whole(finished, manifest_of(finished)["shards"]))


def times_in(out: Path) -> dict[str, int]:
    """{file: when it was written}, but for the locks."""
    return {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix != ""}


def test_a_finished_directory_is_left_alone(mixed, finished):
    before = times_in(finished), shards_in(finished), manifest_of(finished)
    done = run(mixed.path, finished, shard_size=SHARD, workers=3)
    assert "finished already" in done.stdout and f"{len(mixed.tokens):,} tokens" in done.stdout
    assert (times_in(finished), shards_in(finished), manifest_of(finished)) == before


# -------------------------------------------------------------------------------------------------
# Sources: which files, and what is in them


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "dictionary"])
def test_a_parquet_column_of_any_kind_of_text(tmp_path, kind):
    """With what is no UTF-8 in it (but in dictionaries, which pyarrow checks), nulls and all."""
    documents = [*some_documents(kind, 30), *INVALID, None, b""]
    if kind == "dictionary":
        documents = [document for document in documents if not is_damaged(document)] * 2
    if kind == "string_view":
        binary = pa.array(documents, pa.binary_view())
        column = pa.Array.from_buffers(pa.string_view(), len(binary), binary.buffers())
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    else:
        write_parquet(tmp_path / "a.parquet", documents, kind)
    texts, replaced = [], 0
    for piece in text_files.pieces_of(tmp_path / "a.parquet", 0, 0, "text", ""):
        function, *arguments = piece.read
        found = function(*arguments)
        texts += found.texts
        replaced += found.replaced
    assert [text for text in texts if text is not None] == texts_of(documents)
    assert [text is None for text in texts] == [document is None for document in documents]
    assert replaced == sum(map(is_damaged, documents))


@pytest.mark.parametrize("group", [1, 10, 5000])
def test_a_row_group_in_parts_gives_the_same_rows(tmp_path, monkeypatch, group):
    """Read in 1,024 rows at a time, so that parts begin and end within them."""
    documents = [b"%d" % i * (i % 7) for i in range(2600 if group > 10 else 25)]
    write_parquet(tmp_path / "a.parquet", documents, group=group)
    for size in (1, 50, 3000, 10**6):
        monkeypatch.setattr(text_files, "LARGE_GROUP", size)
        pieces = list(text_files.pieces_of(tmp_path / "a.parquet", 5, 0, "text", ""))
        rows, stops = [], [0]
        for piece in pieces:
            function, *arguments = piece.read
            rows += function(*arguments).texts
            assert piece.file == 5 and piece.start == stops[-1]
            stops.append(piece.stop)
            assert piece.done == piece.stop / len(documents)
        assert rows == texts_of(documents)
        assert len(pieces) <= text_files.MOST_PARTS * -(-len(documents) // group)
        for i, stop in enumerate(stops):
            assert [*text_files.pieces_of(tmp_path / "a.parquet", 5, stop, "text", "")] == pieces[
                i:
            ]


def test_a_column_is_found_by_its_whole_name(tmp_path):
    table = {"text.html": ["no"], "body": ["yes"], "body.raw": ["no"], "text": ["no"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    (piece,) = text_files.pieces_of(tmp_path / "a.parquet", 0, 0, "body", "")
    function, *arguments = piece.read
    assert function(*arguments).texts == ["yes"]


ALPHABET = [
    *(word.encode() for word in ("a", "the", " the", "'s", "12", ".", "é", "中", "😀", "\u0301")),
    *(space.encode() for space in (" ", "\n", "\n", "\n\n", "\r\n", " \n", "\n ", "\t", "\r")),
    *(space.encode() for space in ("\x0b", "\x0c", "\x1c", "\x85", "\u00a0", "\u2028", "\u3000")),
    *(b"\xff", b"\xe4\xb8", b"\xf0\x9f", b"\xa0", b"<|endoftext|>", b"\x00", b"word" * 20),
]  # fmt: skip


@pytest.fixture
def engine(monkeypatch):
    """`fineweb.tokenize` in this process, as in a worker."""
    monkeypatch.setattr(fineweb, "encode", tokenizer.get_encoder(), raising=False)
    monkeypatch.setattr(fineweb, "encode_plain", tokenizer.get_encoder("tiktoken"), raising=False)


@pytest.mark.parametrize("separator", [None, "", "\n", "\n\n", "\r\n\r\n", "aa", "é", "\n\na\n\n"])
def test_cuts_change_nothing(tmp_path, monkeypatch, engine, separator):
    """Pieces of a few bytes make the tokens of the whole, and the same ones after any of them.

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
            if mark := separator.encode():
                documents = [part for part in documents[0].split(mark) if part]
        arguments = ("text", separator or "")
        pieces = list(text_files.pieces_of(path, 0, 0, *arguments))
        results = [fineweb.tokenize(piece.read) for piece in pieces]
        tokens = np.concatenate([tokens for tokens, _ in results])
        assert np.array_equal(tokens, tokens_of(texts_of(documents))), (seed, pieces)
        assert sum(counts.documents for _, counts in results) == len(texts_of(documents))
        assert sum(counts.nulls for _, counts in results) == documents.count(None)
        assert all(0 <= piece.done <= 1 for piece in pieces)
        several += len(pieces) > 2
        for i, piece in enumerate(pieces):
            rest = text_files.pieces_of(path, 0, piece.stop, *arguments)
            assert [(later.start, later.stop, later.read) for later in rest] == [
                (later.start, later.stop, later.read) for later in pieces[i + 1 :]
            ], (seed, piece)
    assert several > 10


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n", "\r\n\r\n", " \n"])
def test_a_long_text_is_cut_whatever_ends_its_lines(tmp_path, monkeypatch, line_end):
    """So that memory stays bounded and the workers share it."""
    monkeypatch.setattr(text_files, "PIECE", 1000)
    (tmp_path / "a.txt").write_bytes(line_end.join(["A line of some words."] * 1000).encode())
    pieces = list(text_files.pieces_of(tmp_path / "a.txt", 0, 0, "text", ""))
    assert max(piece.stop - piece.start for piece in pieces) <= 2000


def test_lone_surrogates_of_json_become_replacement_characters(tmp_path, engine):
    lines = [r'{"text": "\ud800 x \udc00\ud83d"}', r'{"text": "\ud83d\ude00\ud83d"}', ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (piece,) = text_files.pieces_of(tmp_path / "a.jsonl", 0, 0, "text", "")
    tokens, _ = fineweb.tokenize(piece.read)
    assert np.array_equal(tokens, tokens_of(["\ufffd x \ufffd\ufffd", "😀\ufffd"]))


def test_documents_between_separators(tmp_path):
    """Given as it is typed, with \\n for a line end; nothing between two of them is no document."""
    documents = ["one", "\ntwo\n", "three --", "fünf"]
    text = "\n--\n--\n".join(["", documents[0], "", *documents[1:], "", ""])
    (tmp_path / "a.txt").write_text(text, newline="")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    tokens = tokens_of(documents * 2)
    run(tmp_path, tmp_path / "out", separator=r"\n--\n--\n", method="fork", shard_size=7)
    assert shards_in(tmp_path / "out") == shards_of(tokens, 7)
    assert manifest_of(tmp_path / "out")["totals"]["documents"] == 8


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
def test_the_files_that_a_source_means(tmp_path, source, names):
    """In the order of their names, without the hidden, the unknown and what is in `out`."""
    out = tmp_path / "a" / "out"
    for name in (
        "z.PARQUET", "a/b/2.jsonl.zst", "a/1.txt", "a-b/1.txt", "c.json", "README.md", "d.gz",
        "d.parquet.gz", ".e.txt", ".git/f.txt", "a/.cache/deep/g.jsonl", "txt", "dir.txt/x.md",
        "a/out/manifest.json", "a/out/h.txt", "a/out/deep/i.txt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    said = []
    found = text_files.find_local(str(tmp_path / source), out, said.append)
    expected = sorted(tmp_path / name for name in names) if names else None
    assert found == expected
    assert ("README.md" in "".join(said)) == (source in (".", "**", "**/*", "**/**/*.*"))


def test_a_glob_over_the_directory_of_the_shards_finishes_again(tmp_path, text_file):
    """Its manifest and shards are not taken for sources."""
    arguments = f"{tmp_path}/**", tmp_path / "out"
    run(*arguments, method="fork")
    assert "finished already" in run(*arguments, method="fork").stdout


def test_directories_without_a_file_of_a_known_kind_are_refused(tmp_path):
    (tmp_path / "x.md").write_text("x")
    with pytest.raises(UserError, match="no file of a known kind"):
        text_files.find_local(str(tmp_path), tmp_path / "out", print)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz"])
def test_a_compressed_file_that_was_cut_off_is_told(tmp_path, monkeypatch, name):
    """And nothing is taken for its end; what comes whole before it, is."""
    data = b"".join(line_of(document) + b"\n" for document in some_documents(name, 50))
    (tmp_path / name).write_bytes(pack(name, data)[:-9])
    monkeypatch.setattr(text_files, "PIECE", 500)
    with pytest.raises(UserError, match="cannot be read"):
        list(text_files.pieces_of(tmp_path / name, 0, 0, "text", ""))


def test_what_is_no_utf_8_on_the_command_line_or_on_the_disk(tmp_path):
    """A separator of any bytes separates; a file with such a name is refused in one line."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"one\xfftwo\xff\xff")
    run(tmp_path / "in", tmp_path / "out", separator=os.fsdecode(b"\xff"), method="fork")
    assert np.array_equal(in_order(tmp_path / "out"), tokens_of(["one", "two"]))
    (tmp_path / "in" / os.fsdecode(b"caf\xe9.txt")).write_text("three")
    failed = run(tmp_path / "in", tmp_path / "other", code=2)
    assert "rename" in failed.stderr and not (tmp_path / "other").exists()


def test_a_mistyped_path_is_not_looked_for_on_the_hub(tmp_path):
    failed = run("nowhere/my.txt", tmp_path / "out", code=2)
    assert "no such file" in failed.stderr and not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------
# The two engines


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Corpus:
    """Hostile texts in all kinds of files."""
    directory, choose = tmp_path_factory.mktemp("hostile"), random.Random(0)
    letters = "".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=100_000))
    documents = [document.encode() for document in HOSTILE] + [letters.encode(), *INVALID]
    write_jsonl(directory / "a.jsonl", documents)
    write_parquet(directory / "b.parquet", documents)
    held = {"a.jsonl": documents, "b.parquet": documents}
    for number, document in enumerate(documents):
        held[f"c{number:02d}.txt"] = [document]
        write_txt(directory / f"c{number:02d}.txt", document)
    return corpus_of(directory, held)


@pytest.mark.parametrize("engine", ["gigatoken", "tiktoken"])
def test_hostile_text(hostile, tmp_path, engine):
    run(hostile.path, tmp_path / "out", method="fork", engine=engine, shard_size=20_000)
    assert shards_in(tmp_path / "out") == hostile.shards(20_000)
    totals = manifest_of(tmp_path / "out")["totals"]
    assert {name: totals[name] for name in hostile.totals} == hostile.totals


def test_both_engines_sort_every_character_alike(tmp_path, monkeypatch):
    """Letter, digit or neither, for all code points.

    Shown with ranks made for it: all single bytes, and of the pairs those of "a", "1" or "." and
    another byte. They join exactly where the pre-tokenizer leaves the two characters together.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for first in b"a1.":
        for second in range(256):
            ranks.setdefault(bytes([first, second]), len(ranks))
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (tmp_path / "pairs.tiktoken").write_bytes(b"".join(lines))
    pairs = tiktoken.Encoding(
        "pairs", pat_str=tokenizer.PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    monkeypatch.setattr(tokenizer, "RANKS", tmp_path / "pairs.tiktoken")
    monkeypatch.setattr(tokenizer, "get_encoding", lambda: pairs)
    plain, fast = map(tokenizer.get_encoder, ("tiktoken", "gigatoken"))
    for character, first in ("é", "a"), ("٣", "1"), ("—", "."):
        joined = [len(plain(other + character)) < 1 + len(character.encode()) for other in "a1."]
        assert joined == [other == first for other in "a1."], "these ranks do not tell them apart"
    alike = collections.defaultdict(list)  # by all bytes but the last: a few go to tiktoken anyhow
    for character in map(chr, [*range(0xD800), *range(0xE000, 0x110000)]):
        alike[character.encode()[:-1]].append(character)
    for characters in alike.values():
        text = "\n".join(f"a{c}\n1{c}\n.{c}" for c in characters)
        assert np.array_equal(fast(text), plain(text)), f"one of {characters[0]}..{characters[-1]}"


def test_forgetting_the_words_seen_changes_nothing(monkeypatch):
    """gigatoken's cache is thrown away now and then, so that it does not grow for days."""
    made, make = [], gigatoken.Tokenizer.from_tiktoken
    monkeypatch.setattr(tokenizer, "REMEMBERED", 2000)
    monkeypatch.setattr(
        gigatoken.Tokenizer, "from_tiktoken", lambda *arguments: made.append(1) or make(*arguments)
    )
    encode, choose = tokenizer.get_encoder("gigatoken"), random.Random(1)
    for _ in range(200):
        text = choose.choice([words(choose), *HOSTILE])
        assert encode(text).tolist() == ENCODING.encode_ordinary(text)
    assert len(made) > 5


@pytest.mark.parametrize("engine", ["gigatoken", "tiktoken"])
def test_a_million_spaces_before_a_word(engine):
    """Which is more than tiktoken's regex can take at once; the last one belongs to the word."""
    many = 1_200_000
    for ending in ("a", "\u088fa"):  # the second goes to tiktoken with both engines
        ids = tokenizer.get_encoder(engine)("b" + " " * many + ending + " " * 3)
        plain = ENCODING.encode_ordinary(" " + ending + " " * 3)
        assert ids.tolist() == ENCODING.encode_ordinary("b") + [220] * (many - 1) + plain


FAKES = {
    "missing": "raise ImportError('no wheel for this machine')",
    "wrong": "import numpy\n"
    "class Tokenizer:\n"
    "    from_tiktoken = classmethod(lambda cls, *_: cls())\n"
    "    encode = lambda self, data: numpy.zeros(len(data), dtype='uint32')",
}


@pytest.mark.parametrize("fake", FAKES)
def test_an_engine_that_does_not_serve(text_file, tmp_path, fake):
    """Missing or with other ids than tiktoken's, it is named; "auto" does without a missing one."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "gigatoken.py").write_text(FAKES[fake])
    env, out = {"PYTHONPATH": str(tmp_path / "modules")}, tmp_path / "out"
    failed = run(text_file, out, code=2, env=env, engine="gigatoken")
    assert "--engine=tiktoken" in failed.stderr and "gigatoken" in failed.stderr
    assert not shards_in(out)
    engine = "auto" if fake == "missing" else "tiktoken"
    run(text_file, out, env=env, engine=engine)
    assert shards_in(out) == shards_of(tokens_of([text_file.read_text(encoding="utf-8")]), 10**8)


# -------------------------------------------------------------------------------------------------
# Shard sizes


@pytest.fixture(scope="module")
def forty(tmp_path_factory) -> Path:
    """Three documents, 40 tokens in all."""
    path = tmp_path_factory.mktemp("forty") / "a.jsonl"
    write_jsonl(path, [b" the" * 20, b"", b" a" * 17])
    return path


FORTY = tokens_of([" the" * 20, "", " a" * 17])


@pytest.mark.parametrize(
    "shard_size, val_tokens",
    [
        (1, 0),  # a token each
        (7, 0),  # documents longer than a shard, a last shard of 5
        (8, 0),  # an exact multiple
        (20, 0),  # exactly two shards, which need no other split
        (21, 0),  # a tenth is val, the rest two shards
        (40, 0),  # one shard exactly
        (10**8, 0),
        (9, 1),
        (13, 13),
        (100, 39),
        (100, 22),
    ],
)
def test_shard_sizes(forty, tmp_path, shard_size, val_tokens):
    assert len(FORTY) == 40
    sizes = dict(shard_size=shard_size, val_tokens=val_tokens)
    run(forty, tmp_path / "out", method="fork", **sizes)
    assert shards_in(tmp_path / "out") == shards_of(FORTY, **sizes)
    train, val = train_gpt2.open_tokens(str(tmp_path / "out"))
    assert len(train) + len(val) == 40 and len(train) and len(val)


@pytest.mark.parametrize("text, val_tokens", [("", 0), ("a b c", 4), ("a b c", 100)])
def test_a_text_that_leaves_nothing_to_train_on(tmp_path, text, val_tokens):
    (tmp_path / "a.txt").write_text(text)
    for _ in range(2):
        failed = run(tmp_path, tmp_path / "out", code=2, method="fork", val_tokens=val_tokens)
        assert f"only {len(tokens_of([text]))} tokens" in failed.stderr
        assert not (tmp_path / "out").exists()


def test_the_smallest_text_with_both_splits(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    run(tmp_path, tmp_path / "out", method="fork")
    assert shards_in(tmp_path / "out") == shards_of(np.array([50256, 64], dtype=np.uint16), 1)


# -------------------------------------------------------------------------------------------------
# Several ranks


def check_ranks(out: Path, corpus: Corpus, world: int, shard_size: int, val_tokens: int) -> None:
    """All tokens in the order of the shards' names, in whole shards but for each rank's last."""
    assert no_leftovers(out)
    assert np.array_equal(in_order(out), corpus.tokens)
    manifest = manifest_of(out)
    parts = [json.loads((out / f"manifest_{r:05d}.json").read_text()) for r in range(world)]
    assert manifest["world_size"] == world
    assert [source["file"] for source in manifest["sources"]] == corpus.files
    assert [source for part in parts for source in part["sources"]] == manifest["sources"]
    names = [shard["file"] for shard in manifest["shards"]]
    assert names == sorted(names, key=lambda name: re.sub("train|val", "", name))
    assert set(names) == set(shards_in(out))
    for rank, part in enumerate(parts):
        sizes = [shard["tokens"] for shard in part["shards"]]
        assert sizes[:-1] == [val_tokens, *[shard_size] * len(sizes)][rank > 0 :][: len(sizes) - 1]
        for number, shard in enumerate(part["shards"]):
            split = "train" if rank or number else "val"
            assert shard["file"] == f"edufineweb_{split}_{rank:05d}_{number:06d}.npy"
    assert all(token_shards.are_whole(out, manifest["shards"]))
    rest = len(corpus.tokens) - val_tokens
    assert manifest["totals"] == corpus.totals | {"val_tokens": val_tokens, "train_tokens": rest}
    train, val = train_gpt2.open_tokens(str(out))
    assert np.array_equal(val.read(0, len(val)), corpus.tokens[:val_tokens])
    assert np.array_equal(train.read(0, len(train)), corpus.tokens[val_tokens:])


@pytest.fixture(scope="module")
def two_ranks(mixed, tmp_path_factory) -> Path:
    """The shards of two ranks, of which the second one worked before the first."""
    out = tmp_path_factory.mktemp("ranks") / "out"
    for rank in ("1", "0"):
        with pytest.raises(SettingError, match="directory|unfinished"):
            train_gpt2.open_tokens(str(out))
        env = {"RANK": rank, "WORLD_SIZE": "2"}
        done = run(mixed.path, out, env=env, method="fork", shard_size=SHARD)
        assert ("manifest.json comes when" in done.stdout) == (rank == "1")
    return out


def test_two_ranks_one_after_the_other(mixed, two_ranks):
    check_ranks(two_ranks, mixed, 2, SHARD, SHARD)


def test_three_ranks_at_the_same_time(mixed, tmp_path):
    settings = dict(shard_size=SHARD, workers=2, changes=SMALL_PIECES, method="fork")
    for process in start_ranks(3, mixed.path, tmp_path / "out", **settings):
        finish(process)
    check_ranks(tmp_path / "out", mixed, 3, SHARD, SHARD)


def test_srun(mixed, two_ranks, tmp_path):
    """Its variables do what RANK and WORLD_SIZE do."""
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    settings = dict(shard_size=SHARD, names=names, method="fork")
    for process in start_ranks(2, mixed.path, tmp_path / "out", **settings):
        finish(process)
    assert shards_in(tmp_path / "out") == shards_in(two_ranks)
    assert manifest_of(tmp_path / "out") == manifest_of(two_ranks)


def test_torchrun(mixed, two_ranks, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    python, *rest = command(mixed.path, tmp_path / "out", shard_size=SHARD)
    done = subprocess.run(
        [python, *launcher, *rest], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert shards_in(tmp_path / "out") == shards_in(two_ranks)
    assert manifest_of(tmp_path / "out") == manifest_of(two_ranks)


@pytest.mark.parametrize("world, shard_size", [(5, 50), (3, 10**6)])
def test_more_ranks_than_files(tmp_path, world, shard_size):
    """Those left without a file have nothing to do, and both splits are there."""
    documents = {f"{i}.jsonl": some_documents(i, 4) for i in range(2)}
    (tmp_path / "in").mkdir()
    for name, held in documents.items():
        write_jsonl(tmp_path / "in" / name, held)
    corpus, out = corpus_of(tmp_path / "in", documents), tmp_path / "out"
    for process in start_ranks(world, corpus.path, out, method="fork", shard_size=shard_size):
        finish(process)
    first_rank = tokens_of(texts_of(documents["0.jsonl"]))
    val = np.load(io.BytesIO(shards_of(first_rank, shard_size)["edufineweb_val_000000.npy"]))
    check_ranks(out, corpus, world, shard_size, len(val))


def test_ranks_that_finish_at_the_same_time_write_one_manifest(tmp_path):
    """Each finds the others' manifests there and writes that of all; none stumbles."""
    settings = {"prefix": "x", "shard_size": 5, "val_tokens": 0}
    records = [token_shards.Record(tmp_path, settings, rank, 4) for rank in range(4)]
    for rank, record in enumerate(records):
        sources = [{"file": f"{rank}_{i}.txt", "bytes": i} for i in range(1000)]
        record.begin(sources, "", None)
        record.close()
    assert records[0].merge()
    whole, together, failures = manifest_of(tmp_path), threading.Barrier(4, timeout=60), []
    assert len(whole["sources"]) == 4000

    def merge(record) -> None:
        try:
            for _ in range(25):
                together.wait()
                assert record.merge() and manifest_of(tmp_path) == whole
        except Exception as error:
            failures.append(error)
            together.abort()

    threads = [threading.Thread(target=merge, args=(record,)) for record in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("rank, world", [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_impossible_ranks_are_told(text_file, tmp_path, rank, world):
    env = {"RANK": rank, "WORLD_SIZE": world}
    failed = run(text_file, tmp_path / "out", code=2, env=env)
    assert f"RANK={rank}" in failed.stderr and not (tmp_path / "out").exists()


def test_what_only_a_later_rank_meets_is_told(two_ranks, mixed, tmp_path):
    """Its settings, its files and the directory are its own: the first rank may be fine."""
    env = {"RANK": "1", "WORLD_SIZE": "2"}
    failed = run(mixed.path, two_ranks, code=2, env=env, shard_size=SHARD + 1)
    assert f"shard_size={SHARD + 1}" in failed.stderr
    failed = run(tmp_path / "not_mounted" / "a.txt", tmp_path / "out", code=2, env=env)
    assert "no such file" in failed.stderr


def test_ranks_that_see_other_files_do_not_mix(mixed, tmp_path):
    """A rank that reads another directory is found out before there is a manifest."""
    shutil.copytree(mixed.path / "sub", tmp_path / "in")
    out, settings = tmp_path / "out", dict(method="fork", shard_size=50)
    run(tmp_path / "in", out, env={"RANK": "0", "WORLD_SIZE": "2"}, **settings)
    (tmp_path / "in" / "h.txt").write_text("more")
    failed = run(tmp_path / "in", out, code=2, env={"RANK": "1", "WORLD_SIZE": "2"}, **settings)
    assert "different sources" in failed.stderr and not (out / "manifest.json").exists()


# -------------------------------------------------------------------------------------------------
# Kills


def check_unfinished(out: Path, expected: dict[str, bytes]) -> None:
    """What has a shard's name is one; what is recorded of another one is on the disk."""
    assert all(expected[name] == data for name, data in shards_in(out).items())
    if (record := out / "manifest.partial.json").exists():
        facts = json.loads(record.read_text(encoding="utf-8"))
        if shard := facts["open"]:
            hidden = (out / f".{shard['file']}.partial").read_bytes()
            tokens = slice(token_shards.HEADER_BYTES, None)
            held = hidden[tokens][: 2 * shard["tokens"]]
            assert len(held) == 2 * shard["tokens"]
            assert expected[shard["file"]][tokens].startswith(held)


@pytest.mark.faults
def test_kills_at_random_instants(mixed, tmp_path):
    """Each of the main process alone, by SIGKILL; its workers end by themselves."""
    choose, kills, out = random.Random(0), 0, tmp_path / "out"
    expected, methods = mixed.shards(SHARD), ("fork", "spawn", "fork", "forkserver")
    settings = dict(shard_size=SHARD, changes=SLOW)
    begin = time.monotonic()
    run(mixed.path, out, method="fork", **settings)
    whole_s = time.monotonic() - begin
    shutil.rmtree(out)
    while kills < 25:
        method, workers = methods[kills % 4], choose.choice((1, 2))
        process = start(mixed.path, out, method=method, workers=workers, **settings)
        try:
            process.wait(timeout=choose.uniform(0.2, 0.9) * whole_s)
            finish(process)
            assert shards_in(out) == expected
            shutil.rmtree(out)  # and once more
        except subprocess.TimeoutExpired:
            kill(process)
            kills += 1
            check_unfinished(out, expected)
    run(mixed.path, out, method="fork", **settings)
    assert shards_in(out) == expected and no_leftovers(out)
    totals = manifest_of(out)["totals"]
    assert {n: totals[n] for n in ("documents", "nulls")} == {
        n: mixed.totals[n] for n in ("documents", "nulls")
    }


# Each run of the chain dies just before the second time that it would give a file its name.
CHAIN = """
import os, signal
kills = 0
while True:
    if not (child := os.fork()):
        replace, calls = os.replace, []
        def deadly(*arguments):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*arguments)
        os.replace = deadly
        fineweb.run_main(fineweb.main)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        break
    kills += 1
print(kills, "kills")
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("shard_size", [pytest.param(25, marks=pytest.mark.faults), 11])
def test_kills_between_any_two_renames(forty, tmp_path, shard_size):
    """Between the record and the name of a shard, too, and amid the split of a small text."""
    settings = dict(shard_size=shard_size, method="fork", changes={"support.text_files.PIECE": 60})
    done = run(forty, tmp_path / "out", driver=DRIVER + CHAIN, **settings)
    assert int(re.search(r"(\d+) kills", done.stdout)[1]) >= 5
    assert "missing or altered" not in done.stderr  # the work of no run is lost
    assert shards_in(tmp_path / "out") == shards_of(FORTY, shard_size)
    assert no_leftovers(tmp_path / "out")
    for number, path in enumerate(sorted((tmp_path / "out").glob("*.npy"))[::2]):
        damage(path, number % 3)
    run(forty, tmp_path / "out", driver=DRIVER + CHAIN, **settings)
    assert shards_in(tmp_path / "out") == shards_of(FORTY, shard_size)


def test_a_kill_of_one_rank_among_two(mixed, two_ranks, tmp_path):
    out, settings = tmp_path / "out", dict(method="fork", changes=SLOW, shard_size=SHARD)
    killed, other = start_ranks(2, mixed.path, out, **settings)
    wait_until(lambda: list(out.glob("*_val_*.npy")) or killed.poll(), "no shards")
    kill(killed)
    finish(other)
    assert not (out / "manifest.json").exists()
    run(mixed.path, out, env={"RANK": "0", "WORLD_SIZE": "2"}, **settings)
    assert shards_in(out) == shards_in(two_ranks)
    check_ranks(out, mixed, 2, SHARD, SHARD)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_it_and_the_same_command_goes_on(mixed, tmp_path, number, code):
    """SIGINT to all processes, as ^C in a terminal sends it; SIGTERM to the main one."""
    out, settings = tmp_path / "out", dict(workers=2, shard_size=SHARD, changes=SLOW)
    process = start(mixed.path, out, **settings)
    wait_for_records(process, out)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    stopped = finish(process, code)
    assert number == signal.SIGTERM or stopped.stderr.splitlines()[-1] == "interrupted"
    wait_until_alone(process.pid)
    with pytest.raises(SettingError, match="unfinished"):
        train_gpt2.open_tokens(str(out))
    done = run(mixed.path, out, **settings)
    assert "going on after" in done.stderr
    assert shards_in(out) == mixed.shards(SHARD)


@pytest.mark.parametrize("later_s", [pytest.param(0, marks=pytest.mark.faults), 0.1])
def test_control_c_while_the_workers_start(mixed, tmp_path, later_s):
    """While some of them are born, or import what they need: it is heard, and none tells of it."""
    process = start(mixed.path, tmp_path / "out", workers=5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: len(children.read_text().split()) > 2, "no workers")
    time.sleep(later_s)
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process, 130).stderr.splitlines()[-1] == "interrupted"


def test_workers_that_cannot_start_end_the_run(text_file, tmp_path):
    (tmp_path / "gigatoken.py").write_text(
        "import multiprocessing, os\nif multiprocessing.parent_process():\n    os._exit(1)\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    failed = run(text_file, tmp_path / "out", code=2, env=env, workers=5)
    assert "a process that tokenizes died" in failed.stderr


@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=pytest.mark.faults)])
def test_a_worker_that_dies_ends_the_run(mixed, tmp_path, method):
    """With one line, not a hang; the same command goes on."""
    out, settings = tmp_path / "out", dict(workers=2, shard_size=SHARD, changes=SLOW)
    process = start(mixed.path, out, method=method, **settings)
    wait_for_records(process, out)
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in members(process.pid)}
    workers = [pid for pid in lines if pid != process.pid and "resource_tracker" not in lines[pid]]
    os.kill(workers[0], signal.SIGKILL)
    failed = finish(process, 2)
    assert "a process that tokenizes died" in failed.stderr
    wait_until_alone(process.pid)
    run(mixed.path, out, method="fork", **settings)
    assert shards_in(out) == mixed.shards(SHARD) and no_leftovers(out)


# -------------------------------------------------------------------------------------------------
# Damage, and a second process


def damage(path: Path, how: int) -> None:
    data = bytearray(path.read_bytes())
    if how == 0:
        path.unlink()
    elif how == 1:
        path.write_bytes(data[:-2])
    else:
        data[-1] ^= 1
        path.write_bytes(data)


def test_damaged_shards_are_made_anew_and_no_others(mixed, tmp_path):
    """Every other shard deleted, cut off or with a flipped bit, the first and last among them."""
    out, expected = tmp_path / "out", mixed.shards(SHARD)
    settings = dict(shard_size=SHARD, method="fork", changes=SMALL_PIECES)
    run(mixed.path, out, **settings)
    manifest, before = manifest_of(out), times_in(out)
    names = sorted(expected, key=lambda name: name.split("_")[-1])
    bad = sorted({*names[::2], names[-1]})
    for number, name in enumerate(bad):
        damage(out / name, number % 3)
    done = run(mixed.path, out, **settings)
    assert [name for name in names if name in done.stderr] == [n for n in names if n in bad]
    assert shards_in(out) == expected and manifest_of(out) == manifest and no_leftovers(out)
    after = times_in(out)
    assert {name for name in names if after[name] != before[name]} == set(bad)


@pytest.mark.parametrize(
    "shard_size", [1, *(pytest.param(n, marks=pytest.mark.faults) for n in (2, 3))]
)
def test_a_shard_that_begins_beside_empty_documents_is_made_anew(tmp_path, shard_size):
    """Empty files are places, too: they come once, wherever the work goes on."""
    (tmp_path / "in").mkdir()
    texts = ["", "", "hello world", "", "again here", ""]
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    arguments, expected = (tmp_path / "in", tmp_path / "out"), shards_of(tokens_of(texts), 1)
    expected = shards_of(tokens_of(texts), shard_size)
    for odd in (0, 1):
        run(*arguments, method="fork", shard_size=shard_size)
        assert shards_in(tmp_path / "out") == expected
        for name in sorted(expected, key=lambda name: name.split("_")[-1])[odd::2]:
            (tmp_path / "out" / name).unlink()
    run(*arguments, method="fork", shard_size=shard_size)
    assert shards_in(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "damaged", [1, *(pytest.param(n, marks=pytest.mark.faults) for n in (0, 2))]
)
def test_a_damaged_shard_of_a_small_text_is_made_anew(forty, tmp_path, damaged):
    run(forty, tmp_path / "out", method="fork", shard_size=21)
    expected = shards_of(FORTY, 21)
    assert len(expected) == 3
    damage(tmp_path / "out" / sorted(expected)[damaged], damaged)
    run(forty, tmp_path / "out", method="fork", shard_size=21)
    assert shards_in(tmp_path / "out") == expected and no_leftovers(tmp_path / "out")


HASTY = DRIVER.replace("min(timeout, 10)", "0.2") + RUN


def test_a_second_process_is_refused(mixed, tmp_path):
    """And disturbs nothing."""
    out, settings = tmp_path / "out", dict(shard_size=SHARD, changes=SLOW)
    first = start(mixed.path, out, method="fork", **settings)
    wait_for_records(first, out)
    os.kill(first.pid, signal.SIGSTOP)
    before = times_in(out)
    failed = run(mixed.path, out, code=2, driver=HASTY, **settings)
    assert "another process is at work there" in failed.stderr
    assert times_in(out) == before
    os.kill(first.pid, signal.SIGCONT)
    finish(first)
    assert shards_in(out) == mixed.shards(SHARD)


def test_a_refused_process_leaves_the_first_ones_lock(text_file, tmp_path):
    """Though the first one has written nothing yet."""
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock_00000"):
        run(text_file, out, code=2, driver=HASTY)
        assert [path.name for path in out.iterdir()] == [".lock_00000"]
