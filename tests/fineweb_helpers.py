"""Helpers of the fineweb.py tests: an oracle, texts in files, and runs of the command.

The oracle encodes one document at a time with `tiktoken.encode_ordinary`, puts <|endoftext|> before
each, and saves the slices with `numpy.save`. The command runs in processes of its own, or through
the fixture `run` in this process, with workers by fork.

A test module that uses the fixtures names this module in `pytest_plugins`.
"""

import gzip
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, environment

import fineweb
from support import errors, tokenizer
from support.errors import SettingError
from support.files import sha256
from support.launch import Launch
from support.shards import find_intact, open_splits

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


def shards_in(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(out).glob("*.npy"))}


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


def tree(directory: Path) -> dict[str, str]:
    """{relative path: SHA-256, or "directory"} of all below `directory` except locks, which are
    empty and hidden, and may stay, with the directories that hold nothing else."""
    locks = [path for path in directory.rglob(".lock_*")]
    found = {path for path in directory.rglob("*") if path not in locks}
    parents = {parent for lock in locks for parent in lock.parents}
    used = {parent for path in found if path.is_file() for parent in path.parents}
    return {
        str(path.relative_to(directory)): sha256(path) if path.is_file() else "directory"
        for path in found - (parents - used)
    }


def hidden_files(directory) -> list[Path]:
    return [path for path in Path(directory).glob(".*") if not path.name.startswith(".lock_")]


def times_in(out: Path) -> dict[str, int]:
    """{file: modification time}, without the locks."""
    return {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix != ""}


# -------------------------------------------------------------------------------------------------
# Texts, and files that contain them

WORDS = (ROOT / "input.txt").read_text(encoding="utf-8").split(" ")
INVALID = [b"caf\xe9 au lait", b"\xff\xff", b"cut \xe4\xb8", b"\xed\xa0\x80 \xc0\x80", b"\xf4\x90a"]
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


def some_words(choose: random.Random, most: int = 150) -> str:
    start = choose.randrange(len(WORDS) - most)
    return " ".join(WORDS[start : start + choose.randint(1, most)])


def some_documents(seed, count: int, nulls: bool = True) -> list[bytes | None]:
    """Mostly words; a hostile text, invalid UTF-8, an empty document, and nulls if wanted."""
    choose = random.Random(seed)
    documents = [some_words(choose).encode() for _ in range(count)]
    rare = [choose.choice(HOSTILE).encode(), choose.choice(INVALID), b"", *[None] * nulls]
    for document in rare:
        documents.insert(choose.randrange(len(documents)), document)
    return documents


def texts_of(documents: list[bytes | None]) -> list[str]:
    """The expected texts: invalid UTF-8 is replaced, nulls are left out."""
    return [document.decode(errors="replace") for document in documents if document is not None]


def is_damaged(document: bytes | None) -> bool:
    return document is not None and "\ufffd" in document.decode(errors="replace")


def column_of(documents: list[bytes | None], kind: str) -> pa.Array:
    """A column of type "string", "large_binary", ..., with these bytes unchanged."""
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
    """Compressed as the end of the name requires, in two members."""
    half = len(data) // 2
    if name.endswith(".gz"):
        return gzip.compress(data[:half]) + gzip.compress(data[half:])
    if name.endswith(".zst"):
        zstd = pa.Codec("zstd")
        return b"".join(zstd.compress(part, asbytes=True) for part in (data[:half], data[half:]))
    return data


def line_of(document: bytes | None) -> bytes:
    """A JSON object with exactly these bytes in its text."""
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


def write_packed(path: Path, data: bytes) -> None:
    """Writes a file, compressed according to its name; a .zst in many independent frames."""
    if path.suffix == ".zst":
        parts = [data[i : i + 4096] for i in range(0, len(data) or 1, 4096)]
        path.write_bytes(b"".join(pa.compress(part, "zstd", asbytes=True) for part in parts))
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_json_lines(path: Path, texts=(), lines=()) -> None:
    lines = [*(json.dumps({"id": 1, "text": text}) for text in texts), *lines]
    write_packed(path, "".join(f"{line}\n" for line in lines).encode())


def write_text_parquet(path: Path, texts, **options) -> None:
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    pq.write_table(table, path, **dict(row_group_size=10) | options)


def write_texts(path, texts) -> None:
    (write_text_parquet if Path(path).suffix == ".parquet" else write_json_lines)(Path(path), texts)


TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
DOCUMENTS = [TEXT[i : i + 700] for i in range(0, 70_000, 700)]  # 22,271 tokens
SIZE = 2000  # tokens of a shard: so 12 shards


def reference(documents, size: int = SIZE) -> dict[str, bytes]:
    """`shards_of` the tokens of these texts."""
    return shards_of(tokens_of(documents), size)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Corpus:
    """A directory with files of all kinds, some of which are not sources."""
    directory = tmp_path_factory.mktemp("mixed")
    documents = {name: some_documents(name, 12) for name in PARQUET | JSONL}
    documents["dictionary.parquet"] = [some_words(random.Random(i)).encode() for i in range(9)] * 2
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


@pytest.fixture(scope="module")
def forty(tmp_path_factory) -> Path:
    """Three documents, 40 tokens in all."""
    path = tmp_path_factory.mktemp("forty") / "a.jsonl"
    write_jsonl(path, [b" the" * 20, b"", b" a" * 17])
    return path


FORTY = tokens_of([" the" * 20, "", " a" * 17])

# -------------------------------------------------------------------------------------------------
# Runs in processes of their own

LAUNCHER_PREFIXES = ("SLURM", "LOCAL_", "HF_", "RANK", "WORLD_SIZE")
ENVIRONMENT = {n: v for n, v in environment().items() if not n.startswith(LAUNCHER_PREFIXES)}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1"}
# fineweb.py with other constants, another start method and a shorter timeout of the lock.
DRIVER = """
import importlib, json, sys
import fineweb, filelock
method, changes = json.loads(sys.argv[1])
if method:
    fineweb.START_METHOD = method
for name, value in changes.items():
    module, constant = name.rsplit(".", 1)
    setattr(importlib.import_module(module), constant, value)
file_lock = filelock.FileLock
filelock.FileLock = lambda path, timeout: file_lock(path, timeout=min(timeout, LOCK_S))
sys.argv[1:] = sys.argv[2:]
""".replace("LOCK_S", "10")
RUN = "fineweb.run_main(fineweb.main)\n"
SMALL_PIECES = {"support.text_files.PIECE": 700, "support.text_files.LARGE_GROUP": 1000}


def build_command(source, out, *, method=None, changes=None, driver=DRIVER + RUN, **settings):
    """The command line of a run: of the script itself, or of the driver."""
    program = [str(ROOT / "fineweb.py")]
    if method or changes or driver != DRIVER + RUN:
        program = ["-c", driver, json.dumps([method, changes or {}])]
    settings = {"source": source, "out": out, "workers": 1} | settings
    return [sys.executable, *program, *(f"--{name}={value}" for name, value in settings.items())]


def start_command(*arguments, env=None, **settings) -> subprocess.Popen:
    """Starts a run in a process group of its own, so that all its processes can be found."""
    return subprocess.Popen(
        build_command(*arguments, **settings), env=ENVIRONMENT | (env or {}), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish_command(process: subprocess.Popen, code: int | None = 0) -> subprocess.CompletedProcess:
    """Waits for the end, which must have this exit code (None: any) and no traceback."""
    try:
        output, errors = process.communicate(timeout=90)
    finally:
        process.kill()
    if code is not None and process.returncode != code:
        pytest.fail(f"exit code {process.returncode}: {output + errors}")
    assert "Traceback" not in errors, errors
    if code == 2:
        assert errors.count("error:") == 1 and errors.splitlines()[-1].startswith("error:"), errors
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run_command(*arguments, code: int | None = 0, **settings) -> subprocess.CompletedProcess:
    return finish_command(start_command(*arguments, **settings), code)


def start_ranks(world: int, *arguments, names=("RANK", "WORLD_SIZE"), **settings):
    """All ranks at the same time."""
    variables = [dict(zip(names, (str(rank), str(world)))) for rank in range(world)]
    return [start_command(*arguments, env=env, **settings) for env in variables]


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
    """Returns the first true result of `condition()`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return found


def wait_until_alone(group: int) -> None:
    wait_until(lambda: not members(group), "workers outlive their parent", 20)


def kill_main(process: subprocess.Popen) -> None:
    """SIGKILL to the main process alone; its workers must exit by themselves."""
    process.kill()
    process.wait()
    wait_until_alone(process.pid)
    process.communicate()


def wait_for_records(process: subprocess.Popen, out: Path, shards: int = 2) -> None:
    """Waits until a run has recorded its position and some shards, and asserts that it runs on."""
    wait_until(lambda: len(list(out.glob("*.npy"))) >= shards or process.poll(), "no shards")
    wait_until(lambda: list(out.glob("manifest*.partial.json")) or process.poll(), "no record")
    assert process.poll() is None, process.communicate()


def run_script(*arguments, **kwargs) -> subprocess.CompletedProcess:
    """`fineweb.py` in a process of its own."""
    command = [sys.executable, str(ROOT / "fineweb.py"), *arguments]
    kwargs = dict(env=environment(), timeout=100) | kwargs
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


# -------------------------------------------------------------------------------------------------
# Several ranks


def check_ranks(out: Path, corpus: Corpus, world: int, shard_size: int, val_tokens: int) -> None:
    """All tokens in the order of the shards' names, in full shards except each rank's last."""
    assert no_leftovers(out)
    assert np.array_equal(in_order(out), corpus.tokens)
    manifest = manifest_of(out)
    parts = [json.loads((out / f"manifest_{r:05d}.json").read_text()) for r in range(world)]
    assert manifest["settings"]["WORLD_SIZE"] == world
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
    assert all(find_intact(out, manifest["shards"]))
    rest = len(corpus.tokens) - val_tokens
    assert manifest["totals"] == corpus.totals | {"val_tokens": val_tokens, "train_tokens": rest}
    train, val = open_splits(str(out)).values()
    assert np.array_equal(val.read(0, len(val)), corpus.tokens[:val_tokens])
    assert np.array_equal(train.read(0, len(train)), corpus.tokens[val_tokens:])


@pytest.fixture(scope="module")
def two_ranks(mixed, tmp_path_factory) -> Path:
    """The shards of two ranks, of which the second one worked before the first."""
    out = tmp_path_factory.mktemp("ranks") / "out"
    for rank in ("1", "0"):
        with pytest.raises(SettingError, match="directory|unfinished"):
            open_splits(str(out))
        env = {"RANK": rank, "WORLD_SIZE": "2"}
        done = run_command(mixed.path, out, env=env, method="fork", shard_size=SHARD)
        assert ("writes manifest.json" in done.stdout) == (rank == "1")
    return out


# -------------------------------------------------------------------------------------------------
# Runs in this process

SECRET = "hf_aTokenThatNobodyMaySee"
LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE",
)  # fmt: skip


def assert_one_line(err: str, words) -> str:
    """The last line of `err` is the one error line, with all `words` in it. Returns it."""
    *before, last = err.splitlines()
    assert last.startswith("error: ") and err.endswith("\n"), err
    assert not any(sign in line for line in before for sign in ("rror:", "Traceback")), err
    assert all(word in last for word in words), (words, last)
    assert len(last) < 1000, "more than a line"
    return last


@pytest.fixture(scope="module")
def workers_by_fork():
    """Workers start quickly, with the tokenizer loaded and with the patches of a test."""
    tokenizer.get_encoding()
    with pytest.MonkeyPatch.context() as patch:
        if "fork" in multiprocessing.get_all_start_methods():
            patch.setattr(fineweb, "START_METHOD", "fork")
        yield


@pytest.fixture
def surroundings(monkeypatch, tmp_path, workers_by_fork):
    """Each test runs in an empty directory, without launcher or network, with a token set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(monkeypatch, capsys, surroundings):
    """A function: settings -> (exit code, stdout, stderr) of fineweb.py in this process."""

    def run(**settings) -> tuple[int, str, str]:
        settings = dict(workers=1, engine="tiktoken", shard_size=SIZE, out="out") | settings
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        monkeypatch.setattr(sys, "argv", ["fineweb.py", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            errors.run_main(fineweb.main)
        out, err = capsys.readouterr()
        assert SECRET not in out + err
        return stop.value.code, out, err

    return run


@pytest.fixture
def run_here(run):
    """A function: `run_command` in this process, which takes a tenth of the time."""

    def run_here(source, out, *, code=0, env=None, changes=None, **settings):
        settings = dict(engine="auto", shard_size=10**8) | settings
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (changes or {}).items():
                patch.setattr(name, value)
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            found, output, errors = run(source=source, out=out, **settings)
        assert found == code, errors
        if code == 2:
            assert_one_line(errors, ())
        return subprocess.CompletedProcess([], found, output, errors)

    return run_here


@pytest.fixture
def refused(run, tmp_path):
    """A function: words, settings -> the error line, which contains the words; no file changes."""

    def check(*words, **settings) -> str:
        before = tree(tmp_path)
        code, out, err = run(**settings)
        assert (code, out) == (2, ""), err
        line = assert_one_line(err, words)
        assert tree(tmp_path) == before
        return line

    return check


def build(source, out, rank: int = 0, world: int = 1, **settings) -> None:
    settings = dict(workers=1, engine="tiktoken", shard_size=SIZE) | settings
    config = fineweb.Config(source=str(source), out=str(out), **settings)
    fineweb.build(fineweb.validate_config(config), Launch(rank, world))


@pytest.fixture(scope="module")
def made(tmp_path_factory, workers_by_fork):
    """A directory, not to be written to, with `source/` of two files, `finished/` and `begun/`,
    which reached into the first file when the second one was still damaged."""
    directory = tmp_path_factory.mktemp("made")
    source = directory / "source"
    source.mkdir()
    write_texts(source / "1.parquet", DOCUMENTS[:60])
    write_texts(source / "2.jsonl", DOCUMENTS[60:])
    build(source, directory / "finished")
    write_json_lines(source / "2.jsonl", lines=['{"text": ""}', "?"])
    with pytest.raises(errors.UserError, match="2.jsonl"):
        build(source, directory / "begun")
    assert len(shards_in(directory / "begun")) == 6
    assert (directory / "begun" / "manifest.partial.json").exists()
    return directory


@pytest.fixture
def here(made, tmp_path, surroundings):
    """The same, copied to where a test may write."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def mount_tmpfs(directory: Path, options: str) -> bool:
    """Whether a file system could be mounted there, which requires root."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    root = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount")
    return bool(root) and subprocess.run(command, capture_output=True).returncode == 0


def columns(**arrays):
    return lambda path: pq.write_table(pa.table(arrays), path)
