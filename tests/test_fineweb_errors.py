"""Wrong input to fineweb.py: one line that names it, exit code 2, and nothing is lost.

Each case ends with exactly one line that begins with "error: " and names the file or setting and
the remedy. Existing files do not change, and no file is left but a lock.
"""

import datetime
import errno
import functools
import json
import multiprocessing.synchronize
import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, environment, requires
from fineweb_helpers import (
    DOCUMENTS,
    SIZE,
    TEXT,
    assert_one_line,
    columns,
    hidden_files,
    mount_tmpfs,
    reference,
    run_script,
    shards_in,
    tree,
    write_text_parquet,
    write_texts,
)

from support import text_files, tokenizer
from support.shards import load_manifest

pytest_plugins = ["fineweb_helpers"]
pytestmark = pytest.mark.usefixtures("surroundings")

# -------------------------------------------------------------------------------------------------
# Settings

WRONG_SETTINGS = {
    "an unknown one": (dict(sourc="my.txt"), "--sourc=", "--source"),
    "a recipe's name": (dict(n_layer=3), "--n_layer=3", "no such setting"),
    "a size in words": (dict(shard_size="many"), "shard_size='many'", "whole number"),
    "half a token": (dict(shard_size=1.5), "shard_size='1.5'", "whole number"),
    "workers in words": (dict(workers="all"), "workers='all'", "whole number"),
    "workers below 0": (dict(workers=-1), "workers=-1", "from 0 to 1,000"),
    "a billion workers": (dict(workers="1e9"), "workers=1000000000", "from 0 to 1,000"),
    "a trillion workers": (dict(workers="1e12"), "workers=1000000000000", "from 0 to 1,000"),
    "a shard beyond memory": (dict(shard_size="1e12"), "shard_size=1000000000000", "from 1 to 10,"),
    "no shard_size": (dict(shard_size=0), "shard_size=0", "from 1 to 10,000,000,000"),
    "shard_size below 0": (dict(shard_size=-5), "shard_size=-5", "from 1 to 10,000,000,000"),
    "val_tokens below 0": (dict(val_tokens=-1), "val_tokens=-1", "from 0 to shard_size"),
    "val_tokens too many": (dict(val_tokens=SIZE + 1), "val_tokens=2001", "from 0 to shard_size"),
    "another engine": (dict(engine="bpe"), "engine='bpe'", "auto, gigatoken, tiktoken"),
    "no out": (dict(out=""), "out=''", "--out=mydata"),
    "a file for out": (dict(out="my.txt"), "my.txt", "exists", "another --out"),
    "out in a file": (dict(out="my.txt/deep/out"), "my.txt", "--out"),
    "a device for out": (dict(out="/dev/null"), "/dev/null", "another --out"),
    "out too long": (dict(out="x" * 300), "x" * 300, "--out"),
    "no source": (dict(source=""), "source=''", "name a"),
    "a file that is not there": (dict(source="gone.txt"), "source='gone.txt'", "no such file"),
    "a directory that is not": (dict(source="gone/"), "source='gone/'", "no such file"),
    # a valid name on the Hub, but a known suffix means a file
    "a directory that is misspelt": (dict(source="./dta"), "source='./dta'", "no such file"),
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


def test_a_wrong_setting_in_a_process_of_its_own(tmp_path):
    before = tree(tmp_path)
    done = run_script("--source=my.txt", "--shard_sise=5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert_one_line(done.stderr, ("--shard_sise=5", "--shard_size"))
    assert tree(tmp_path) == before


# -------------------------------------------------------------------------------------------------
# Directories


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


def test_a_locked_directory_is_refused(refused, tmp_path, monkeypatch):
    """The lock may be the only file yet, for example while the other process lists a dataset."""
    Path("my.txt").write_text(TEXT[:9000])
    Path("out").mkdir()
    file_lock = filelock.FileLock
    with file_lock("out/.lock_00000"):
        monkeypatch.setattr(
            filelock, "FileLock", lambda path, timeout: file_lock(path, timeout=0.1)
        )
        refused("out", "another process", "another --out", source="my.txt")
        assert Path("out/.lock_00000").exists()


def test_shards_of_another_program_are_not_touched(refused):
    Path("my.txt").write_text(TEXT[:9000])
    for name in ("edufineweb_val_000000.npy", "fineweb_train_000001.bin"):
        Path(name).with_suffix("").mkdir()
        (Path(name).with_suffix("") / name).write_bytes(b"theirs")
        refused(name, "another --out", source="my.txt", out=Path(name).with_suffix(""))


def test_out_may_contain_other_files(run):
    Path("my.txt").write_text(TEXT[:9000])
    Path("out").mkdir()
    names = ("notes.md", "manifest_mine.json")
    for name in names:
        Path("out", name).write_text("mine")
    assert run(source="my.txt")[0] == 0
    assert shards_in("out") == reference([TEXT[:9000]])
    assert all(Path("out", name).read_text() == "mine" for name in names)


@pytest.mark.parametrize(
    "content", ['{"default": {"splits": {}}}', "{\n  1: 2\n}\n", "[1]\n", "\n7\n"]
)
def test_a_last_file_of_another_kind_is_refused_before_any_shard(content, refused):
    """A directory of a dataset has more .json files than those of its text."""
    Path("all").mkdir()
    write_texts("all/a.jsonl", DOCUMENTS)
    Path("all/dataset_infos.json").write_text(content)
    refused("all/dataset_infos.json", source="all")


# -------------------------------------------------------------------------------------------------
# Sources

KINDS = ("my.parquet", "my.jsonl", "my.jsonl.gz", "my.jsonl.zst")


@pytest.mark.parametrize("name", KINDS)
def test_the_sources_of_the_cases_below_are_valid_before_the_change(name, run):
    write_texts(name, DOCUMENTS)
    code, out, _ = run(source=name)
    assert code == 0 and "12 shards, 22,271 tokens" in out
    assert shards_in("out") == reference(DOCUMENTS)


def cut(path: Path, keep: int) -> None:
    write_texts(path, DOCUMENTS)
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)


def twice_the_same(path: Path) -> None:
    texts = pa.array(["One."])
    pq.write_table(pa.Table.from_arrays([texts, texts], names=["text", "text"]), path)


def no_utf8_column(path: Path) -> None:
    pq.write_table(pa.table({"cafe": ["One."], "text": ["Two."]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"cafe", b"caf\xe9"))


def flip_in_a_checked_page(path: Path) -> None:
    write_text_parquet(path, DOCUMENTS, compression="none", use_dictionary=False,
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
    "a foreign .parquet": ("my.parquet", lambda p: p.write_bytes(FOREIGN), "fix it"),
    "a foreign .jsonl": ("my.jsonl", lambda p: p.write_bytes(FOREIGN), "byte 0 ", "fix it"),
    "a foreign .jsonl.gz": ("my.jsonl.gz", lambda p: p.write_bytes(FOREIGN), "fix it"),
    "a foreign .jsonl.zst": ("my.jsonl.zst", lambda p: p.write_bytes(FOREIGN), "fix it"),
    "a foreign .txt.gz": ("my.txt.gz", lambda p: p.write_bytes(FOREIGN), "fix it"),
    "a foreign .txt.zst": ("my.txt.zst", lambda p: p.write_bytes(FOREIGN), "fix it"),
    "an empty .parquet": ("my.parquet", lambda p: cut(p, 0), "fix it"),
    "an empty .gz": ("my.jsonl.gz", lambda p: cut(p, 0), "fix it"),
    "an empty .zst": ("my.txt.zst", lambda p: cut(p, 0), "fix it"),
    "half a .parquet": ("my.parquet", lambda p: cut(p, 9000), "fix it"),
    "a .parquet without its last byte": ("my.parquet", lambda p: cut(p, -1), "fix it"),
    "10 bytes of a .gz": ("my.jsonl.gz", lambda p: cut(p, 10), "fix it"),
    "half a .gz": ("my.jsonl.gz", lambda p: cut(p, 9000), "fix it"),
    "a .gz without its length": ("my.jsonl.gz", lambda p: cut(p, -4), "fix it"),
    "a .gz without its last byte": ("my.jsonl.gz", lambda p: cut(p, -1), "fix it"),
    "5 bytes of a .zst": ("my.jsonl.zst", lambda p: cut(p, 5), "fix it"),
    "half a .zst": ("my.jsonl.zst", lambda p: cut(p, 9000), "fix it"),
    "a .zst without its last byte": ("my.jsonl.zst", lambda p: cut(p, -1), "fix it"),
    "a checked page altered": ("my.parquet", flip_in_a_checked_page, "fix it"),
    "no such column": (
        "my.parquet", columns(body=["a"], url=["b"]), "'text'", "--text_column", ": body, url",
    ),
    "a column of numbers": ("my.parquet", columns(text=[1, 2]), "text_column='text'", "int64"),
    "a column of lists": ("my.parquet", columns(text=[["a"]]), "text_column='text'", "list"),
    "a column of dates": (
        "my.parquet", columns(text=[datetime.date(2024, 1, 1)]), "text_column='text'", "date32",
    ),
    "two such columns": ("my.parquet", twice_the_same, "'text'"),
    "a column's name in Latin-1": ("my.parquet", no_utf8_column, "fix it"),
    "a bad line": ("my.jsonl", line('{"text": '), "byte 14 ", "fix it"),
    "a line of text": ("my.jsonl", line("Words."), "byte 14 ", "fix it"),
    "a line of a list": ("my.jsonl", line('["text"]'), "byte 14 ", "object", "fix it"),
    "a line of a string": ("my.jsonl", line('"text"'), "byte 14 ", "object", "fix it"),
    "a line too deep": ("my.jsonl", line("[" * 100_000), "byte 14 ", "fix it"),
    "a line without the column": (
        "my.jsonl", line('{"body": "b", "url": ""}'), "byte 14", "'text'", "--text_column",
        ": body, url",
    ),
    "a number for a text": ("my.jsonl", line('{"text": 5}'), "byte 14 ", "'text'", "not text"),
    "a list for a text": ("my.jsonl", line('{"text": ["a"]}'), "byte 14 ", "'text'", "not text"),
    "one array": ("my.json", lambda p: p.write_text('[{"text": "a"}]'), "byte 0 ", "object"),
    "a jsonl in UTF-16": (
        "my.jsonl", lambda p: p.write_text('{"text": "a"}\n', encoding="utf-16"), "UTF-16",
        "iconv",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_SOURCES)
def test_a_source_that_cannot_be_read_is_named(case, refused):
    name, make, *words = WRONG_SOURCES[case]
    make(Path(name))
    refused(name, *words, source=name)


def test_a_source_without_rows_and_columns_has_no_tokens(refused):
    columns()(Path("my.parquet"))
    refused("source", "only 0 tokens", source="my.parquet")


def apply_damage(name: str) -> None:
    """Writes DOCUMENTS to a file and damages its middle."""
    path = Path(name)
    write_texts(path, DOCUMENTS)
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
def test_shards_before_a_damaged_place_are_kept_and_a_changed_source_is_refused(
    name, run, monkeypatch
):
    """The repaired file has another modification time, and possibly another size."""
    monkeypatch.setattr(text_files, "PIECE", 4096)
    apply_damage(name)
    made = []
    for _ in range(2):
        code, out, err = run(source=name)
        assert (code, out) == (2, "")
        assert_one_line(err, (name, "fix it"))
        made.append(shards_in("out"))
    assert made[0] == made[1] and 2 <= len(made[0]) < 11
    assert made[0].items() <= reference(DOCUMENTS).items()

    write_texts(name, DOCUMENTS)
    code, out, err = run(source=name)
    assert (code, out) == (2, "")
    assert_one_line(err, (name, "changed", "another --out"))
    assert shards_in("out") == made[0] and hidden_files("out") == []
    assert run(source=name, out="other")[0] == 0
    assert shards_in("other") == reference(DOCUMENTS)


# -------------------------------------------------------------------------------------------------
# Packages and engines


@pytest.mark.parametrize(
    "package",
    [
        "pyarrow",
        "filelock",
        "tiktoken",
        "datasets",
        pytest.param("huggingface_hub", marks=requires("datasets")),
    ],
)
def test_a_package_that_is_not_installed_is_named(package, refused, monkeypatch):
    tokenizer.get_encoding.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    Path("my.txt").write_text(TEXT[:9000])
    hub = package in ("datasets", "huggingface_hub")
    refused(package, "pip install", source="nobody/nothing" if hub else "my.txt")


def test_a_missing_gigatoken_is_an_error_only_if_requested(tmp_path):
    """Workers are new interpreters here, in which it cannot be imported either."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "gigatoken.py").write_text("raise ImportError('no such module')")
    Path("my.txt").write_text(TEXT[:9000])
    before, kwargs = tree(tmp_path), dict(env=environment(PYTHONPATH=str(tmp_path / "without")))
    arguments = ("--source=my.txt", "--out=out", f"--shard_size={SIZE}", "--workers=1")
    done = run_script(*arguments, "--engine=gigatoken", **kwargs)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, ("engine='gigatoken'", "pip install", "--engine=tiktoken"))
    assert {k: v for k, v in tree(tmp_path).items() if "__pycache__" not in k} == before

    done = run_script(*arguments, **kwargs)
    assert done.returncode == 0, done.stderr
    assert shards_in("out") == reference([TEXT[:9000]])


def test_wrong_ids_are_detected_and_another_engine_continues(run, monkeypatch):
    """From a document on that is not the first one."""
    write_texts("my.parquet", DOCUMENTS)
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
    assert len(shards_in("out")) >= 2
    assert shards_in("out").items() <= reference(DOCUMENTS).items()
    code, _, err = run(source="my.parquet", engine="tiktoken")
    assert code == 0, err
    assert shards_in("out") == reference(DOCUMENTS)


def test_altered_ranks_are_named(refused, monkeypatch, tmp_path):
    path = tmp_path / "gpt2.tiktoken"
    path.write_bytes(tokenizer.RANKS.read_bytes()[:-9])
    tokenizer.load_ranks.cache_clear()
    tokenizer.get_encoding.cache_clear()
    monkeypatch.setattr(tokenizer, "RANKS", path)
    Path("my.txt").write_text(TEXT[:9000])
    refused(str(path), "restore", source="my.txt")


# -------------------------------------------------------------------------------------------------
# Processes that cannot be started


@pytest.mark.parametrize("options", ["ro", "size=4k"])
def test_dev_shm_that_is_not_writable_or_too_small_is_named(options, tmp_path):
    """A real one, mounted for this process only. The locks of processes lie there."""
    mount = f"mount -t tmpfs -o {options} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("/dev/shm cannot be mounted here")
    Path("my.txt").write_text(TEXT[:9000])
    before = tree(tmp_path)
    command = f"{mount} && {sys.executable} {ROOT}/fineweb.py --source=my.txt --out=out --workers=1"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, env=environment()
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "--out" not in assert_one_line(done.stderr, ("/dev/shm",))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.ENOENT])
def test_a_lock_that_cannot_be_made_names_dev_shm(number, refused, monkeypatch):
    def fail(*arguments, **settings):
        raise OSError(number, os.strerror(number))

    Path("my.txt").write_text(TEXT[:9000])
    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", fail)
    assert "--out" not in refused("/dev/shm", os.strerror(number), source="my.txt")


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE])
def test_processes_that_cannot_be_started_name_the_workers(number, refused, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    Path("my.txt").write_text(TEXT[:9000])
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", fail)
    assert "--out" not in refused("workers", "fewer --workers", source="my.txt", workers=2)


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


@pytest.mark.parametrize("what", ["shards", "records"])
def test_a_full_disk_loses_nothing_and_the_run_continues_with_more_room(what, small_disk, run):
    """With small shards the manifest does not fit: 400 bytes for each, beside the old one."""
    disk, make_room = small_disk
    size = {"shards": 50_000, "records": 2000}[what]
    whole = reference(LONG, size)
    write_texts("my.parquet", LONG)
    settings = dict(source="my.parquet", out=disk / "out", shard_size=size)
    for _ in range(2):
        code, out, err = run(**settings)
        assert (code, out) == (2, "")
        assert_one_line(err, (str(disk / "out"), "disk is full", "make room"))
        assert shutil.disk_usage(disk).free > 0
        found = shards_in(disk / "out")
        assert found.items() <= whole.items() and len(found) >= 2
        json.loads((disk / "out" / "manifest.partial.json").read_text())

    make_room()
    code, _, err = run(**settings)
    assert code == 0, err
    if what == "shards":
        assert f"continuing after {size * len(found):,} tokens" in err
    assert shards_in(disk / "out") == whole
    assert hidden_files(disk / "out") == []
    assert load_manifest(disk / "out") is not None


def test_a_disk_that_is_full_from_the_start_stays_unchanged(small_disk, refused):
    disk, _ = small_disk
    (disk / "others").write_bytes(bytes(399 * 1024))
    write_texts("my.jsonl", DOCUMENTS)
    refused("disk is full", "make room", source="my.jsonl", out=disk / "out")


def test_a_full_disk_in_a_process_of_its_own(small_disk):
    """In development mode, in which Python also reports a file that could not be closed."""
    disk, _ = small_disk
    write_texts("my.jsonl", LONG)
    options = [f"--source={Path('my.jsonl').resolve()}", f"--out={disk / 'out'}", "--workers=1"]
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", ROOT / "fineweb.py", *options],
        capture_output=True, text=True, timeout=100, env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, (str(disk / "out"), "disk is full", "make room"))


# -------------------------------------------------------------------------------------------------
# File names

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
    write_texts("plain" + Path(name).suffix, DOCUMENTS[:9])
    os.rename("plain" + Path(name).suffix, name)


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("part", [lambda name: name, os.path.dirname], ids=["file", "directory"])
def test_unusual_file_names_work(name, part, run):
    put(name)
    code, _, err = run(source=part(name), out=os.path.join("a", "..", ODD_OUT))
    assert code == 0, err
    assert shards_in(ODD_OUT) == reference(DOCUMENTS[:9])
    assert load_manifest(Path(ODD_OUT)) is not None


def test_a_relative_name_is_not_parsed_as_a_url(run):
    put("a/s3:x.parquet")
    os.chdir("a")
    assert run(source="s3:x.parquet")[0] == 0
    assert shards_in("out") == reference(DOCUMENTS[:9])


@pytest.mark.parametrize("kind", [".parquet", ".jsonl"])
def test_a_name_that_is_not_utf8_works(kind, run):
    name = os.fsdecode(b"caf\xe9/n\xe9") + kind
    try:
        put(name)
    except OSError:
        pytest.skip("no such names on this file system")
    for number, source in enumerate((name, os.path.dirname(name))):
        code, _, err = run(source=source, out=f"out{number}")
        assert code == 0, err
        assert shards_in(f"out{number}") == reference(DOCUMENTS[:9])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names must be UTF-8")
@pytest.mark.parametrize("out", ["ö", os.fsdecode(b"o\xe9")])
def test_a_name_that_the_console_cannot_print_is_not_an_error(out):
    write_texts("my.jsonl", DOCUMENTS[:9])
    arguments = ("--source=my.jsonl", f"--out={out}", "--workers=1", "--engine=tiktoken")
    done = run_script(*arguments, env=environment(PYTHONIOENCODING="ascii:strict"))
    assert done.returncode == 0 and "done: 2 shards" in done.stdout, done.stderr
    assert shards_in(out) == reference(DOCUMENTS[:9])


@pytest.mark.parametrize("name", ["gone it's.jsonl", 'gone "so".txt', "gone 深い.parquet"])
def test_an_unusual_name_is_printed_unchanged(name, refused):
    refused(f"source={name!r}", "no such file", source=name)
