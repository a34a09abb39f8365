"""Wrong input to fineweb.py, and to the trainer through what it made: one line, nothing lost.

Each case ends with exactly one line that begins with "error: " and names the file or setting and
the remedy, with exit code 2; nothing that was there is changed, and no directory is left where
nothing came of it. Most cases run in this process, as `main` does, with workers by fork; a few in
processes of their own. What is mended, or given room, goes on to the bytes of a plain reference.
"""

import dataclasses
import functools
import gzip
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SMALL, command_line, environment, losses

import fineweb
import train_gpt2
from support import checkpoint, errors, text_files, token_shards, tokenizer

SECRET = "hf_aTokenThatNobodyMaySee"
TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")
DOCUMENTS = [TEXT[i : i + 700] for i in range(0, 70_000, 700)]  # 22,271 tokens
SIZE = 2000  # tokens of a shard: so 12 shards
LAUNCHERS = "RANK WORLD_SIZE LOCAL_WORLD_SIZE SLURM_PROCID SLURM_STEP_NUM_TASKS"
LAUNCHERS += " SLURM_NTASKS_PER_NODE"


def tree(directory: Path) -> dict[str, str]:
    """{relative path: SHA-256, or "directory"} of all below `directory`, but locks, which are empty
    and hidden, and may stay."""
    return {
        str(path.relative_to(directory)): checkpoint.sha256(path) if path.is_file() else "directory"
        for path in directory.rglob("*")
        if not path.name.startswith(".lock_")
    }


def hidden_files(directory) -> list[Path]:
    return [path for path in Path(directory).glob(".*") if not path.name.startswith(".lock_")]


def shard_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).glob("*.npy")}


def reference(documents, size: int = SIZE) -> dict[str, bytes]:
    """{file: bytes} of the shards, made plainly: one document after another, cut, `np.save`."""
    ids = []
    for document in documents:
        ids += [50256, *tokenizer.get_encoding().encode_ordinary(document)]
    first = size if len(ids) >= 2 * size else max(1, len(ids) // 10)
    starts, files = [0, *range(first, len(ids), size)], {}
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(ids)])):
        file = io.BytesIO()
        np.save(file, np.array(ids[start:stop], dtype=np.uint16))
        files[f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"] = file.getvalue()
    return files


def assert_one_line(err: str, words) -> str:
    """The last line of `err` is the one error line, with all `words` in it. Returns it."""
    *before, last = err.splitlines()
    assert last.startswith("error: ") and err.endswith("\n"), err
    assert not any(sign in line for line in before for sign in ("rror:", "Traceback")), err
    assert all(word in last for word in words), (words, last)
    assert len(last) < 1000, "more than a line"
    return last


@pytest.fixture(scope="module", autouse=True)
def workers_by_fork():
    """So that they start at once, with the tokenizer there, and with what a test patched."""
    tokenizer.get_encoding()
    with pytest.MonkeyPatch.context() as patch:
        if "fork" in multiprocessing.get_all_start_methods():
            patch.setattr(fineweb, "START_METHOD", "fork")
        yield


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """Each test is in an empty directory, without launcher and network, with a token set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for name in LAUNCHERS.split():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(monkeypatch, capsys):
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
def refused(run, tmp_path):
    """A function: words, settings -> the error line, which holds the words; nothing changed."""

    def check(*words, **settings) -> str:
        before = tree(tmp_path)
        code, out, err = run(**settings)
        assert (code, out) == (2, ""), err
        line = assert_one_line(err, words)
        assert tree(tmp_path) == before
        return line

    return check


def run_fineweb(*arguments, **kwargs) -> subprocess.CompletedProcess:
    """`fineweb.py` in a process of its own."""
    command = [sys.executable, str(ROOT / "fineweb.py"), *arguments]
    kwargs = dict(env=environment(), timeout=100) | kwargs
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


# -------------------------------------------------------------------------------------------------
# Settings

WRONG_SETTINGS = {
    "an unknown one": (dict(sourc="my.txt"), "--sourc=", "--source"),
    "a recipe's name": (dict(n_layer=3), "--n_layer=3", "no such setting"),
    "a size in words": (dict(shard_size="many"), "shard_size='many'", "whole number"),
    "half a token": (dict(shard_size=1.5), "shard_size='1.5'", "whole number"),
    "workers in words": (dict(workers="all"), "workers='all'", "whole number"),
    "workers below 0": (dict(workers=-1), "workers=-1", "at least 0"),
    "no shard_size": (dict(shard_size=0), "shard_size=0", "at least 1"),
    "shard_size below 0": (dict(shard_size=-5), "shard_size=-5", "at least 1"),
    "val_tokens below 0": (dict(val_tokens=-1), "val_tokens=-1", "from 0 to shard_size"),
    "val_tokens too many": (dict(val_tokens=SIZE + 1), "val_tokens=2001", "from 0 to shard_size"),
    "another engine": (dict(engine="bpe"), "engine='bpe'", "auto, gigatoken, tiktoken"),
    "no prefix": (dict(prefix=""), "prefix=''", "beginning"),
    "a prefix elsewhere": (dict(prefix="../x"), "prefix='../x'", "beginning"),
    "a prefix below": (dict(prefix="a/b"), "prefix='a/b'", "beginning"),
    "a hidden prefix": (dict(prefix=".x"), "prefix='.x'", "beginning"),
    "a prefix of a split": (dict(prefix="my_train"), "prefix='my_train'", "train"),
    "a prefix with val in it": (dict(prefix="medieval"), "prefix='medieval'", "val"),
    "a prefix too long": (dict(prefix="x" * 300), "x" * 300, "another"),
    "no out": (dict(out=""), "out=''", "--out=mydata"),
    "a file for out": (dict(out="my.txt"), "out='my.txt'", "directory"),
    "out in a file": (dict(out="my.txt/deep/out"), "my.txt", "--out"),
    "a device for out": (dict(out="/dev/null"), "/dev/null", "directory"),
    "out too long": (dict(out="x" * 300), "x" * 300, "--out"),
    "no source": (dict(source=""), "source=''", "name a"),
    "a file that is not there": (dict(source="gone.txt"), "source='gone.txt'", "no such file"),
    "a directory that is not": (dict(source="gone/"), "source='gone/'", "no such file"),
    # it could be named so on the Hub, where nobody would have meant it
    "a file further down": (dict(source="data/gone.jsonl"), "source='data/gone.jsonl'", "no such"),
    "a glob of none": (dict(source="gone/*.txt"), "source='gone/*.txt'", "no such file"),
    "a source too long": (dict(source="x" * 300), "source=", "no such file"),
    "a source with a NUL": (dict(source="a\0b"), "source=", "no such file"),
    "a file of no known kind": (dict(source="t.csv"), "source='t.csv'", ".parquet, .jsonl"),
    "packed, but what?": (dict(source="my.gz"), "source='my.gz'", "also as .gz and .zst"),
    "a packed parquet": (dict(source="my.parquet.gz"), "my.parquet.gz", "known kind"),
    "a glob of no known kind": (dict(source="*.csv"), "source='*.csv'", "known kind"),
    "an empty directory": (dict(source="empty"), "source='empty'", "known kind"),
    "a directory of others": (dict(source="others"), "source='others'", "known kind"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_a_wrong_setting_is_refused_by_name(case, refused, tmp_path):
    settings, *words = WRONG_SETTINGS[case]
    for name in ("my.txt", "t.csv", "my.gz", "my.parquet.gz", "others/a.csv", "others/b.pdf"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("Words.")
    Path("empty").mkdir()
    refused(*words, **dict(source="my.txt") | settings)


def test_from_a_shell_it_is_one_line_and_code_2(tmp_path):
    before = tree(tmp_path)
    done = run_fineweb("--source=my.txt", "--shard_sise=5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert_one_line(done.stderr, ("--shard_sise=5", "--shard_size"))
    assert tree(tmp_path) == before


WRONG_LAUNCHES = {
    "a rank that is no number": dict(RANK="x", WORLD_SIZE="2"),
    "a rank too many": dict(RANK="2", WORLD_SIZE="2"),
    "a rank below 0": dict(RANK="-1", WORLD_SIZE="2"),
    "a number of ranks that is none": dict(RANK="1", WORLD_SIZE="two"),
    "no ranks": dict(RANK="0", WORLD_SIZE="0"),
    "none on this machine": dict(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="0"),
    "some on this machine": dict(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="some"),
    "a task too many": dict(SLURM_PROCID="5", SLURM_STEP_NUM_TASKS="5"),
}


@pytest.mark.parametrize("case", WRONG_LAUNCHES)
def test_a_launchers_variables_that_contradict_are_named(case, refused, monkeypatch):
    Path("my.txt").write_text(TEXT[:9000])
    for name, value in WRONG_LAUNCHES[case].items():
        monkeypatch.setenv(name, value)
    refused(*WRONG_LAUNCHES[case], "unset", source="my.txt", workers=0)


@pytest.mark.parametrize("variables", [dict(RANK="x", WORLD_SIZE="2"), dict(RANK="3")])
def test_a_wrong_setting_is_told_under_a_rank_that_is_none(variables, refused, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused("shard_size=0", source="my.txt", shard_size=0)


# -------------------------------------------------------------------------------------------------
# Directories


def mount_tmpfs(directory: Path, options: str) -> bool:
    """Whether a file system of its own could be mounted there, which takes root."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    root = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount")
    return bool(root) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def read_only(tmp_path):
    """A directory in which nothing can be made: by its mode, or for root by its mount."""
    directory = tmp_path / "fixed"
    directory.mkdir()
    if mount_tmpfs(directory, "ro"):
        yield directory
        subprocess.run(["umount", "-l", str(directory)], check=True)
    elif os.geteuid() == 0:
        pytest.skip("root may write anywhere, and may not mount here")
    else:
        directory.chmod(0o555)
        yield directory
        directory.chmod(0o755)


def test_an_out_that_cannot_be_written_is_refused(read_only, refused):
    Path("my.txt").write_text(TEXT[:9000])
    refused(str(read_only / "out"), "--out", source="my.txt", out=read_only / "out")
    refused(str(read_only), "--out", source="my.txt", out=read_only)


@pytest.mark.parametrize("out", ["out", "a/b/out", "a/../out", "mine", "."])
def test_where_nothing_came_of_it_only_new_directories_go(out, refused, tmp_path):
    """An empty directory of the user's stays."""
    Path("mine").mkdir()
    Path("elsewhere").mkdir()
    write_jsonl(Path("elsewhere/my.jsonl"), lines=["{}"])
    refused("my.jsonl", source=tmp_path / "elsewhere/my.jsonl", out=out)


def test_another_process_at_work_is_left_alone(refused, tmp_path, monkeypatch):
    """Its lock alone may be all that is there yet: while it lists a dataset's files, say."""
    Path("my.txt").write_text(TEXT[:9000])
    Path("out").mkdir()
    patient = filelock.FileLock
    with patient("out/.lock_00000"):
        monkeypatch.setattr(filelock, "FileLock", lambda path, timeout: patient(path, timeout=0.1))
        refused("out='out'", "another process", "another --out", source="my.txt")
        assert Path("out/.lock_00000").exists()


def test_shards_of_another_program_are_not_touched(refused):
    Path("my.txt").write_text(TEXT[:9000])
    for name in ("edufineweb_val_000000.npy", "fineweb_train_000001.bin"):
        Path(name).with_suffix("").mkdir()
        (Path(name).with_suffix("") / name).write_bytes(b"theirs")
        refused(name, "another --out", source="my.txt", out=Path(name).with_suffix(""))


def test_what_is_no_shard_may_lie_in_out(run):
    Path("my.txt").write_text(TEXT[:9000])
    Path("out").mkdir()
    Path("out/notes.md").write_text("mine")
    assert run(source="my.txt")[0] == 0
    assert shard_files("out") == reference([TEXT[:9000]])
    assert Path("out/notes.md").read_text() == "mine"


# -------------------------------------------------------------------------------------------------
# Sources


def pack(path: Path, data: bytes) -> None:
    """Writes a file, packed as its name says; a .zst in many frames, which can be read singly."""
    if path.suffix == ".zst":
        parts = [data[i : i + 4096] for i in range(0, len(data) or 1, 4096)]
        path.write_bytes(b"".join(pa.compress(part, "zstd", asbytes=True) for part in parts))
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_jsonl(path: Path, texts=(), lines=()) -> None:
    lines = [*(json.dumps({"id": 1, "text": text}) for text in texts), *lines]
    pack(path, "".join(f"{line}\n" for line in lines).encode())


def write_parquet(path: Path, texts, **options) -> None:
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    pq.write_table(table, path, **dict(row_group_size=10) | options)


def write(path, texts) -> None:
    (write_parquet if Path(path).suffix == ".parquet" else write_jsonl)(Path(path), texts)


KINDS = ("my.parquet", "my.jsonl", "my.jsonl.gz", "my.jsonl.zst")


@pytest.mark.parametrize("name", KINDS)
def test_what_the_cases_below_change_is_good_before(name, run):
    write(name, DOCUMENTS)
    code, out, _ = run(source=name)
    assert code == 0 and "12 shards, 22,271 tokens" in out
    assert shard_files("out") == reference(DOCUMENTS)


def cut(path: Path, keep: int) -> None:
    write(path, DOCUMENTS)
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)


def columns(**arrays):
    return lambda path: pq.write_table(pa.table(arrays), path)


def twice_the_same(path: Path) -> None:
    texts = pa.array(["One."])
    pq.write_table(pa.Table.from_arrays([texts, texts], names=["text", "text"]), path)


def no_utf8_column(path: Path) -> None:
    pq.write_table(pa.table({"cafe": ["One."], "text": ["Two."]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"cafe", b"caf\xe9"))


def flip_in_a_checked_page(path: Path) -> None:
    write_parquet(path, DOCUMENTS, compression="none", use_dictionary=False,
                  write_page_checksum=True)  # fmt: skip
    data = bytearray(path.read_bytes())
    data[data.index(DOCUMENTS[0][:50].encode()) + 20] ^= 1
    path.write_bytes(data)


def line(text: str):
    """A jsonl with a good line of 13 bytes, and then `text`."""
    return lambda path: path.write_text('{"text": "a"}\n' + text + "\n")


FOREIGN = b"PK\x03\x04" + bytes(range(256)) * 10
WRONG_SOURCES = {
    # name: (file, function that makes it, words)
    "a foreign .parquet": ("my.parquet", lambda p: p.write_bytes(FOREIGN), "mend"),
    "a foreign .jsonl": ("my.jsonl", lambda p: p.write_bytes(FOREIGN), "byte 0 ", "mend"),
    "a foreign .jsonl.gz": ("my.jsonl.gz", lambda p: p.write_bytes(FOREIGN), "mend"),
    "a foreign .jsonl.zst": ("my.jsonl.zst", lambda p: p.write_bytes(FOREIGN), "mend"),
    "a foreign .txt.gz": ("my.txt.gz", lambda p: p.write_bytes(FOREIGN), "mend"),
    "a foreign .txt.zst": ("my.txt.zst", lambda p: p.write_bytes(FOREIGN), "mend"),
    "an empty .parquet": ("my.parquet", lambda p: cut(p, 0), "mend"),
    "an empty .gz": ("my.jsonl.gz", lambda p: cut(p, 0), "mend"),
    "an empty .zst": ("my.txt.zst", lambda p: cut(p, 0), "mend"),
    "half a .parquet": ("my.parquet", lambda p: cut(p, 9000), "mend"),
    "a .parquet without its last byte": ("my.parquet", lambda p: cut(p, -1), "mend"),
    "10 bytes of a .gz": ("my.jsonl.gz", lambda p: cut(p, 10), "mend"),
    "half a .gz": ("my.jsonl.gz", lambda p: cut(p, 9000), "mend"),
    "a .gz without its length": ("my.jsonl.gz", lambda p: cut(p, -4), "mend"),
    "a .gz without its last byte": ("my.jsonl.gz", lambda p: cut(p, -1), "mend"),
    "5 bytes of a .zst": ("my.jsonl.zst", lambda p: cut(p, 5), "mend"),
    "half a .zst": ("my.jsonl.zst", lambda p: cut(p, 9000), "mend"),
    "a .zst without its last byte": ("my.jsonl.zst", lambda p: cut(p, -1), "mend"),
    "a checked page altered": ("my.parquet", flip_in_a_checked_page, "mend"),
    "no such column": (
        "my.parquet", columns(body=["a"], url=["b"]), "'text'", "--text_column", "are body, url",
    ),
    "no column at all": ("my.parquet", columns(), "'text'", "--text_column"),
    "a column of numbers": ("my.parquet", columns(text=[1, 2]), "text_column='text'", "int64"),
    "a column of lists": ("my.parquet", columns(text=[["a"]]), "text_column='text'", "list"),
    "two such columns": ("my.parquet", twice_the_same, "'text'"),
    "a column's name in Latin-1": ("my.parquet", no_utf8_column, "mend"),
    "a bad line": ("my.jsonl", line('{"text": '), "byte 14 ", "mend"),
    "a line of text": ("my.jsonl", line("Words."), "byte 14 ", "mend"),
    "a line of a list": ("my.jsonl", line('["text"]'), "byte 14 ", "object", "mend"),
    "a line of a string": ("my.jsonl", line('"text"'), "byte 14 ", "object", "mend"),
    "a line too deep": ("my.jsonl", line("[" * 100_000), "byte 14 ", "mend"),
    "a line without the column": (
        "my.jsonl", line('{"body": "b", "url": ""}'), "byte 14", "'text'", "--text_column",
        "are body, url",
    ),
    "a number for a text": ("my.jsonl", line('{"text": 5}'), "byte 14 ", "'text'", "no text"),
    "a list for a text": ("my.jsonl", line('{"text": ["a"]}'), "byte 14 ", "'text'", "no text"),
    "one array": ("my.json", lambda p: p.write_text('[{"text": "a"}]'), "byte 0 ", "object"),
    "a jsonl in UTF-16": (
        "my.jsonl", lambda p: p.write_text('{"text": "a"}\n', encoding="utf-16"), "byte 0 ", "mend",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SOURCES)
def test_a_source_that_cannot_be_read_is_named(case, refused):
    name, make, *words = WRONG_SOURCES[case]
    make(Path(name))
    refused(name, *words, source=name)


def damage(name: str) -> None:
    """Something wrong in the middle of a file of DOCUMENTS."""
    path = Path(name)
    write(path, DOCUMENTS)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    if path.suffix in (".gz", ".zst"):
        del data[middle:]
    elif path.suffix == ".parquet":
        data[middle : middle + 900] = b"\xff" * 900
    else:
        data[data.index(b"\n", middle) + 1] = ord("?")  # for the { of a line
    path.write_bytes(data)


@pytest.mark.parametrize("name", KINDS)
def test_what_comes_before_the_damage_is_kept_and_once_mended_it_goes_on(name, run, monkeypatch):
    """The mended file is of another time, and of another size perhaps."""
    monkeypatch.setattr(text_files, "PIECE", 4096)
    damage(name)
    made = []
    for _ in range(2):
        code, out, err = run(source=name)
        assert (code, out) == (2, "")
        assert_one_line(err, (name, "mend"))
        made.append(shard_files("out"))
    assert made[0] == made[1] and 2 <= len(made[0]) < 11
    assert made[0].items() <= reference(DOCUMENTS).items()

    write(name, DOCUMENTS)
    code, out, err = run(source=name)
    assert code == 0, err
    assert shard_files("out") == reference(DOCUMENTS)
    assert hidden_files("out") == []
    assert json.loads(Path("out/manifest.json").read_text())["totals"]["documents"] == 100


# -------------------------------------------------------------------------------------------------
# Going on with what is there


def build(source, out, rank: int = 0, world: int = 1, **settings) -> None:
    settings = dict(workers=1, engine="tiktoken", shard_size=SIZE) | settings
    config = fineweb.Config(source=str(source), out=str(out), **settings)
    assert fineweb.build(fineweb.check_config(config), fineweb.Launch(rank, world, 1)) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory, not to be written to, with `source/` of two files, `finished/` and `begun/`,
    which reached into the first file when the second one was still damaged."""
    directory = tmp_path_factory.mktemp("made")
    source = directory / "source"
    source.mkdir()
    write(source / "1.parquet", DOCUMENTS[:60])
    write(source / "2.jsonl", DOCUMENTS[60:])
    build(source, directory / "finished")
    write_jsonl(source / "2.jsonl", lines=["?"])
    with pytest.raises(errors.UserError, match="2.jsonl"):
        build(source, directory / "begun")
    assert len(shard_files(directory / "begun")) == 6
    assert (directory / "begun" / "manifest.partial.json").exists()
    return directory


@pytest.fixture
def here(made, tmp_path):
    """The same, copied to where a test may write."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


OTHER = dict(
    name="sample", text_column="body", separator="|", shard_size=SIZE + 1, val_tokens=5,
    prefix="other",
)  # fmt: skip


def test_the_cases_below_are_all_that_decides_the_contents():
    assert set(OTHER) == set(fineweb.DEFINING)


@pytest.mark.parametrize("out", ["begun", "finished"])
@pytest.mark.parametrize("name", OTHER)
def test_another_setting_than_before_is_refused_by_name(name, out, here, refused):
    before = SIZE if name == "shard_size" else getattr(fineweb.Config, name)
    words = (f"{name}={OTHER[name]!r}:", f"{name}={before!r};", f"out={out!r}", "another --out")
    refused(*words, **dict(source="source", out=out) | {name: OTHER[name]})


@pytest.mark.parametrize("out", ["begun", "finished"])
def test_another_number_of_processes_is_refused(out, here, refused, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(f"out={out!r}", "1 processes", "WORLD_SIZE", "another --out", source="source", out=out)


def test_one_process_does_not_go_on_for_two(here, refused, run, monkeypatch):
    write("source/2.jsonl", DOCUMENTS[60:])
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert run(source="source")[0] == 0
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    refused("out='out'", "2 processes", "WORLD_SIZE", "another --out", source="source")


@pytest.mark.parametrize("change", ["another text", "a longer text", "a shorter text"])
def test_a_source_that_was_used_and_has_changed_is_refused(change, here, run):
    """That it gives other shards may take making one to know; those that are there stay."""
    texts = {"another text": DOCUMENTS[1:61], "a longer text": ["More.", *DOCUMENTS[:60]]}
    write("source/1.parquet", texts.get(change, DOCUMENTS[:3]))
    write("source/2.jsonl", DOCUMENTS[60:])
    before = shard_files("begun")
    code, out, err = run(source="source", out="begun")
    assert (code, out) == (2, "")
    assert_one_line(err, ("changed", "another --out"))
    assert shard_files("begun") == before

    write("source/1.parquet", DOCUMENTS[:60])
    code, _, err = run(source="source", out="begun")
    assert code == 0, err
    assert shard_files("begun") == reference(DOCUMENTS)


def test_where_no_shard_holds_the_change_it_is_refused_or_taken_whole(run):
    """Of the second file there are only tokens in the shard that was being filled."""
    Path("source").mkdir()
    write("source/1.parquet", DOCUMENTS[:10])
    write("source/2.parquet", DOCUMENTS[10:50])
    data = bytearray(Path("source/2.parquet").read_bytes())
    data[len(data) // 4 : len(data) // 4 * 3] = bytes(len(data) // 4 * 2)
    Path("source/2.parquet").write_bytes(data)
    assert run(source="source", shard_size=5000)[0] == 2
    assert shard_files("out") == {} and hidden_files("out")
    others = ["Other text."] * 40 + DOCUMENTS[50:]
    write("source/2.parquet", others)
    code, _, err = run(source="source", shard_size=5000)
    if code:
        assert_one_line(err, ("2.parquet", "changed", "another --out"))
    else:
        assert shard_files("out") == reference([*DOCUMENTS[:10], *others], 5000)


def test_a_source_that_became_shorter_by_whole_shards_is_refused(tmp_path):
    """In a process of its own: with nothing left to read, it might look for it for ever."""
    path, plain = Path("my.parquet"), dict(compression="none", use_dictionary=False)
    table = pa.table({"text": ["a"] * 5000})  # 1,000 of them in each shard
    pq.write_table(table, path, row_group_size=500, **plain)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50] = b"\xff" * 50
    path.write_bytes(data)
    arguments = ("--source=my.parquet", "--out=out", f"--shard_size={SIZE}", "--workers=1")
    assert run_fineweb(*arguments).returncode == 2
    before = shard_files("out")
    assert len(before) >= 2
    pq.write_table(table[:1000], path, row_group_size=500, **plain)
    done = run_fineweb(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, ("changed", "another --out"))
    assert shard_files("out") == before


def test_a_source_of_which_nothing_was_used_may_be_replaced(here, run):
    write("source/2.jsonl", ["Something else.", *DOCUMENTS[70:]])
    assert run(source="source", out="begun")[0] == 0
    assert shard_files("begun") == reference([*DOCUMENTS[:60], "Something else.", *DOCUMENTS[70:]])


@pytest.mark.parametrize("out", ["begun", "finished"])
@pytest.mark.parametrize("change", ["one more", "one less", "renamed"])
def test_other_files_than_before_are_refused(change, out, here, refused):
    if change == "one more":
        write("source/3.jsonl", DOCUMENTS[:1])
    else:
        Path("source/2.jsonl").rename("source/0.jsonl" if change == "renamed" else "2.jsonl")
    refused("source", f"out={out!r}", "another --out", source="source", out=out)


def test_a_finished_directory_is_not_for_a_source_that_has_changed(here, refused):
    write("source/2.jsonl", DOCUMENTS[60:61])
    refused(
        "2.jsonl", "changed", "out='finished'", "another --out", source="source", out="finished"
    )


def test_a_finished_directory_is_left_alone(here, run):
    """The workers and the engine may be others."""
    write("source/2.jsonl", DOCUMENTS[60:])
    build("source", "out")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in Path("out").iterdir()}
    code, out, err = run(source="source", workers=2, engine="auto")
    assert (code, err) == (0, "") and "finished already: 12 shards" in out
    found = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in Path("out").iterdir()}
    assert found == before


def altered(facts: dict, **more) -> bytes:
    return json.dumps(facts | more).encode()


DAMAGED = {
    "empty": lambda facts: b"",
    "cut off": lambda facts: json.dumps(facts).encode()[:300],
    "zeros": lambda facts: bytes(4096),
    "no text": lambda facts: bytes(range(256)) * 400,
    "a list": lambda facts: b"[]",
    "too deep": lambda facts: b"[" * 100_000,
    "another program's": lambda facts: b'{"name": "an app", "icons": []}',
    "without settings": lambda facts: altered(facts, settings={}),
    "shards null": lambda facts: altered(facts, shards=None),
    "shards of nothing": lambda facts: altered(facts, shards=[{}]),
    "a shard's size a word": lambda facts: altered(
        facts, shards=[facts["shards"][0] | {"tokens": "many"}]
    ),
    "a shard elsewhere": lambda facts: altered(
        facts, shards=[facts["shards"][0] | {"file": "../x.npy"}]
    ),
    "sources null": lambda facts: altered(facts, sources=None),
    "sources of nothing": lambda facts: altered(facts, sources=[{}, {}]),
    "counts null": lambda facts: altered(facts, counts=None),
}


@pytest.mark.parametrize("out", ["begun", "finished"])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_manifest_is_named(case, out, here, refused):
    write("source/2.jsonl", DOCUMENTS[60:])
    path = Path(out) / ("manifest.json" if out == "finished" else "manifest.partial.json")
    path.write_bytes(DAMAGED[case](json.loads(path.read_text())))
    refused(str(path), "damaged", repr(out), "another", source="source", out=out)


# -------------------------------------------------------------------------------------------------
# Too little text

TOO_LITTLE = {
    "an empty text": ("my.txt", lambda p: p.write_text(""), {}, "1 tokens"),
    "an empty jsonl": ("my.jsonl", lambda p: p.write_text(""), {}, "0 tokens"),
    "nothing but nulls": ("my.jsonl", lambda p: write(p, [None] * 5), {}, "0 tokens"),
    "no rows": ("my.parquet", columns(text=pa.array([], pa.string())), {}, "0 tokens"),
    "one empty document": ("my.jsonl", lambda p: write(p, [""]), {}, "1 tokens"),
    "all for val": (
        "my.txt", lambda p: p.write_text(TEXT[:700]), dict(val_tokens=SIZE), "--val_tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_LITTLE)
def test_too_little_text_is_refused_and_with_more_the_same_command_works(case, refused, run):
    name, make, settings, *words = TOO_LITTLE[case]
    make(Path(name))
    refused("source", "more text", *words, source=name, **settings)
    if name == "my.txt":
        Path(name).write_text(TEXT[:70_000])
    else:
        write(name, DOCUMENTS)
    assert run(source=name, **settings)[0] == 0
    whole = [TEXT[:70_000]] if name == "my.txt" else DOCUMENTS
    assert shard_files("out") == reference(whole)


def test_two_tokens_are_enough_for_both_splits(run):
    write("my.jsonl", ["", ""])
    assert run(source="my.jsonl")[0] == 0
    assert shard_files("out") == reference(["", ""]) and len(shard_files("out")) == 2


# -------------------------------------------------------------------------------------------------
# Packages and engines


@pytest.mark.parametrize(
    "package", ["pyarrow", "filelock", "tqdm", "tiktoken", "datasets", "huggingface_hub"]
)
def test_a_package_that_is_not_installed_is_named(package, refused, monkeypatch):
    tokenizer.get_encoding.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    Path("my.txt").write_text(TEXT[:9000])
    hub = package in ("datasets", "huggingface_hub")
    refused(package, "pip install", source="nobody/nothing" if hub else "my.txt")


def test_gigatoken_is_not_missed_unless_asked_for(tmp_path):
    """Workers are new interpreters here, in which it cannot be imported either."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "gigatoken.py").write_text("raise ImportError('no such module')")
    Path("my.txt").write_text(TEXT[:9000])
    before, kwargs = tree(tmp_path), dict(env=environment(PYTHONPATH=str(tmp_path / "without")))
    arguments = ("--source=my.txt", "--out=out", f"--shard_size={SIZE}", "--workers=1")
    done = run_fineweb(*arguments, "--engine=gigatoken", **kwargs)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, ("engine='gigatoken'", "pip install", "--engine=tiktoken"))
    assert {k: v for k, v in tree(tmp_path).items() if "__pycache__" not in k} == before

    done = run_fineweb(*arguments, **kwargs)
    assert done.returncode == 0, done.stderr
    assert shard_files("out") == reference([TEXT[:9000]])


def test_wrong_ids_are_caught_and_another_engine_goes_on(run, monkeypatch):
    """From a certain document on, which is not the first one."""
    write("my.parquet", DOCUMENTS)
    get_encoder = tokenizer.get_encoder

    def get_wrong_encoder(engine):
        encode = get_encoder("tiktoken")
        if engine == "tiktoken":
            return encode
        return lambda text: encode(text) + (text == DOCUMENTS[50])

    monkeypatch.setattr(tokenizer, "get_encoder", get_wrong_encoder)
    code, out, err = run(source="my.parquet", engine="auto")
    assert (code, out) == (2, "")
    assert_one_line(err, ("engine", "gigatoken", repr(DOCUMENTS[50][:20])[1:5], "=tiktoken"))
    assert len(shard_files("out")) >= 2
    assert shard_files("out").items() <= reference(DOCUMENTS).items()
    code, _, err = run(source="my.parquet", engine="tiktoken")
    assert code == 0, err
    assert shard_files("out") == reference(DOCUMENTS)


def test_altered_ranks_are_named(refused, monkeypatch, tmp_path):
    path = tmp_path / "gpt2.tiktoken"
    path.write_bytes(tokenizer.RANKS.read_bytes()[:-9])
    tokenizer.load_ranks.cache_clear()
    tokenizer.get_encoding.cache_clear()
    monkeypatch.setattr(tokenizer, "RANKS", path)
    Path("my.txt").write_text(TEXT[:9000])
    refused(str(path), "restore", source="my.txt")


# -------------------------------------------------------------------------------------------------
# Full disks


@pytest.fixture
def small_disk(tmp_path):
    """(directory, function that makes room) of a real file system of 400 kB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if not mount_tmpfs(directory, "size=400k"):
        pytest.skip("a small file system cannot be mounted here")
    remount = ["mount", "-o", "remount,size=9m", str(directory)]
    yield directory, functools.partial(subprocess.run, remount, check=True)
    subprocess.run(["umount", "-l", str(directory)], check=True)


LONG = [TEXT[i : i + 700] for i in range(0, len(TEXT), 700)] * 3  # 363,000 tokens, 726 kB


@pytest.mark.parametrize("what", ["shards", "records", "a split"])
def test_a_full_disk_keeps_what_is_there_and_with_room_it_goes_on(what, small_disk, run):
    """Of small shards it is the record, 400 bytes each and written anew beside the old one, that
    finds no room. Of a small text it is the second copy, in two splits."""
    disk, make_room = small_disk
    documents = LONG[: len(LONG) // 3] if what == "a split" else LONG
    size = {"shards": 50_000, "records": 2000, "a split": 10**8}[what]
    whole = reference(documents, size)
    write("my.parquet", documents)
    settings = dict(source="my.parquet", out=disk / "out", shard_size=size)
    for _ in range(2):
        code, out, err = run(**settings)
        assert (code, out) == (2, "")
        assert_one_line(err, (str(disk / "out"), "disk is full", "make room"))
        assert shutil.disk_usage(disk).free > 0
        found = shard_files(disk / "out")
        if what != "a split":
            assert found.items() <= whole.items() and len(found) >= 2
        json.loads((disk / "out" / "manifest.partial.json").read_text())

    make_room()
    code, _, err = run(**settings)
    assert code == 0, err
    if what == "shards":  # not only those that were full are kept
        assert int(re.search(r"going on after ([\d,]+)", err)[1].replace(",", "")) > size * len(
            found
        )
    assert shard_files(disk / "out") == whole
    assert hidden_files(disk / "out") == []
    assert token_shards.read_manifest(disk / "out") is not None


def test_on_a_disk_that_is_full_already_nothing_is_left(small_disk, refused):
    disk, _ = small_disk
    (disk / "others").write_bytes(bytes(399 * 1024))
    write("my.jsonl", DOCUMENTS)
    refused("disk is full", "make room", source="my.jsonl", out=disk / "out")


def test_from_a_shell_a_full_disk_is_one_line(small_disk):
    """In development mode, where Python also tells of a file that could not be closed."""
    disk, _ = small_disk
    write("my.jsonl", LONG)
    options = [f"--source={Path('my.jsonl').resolve()}", f"--out={disk / 'out'}", "--workers=1"]
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", ROOT / "fineweb.py", *options],
        capture_output=True, text=True, timeout=100, env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, (str(disk / "out"), "disk is full", "make room"))


# -------------------------------------------------------------------------------------------------
# Names

ODD_NAMES = (
    'a b/it\'s "here".jsonl',
    "ä/深い 😀.parquet",
    "a/../b/[1]*?.jsonl.gz",
    "a/s3:x.parquet",
)
ODD_OUT = "ö \"o u't"


def put(name: str) -> None:
    """DOCUMENTS[:9] in a file of that name, which pyarrow itself might not take."""
    for directory in ("a", os.path.dirname(name)):
        os.makedirs(directory, exist_ok=True)
    write("plain" + Path(name).suffix, DOCUMENTS[:9])
    os.rename("plain" + Path(name).suffix, name)


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("part", [lambda name: name, os.path.dirname], ids=["file", "directory"])
def test_odd_names_are_as_good_as_others(name, part, run):
    put(name)
    code, _, err = run(source=part(name), out=os.path.join("a", "..", ODD_OUT))
    assert code == 0, err
    assert shard_files(ODD_OUT) == reference(DOCUMENTS[:9])
    assert token_shards.read_manifest(Path(ODD_OUT)) is not None


def test_a_relative_name_is_not_taken_for_an_address(run):
    put("a/s3:x.parquet")
    os.chdir("a")
    assert run(source="s3:x.parquet")[0] == 0
    assert shard_files("out") == reference(DOCUMENTS[:9])


@pytest.mark.parametrize("kind", [".parquet", ".jsonl"])
def test_a_name_that_is_no_utf8_is_refused(kind, refused):
    """Not every library underneath would open it."""
    name = os.fsdecode(b"caf\xe9/n\xe9") + kind
    try:
        put(name)
    except OSError:
        pytest.skip("no such names on this file system")
    for source in (name, os.path.dirname(name)):
        refused(repr(name)[1:4], kind, "UTF-8", "rename", source=source)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names must be UTF-8")
@pytest.mark.parametrize("out", ["ö", os.fsdecode(b"o\xe9")])
def test_a_name_that_the_console_cannot_show_is_no_error(out):
    write("my.jsonl", DOCUMENTS[:9])
    arguments = ("--source=my.jsonl", f"--out={out}", "--workers=1", "--engine=tiktoken")
    done = run_fineweb(*arguments, env=environment(PYTHONIOENCODING="ascii:strict"))
    assert done.returncode == 0 and "done: 2 shards" in done.stdout, done.stderr
    assert shard_files(out) == reference(DOCUMENTS[:9])


@pytest.mark.parametrize("name", ["gone it's.jsonl", 'gone "so".txt', "gone 深い.parquet"])
def test_an_odd_name_is_told_as_it_is(name, refused):
    refused(f"source={name!r}", "no such file", source=name)


# -------------------------------------------------------------------------------------------------
# The trainer, on what fineweb.py made


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A directory of shards with a manifest, not to be written to."""
    directory = tmp_path_factory.mktemp("good")
    write(directory / "my.jsonl", DOCUMENTS)
    build(directory / "my.jsonl", directory / "data", shard_size=5000)
    return directory / "data"


@pytest.fixture
def data(good, tmp_path):
    """The same, copied to where a test may write."""
    return Path(shutil.copytree(good, tmp_path / "data"))


def small_run(data: Path, **settings) -> train_gpt2.Config:
    settings = SMALL | dict(val_every=2, device="cpu") | settings
    return train_gpt2.Config(data=str(data), log_dir=str(data.parent / "log"), **settings)


def train(config, capsys) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        errors.run_main(lambda: train_gpt2.train(config))
    return stop.value.code, *capsys.readouterr()


SECOND = "edufineweb_train_000001.npy"


def flip(path: Path) -> None:
    """Alters one bit in the middle, so that it stays a shard of valid token ids."""
    shard = np.load(path, mmap_mode="r+")
    shard[len(shard) // 2 + int(shard[len(shard) // 2] >= 50256)] ^= 1
    shard.flush()


def edit(**changes):
    """A function that changes an entry of a directory's manifest."""

    def change(directory: Path) -> None:
        facts = json.loads((directory / "manifest.json").read_text())
        facts["shards"][1] |= changes
        (directory / "manifest.json").write_text(json.dumps(facts))

    return change


def list_twice(directory: Path) -> None:
    facts = json.loads((directory / "manifest.json").read_text())
    facts["shards"].append(facts["shards"][1])
    (directory / "manifest.json").write_text(json.dumps(facts))


def list_elsewhere(directory: Path) -> None:
    """A shard that is there, and as it should be, but outside."""
    (directory / SECOND).rename(directory.parent / "x")
    edit(file="../x")(directory)


def write_manifest(content: bytes):
    return lambda directory: (directory / "manifest.json").write_bytes(content)


def leave_rank_1(directory: Path) -> None:
    """One of two ranks is done: its manifest is there, and that of all is not."""
    (directory / "manifest.json").rename(directory / "manifest_00001.json")


BAD_DATA = {
    # name: (function that does it, words)
    "unfinished": (
        lambda d: (d / "manifest.json").rename(d / "manifest.partial.json"), "unfinished",
        "fineweb.py",
    ),
    "one of two ranks": (leave_rank_1, "unfinished", "fineweb.py"),
    "a shard missing": (lambda d: (d / SECOND).unlink(), SECOND, "missing", "fineweb.py"),
    "a shard truncated": (
        lambda d: os.truncate(d / SECOND, 5000), SECOND, "5,000 bytes", "10,128", "fineweb.py",
    ),
    "a shard altered": (lambda d: flip(d / SECOND), SECOND, "altered", "fineweb.py"),
    "the last shard altered": (
        lambda d: flip(d / "edufineweb_train_000004.npy"), "000004.npy", "altered", "fineweb.py",
    ),
    "one shard more": (
        lambda d: shutil.copy(d / SECOND, d / "x_train_9.npy"), "x_train_9.npy", "elsewhere",
    ),
    "one .bin more": (
        lambda d: (d / "x_train_9.bin").write_bytes(b""), "x_train_9.bin", "elsewhere",
    ),
    "a manifest cut off": (
        lambda d: os.truncate(d / "manifest.json", 700), "manifest.json", "damaged", "fineweb.py",
    ),
    "an empty manifest": (write_manifest(b""), "manifest.json", "damaged"),
    "no text for a manifest": (write_manifest(bytes(range(256)) * 99), "manifest.json", "damaged"),
    "a manifest too deep": (write_manifest(b"[" * 100_000), "manifest.json", "damaged"),
    "another program's manifest": (write_manifest(b'{"name": 1}'), "manifest.json", "damaged"),
    "a manifest of no shards": (write_manifest(b'{"shards": []}'), SECOND[:10],),
    "a shard listed twice": (list_twice, "manifest.json", "damaged"),
    "a shard listed elsewhere": (list_elsewhere, "manifest.json", "damaged"),
    "a shard listed at the root": (edit(file="/etc/hosts"), "manifest.json", "damaged"),
    "a shard's name too long": (edit(file="x" * 300), "manifest.json", "damaged"),
    "a shard's name a number": (edit(file=5), "manifest.json", "damaged"),
    "a shard of endless bytes": (edit(bytes=float("inf")), "manifest.json", "damaged"),
    "a shard without a hash": (edit(sha256=None), "manifest.json", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_a_directory_that_is_not_as_made_is_not_trained_on(case, data, tmp_path, capsys):
    spoil, *words = BAD_DATA[case]
    spoil(data)
    before = tree(tmp_path)
    code, _, err = train(small_run(data), capsys)
    assert code == 2
    words = words if len(words) > 1 else [str(data)]
    assert_one_line(err, words)
    assert tree(tmp_path) == before


def test_what_the_trainer_advises_on_a_damaged_manifest_works(good, data, tmp_path, capsys, run):
    """It advises what fineweb.py itself would."""
    shutil.copytree(good.parent, tmp_path / "again", copy_function=shutil.copy2)
    (tmp_path / "again" / "data" / "manifest.json").write_bytes(b"{")
    settings = dict(source=tmp_path / "again" / "my.jsonl", out=tmp_path / "again" / "data")
    _, _, theirs = run(shard_size=5000, **settings)
    _, _, ours = train(small_run(tmp_path / "again" / "data"), capsys)
    for err in (theirs, ours):
        assert_one_line(err, ("manifest.json", "damaged", "remove"))


@pytest.mark.parametrize("case", ["missing", "truncated", "altered"])
def test_the_same_command_mends_a_shard(case, good, tmp_path, run):
    shutil.copytree(good.parent, tmp_path, dirs_exist_ok=True)
    BAD_DATA[f"a shard {case}"][0](tmp_path / "data")
    code, out, err = run(source="my.jsonl", out="data", shard_size=5000)
    assert code == 0 and SECOND in err
    assert shard_files("data") == shard_files(good)
    assert train_gpt2.open_tokens("data")


def test_an_altered_shard_may_be_trained_on_unchecked(data, capsys):
    flip(data / SECOND)
    assert train(small_run(data, check_data=False, max_steps=1), capsys)[0] == 0


def test_directories_without_a_manifest_still_work(data, tmp_path, capsys):
    """.npy as build-nanogpt writes them, .bin as llm.c does: the same training in all cases."""
    config = small_run(data, max_steps=2, val_every=0)
    assert train(config, capsys)[0] == 0
    expected = losses(config)
    (data / "manifest.json").unlink()
    config = dataclasses.replace(config, log_dir=str(tmp_path / "log2"))
    code, out, _ = train(config, capsys)
    assert code == 0 and "as made" not in out and losses(config) == expected
    for path in data.glob("*.npy"):
        tokens, header = np.load(path), np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(tokens)
        path.with_suffix(".bin").write_bytes(header.tobytes() + tokens.tobytes())
        path.unlink()
    config = dataclasses.replace(config, log_dir=str(tmp_path / "log3"))
    assert train(config, capsys)[0] == 0 and losses(config) == expected


def test_the_epochs_told_agree_with_the_manifest(tmp_path, capsys):
    write("my.jsonl", DOCUMENTS[:20])
    build("my.jsonl", "data", shard_size=1000)
    totals = json.loads(Path("data/manifest.json").read_text())["totals"]
    windows = (totals["train_tokens"] - 1) // 64
    steps = 5 * windows // 2 // 4  # of 4 windows each, so nearly two and a half times over
    settings = dict(T=64, total_batch_size=256, max_steps=steps, val_every=0)
    code, out, _ = train(small_run(tmp_path / "data", **settings), capsys)
    assert code == 0
    assert f"{totals['train_tokens']:,} tokens to train on" in out
    assert f"({4 * steps / windows:.2f} epochs in {steps} steps)" in out
    assert f"{totals['val_tokens']:,} for validation" in out
    assert [f"epoch {n} of the data" in out for n in (1, 2, 3, 4)] == [False, True, True, False]


@pytest.mark.faults
def test_a_text_goes_from_shell_to_training_from_any_directory(tmp_path):
    """And no file of it holds the token that was in the environment all the while."""
    for name in ("texts", "elsewhere"):
        Path(name).mkdir()
    text = TEXT[:200_000]
    Path("texts/my.txt").write_text(text)
    done = run_fineweb("--source=my.txt", "--out=mydata", cwd="texts")
    assert done.returncode == 0, done.stderr
    assert "done: 2 shards" in done.stdout and "mydata" in done.stdout
    assert shard_files("texts/mydata") == reference([text], 10**8)

    few = SMALL | dict(max_steps=3, val_every=3, sample_every=3, sample_tokens=8)
    options = ["tiny", "--data=../texts/mydata", *(f"--{k}={v}" for k, v in few.items())]
    trained = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt2.py"), *options],
        cwd="elsewhere", env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "2 shards are as made" in trained.stdout and "finished" in trained.stdout
    assert "--- sample 0 at step 3" in trained.stdout
    assert SECRET not in done.stdout + done.stderr + trained.stdout + trained.stderr
    assert Path("elsewhere/log_tiny/step_00003/model.safetensors").exists()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.faults
def test_two_processes_share_the_check_and_both_end(data):
    """The altered shard is in the part of the second one; the first one ends as it does."""
    flip(data / SECOND)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train_gpt2.py"), *command_line(small_run(data))],
        env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode != 0 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and SECOND in lines[0] and "altered" in lines[0], done.stderr
    assert "[rank" not in done.stderr, "a traceback of a process"
    assert not (data.parent / "log").exists()


# -------------------------------------------------------------------------------------------------
# Several processes


def test_ranks_that_end_at_the_same_time_all_write_the_manifest(tmp_path):
    """The last one writes it, and each of them may find that it is the last."""
    Path("source").mkdir()
    for number in range(2):
        write(f"source/{number}.jsonl", DOCUMENTS[number::2])
    for rank in range(2):
        build("source", "out", rank, world=2)
    settings = json.loads(Path("out/manifest.json").read_text())["settings"]
    failures = []

    def merge(rank: int) -> None:
        try:
            for _ in range(100):
                token_shards.Record(Path("out"), settings, rank, 2).merge()
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=merge, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_rank_without_a_record_of_its_own_leaves_the_others(here, run, monkeypatch):
    """A rank that is refused removes neither another's lock nor its shards."""
    write("source/2.jsonl", DOCUMENTS[60:])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(source="source")[0] == 0
    before = tree(Path("out"))
    monkeypatch.setenv("RANK", "1")
    write_jsonl(Path("source/2.jsonl"), lines=["?"])
    code, _, err = run(source="source")
    assert code == 2
    assert_one_line(err, ("2.jsonl", "mend"))
    assert before.items() <= tree(Path("out")).items()
