"""Continuing a directory of shards: other settings or sources, damaged manifests, small texts."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fineweb_helpers import (
    DOCUMENTS,
    SIZE,
    TEXT,
    assert_one_line,
    build,
    columns,
    hidden_files,
    manifest_of,
    reference,
    run_script,
    shards_in,
    times_in,
    write_texts,
)

import fineweb
from support.shard_writer import ShardDirectory
from support.text_files import Piece

pytest_plugins = ["fineweb_helpers"]
pytestmark = pytest.mark.usefixtures("surroundings")

# -------------------------------------------------------------------------------------------------
# Other settings and changed sources

OTHER = dict(
    name="sample", text_column="body", separator="|", shard_size=SIZE + 1, val_tokens=5,
)  # fmt: skip


def test_the_cases_below_are_all_settings_that_must_not_change():
    """Apart from the source, whose files are compared."""
    must_not_change = {*vars(fineweb.Config())} - {*fineweb.MAY_CHANGE, "source"}
    assert set(OTHER) == must_not_change


@pytest.mark.parametrize("out", ["begun", "finished"])
@pytest.mark.parametrize("name", OTHER)
def test_another_setting_than_before_is_refused_by_name(name, out, here, refused):
    before = SIZE if name == "shard_size" else getattr(fineweb.Config, name)
    words = (f"{name}={OTHER[name]!r}:", f"{name}={before!r};", f"out={out!r}", "another --out")
    refused(*words, **dict(source="source", out=out) | {name: OTHER[name]})


@pytest.mark.parametrize("change", ["another text", "a longer text", "a shorter text", "a touch"])
def test_a_source_that_was_used_and_has_changed_is_refused(change, here, run):
    """Also if only its modification time shows the difference; the existing shards are kept."""
    source = Path("source/1.parquet")
    texts = {"another text": DOCUMENTS[1:61], "a longer text": ["More.", *DOCUMENTS[:60]]}
    shutil.copy2(source, "saved")
    write_texts(source, texts.get(change, DOCUMENTS[:3]))
    if change == "a touch":
        shutil.copyfile("saved", source)
    write_texts("source/2.jsonl", DOCUMENTS[60:])
    before = shards_in("begun")
    code, out, err = run(source="source", out="begun")
    assert (code, out) == (2, "")
    assert_one_line(err, ("1.parquet", "changed", "another --out"))
    assert shards_in("begun") == before

    shutil.copy2("saved", source)
    code, _, err = run(source="source", out="begun")
    assert code == 0, err
    assert shards_in("begun") == reference(DOCUMENTS)


def test_a_change_that_no_finished_shard_contains_is_used_completely(run):
    """Only the open shard contained tokens of the second file."""
    Path("source").mkdir()
    write_texts("source/1.parquet", DOCUMENTS[:10])
    write_texts("source/2.parquet", DOCUMENTS[10:50])
    data = bytearray(Path("source/2.parquet").read_bytes())
    data[len(data) // 4 : len(data) // 4 * 3] = bytes(len(data) // 4 * 2)
    Path("source/2.parquet").write_bytes(data)
    assert run(source="source", shard_size=5000)[0] == 2
    assert shards_in("out") == {} and not hidden_files("out")
    others = ["Other text."] * 40 + DOCUMENTS[50:]
    write_texts("source/2.parquet", others)
    code, _, err = run(source="source", shard_size=5000)
    assert code == 0, err
    assert shards_in("out") == reference([*DOCUMENTS[:10], *others], 5000)


def test_a_source_that_became_shorter_by_several_shards_is_refused(tmp_path):
    """In a process of its own, because it might wait forever for more text."""
    path, plain = Path("my.parquet"), dict(compression="none", use_dictionary=False)
    table = pa.table({"text": ["a"] * 5000})  # 1,000 of them in each shard
    pq.write_table(table, path, row_group_size=500, **plain)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50] = b"\xff" * 50
    path.write_bytes(data)
    arguments = ("--source=my.parquet", "--out=out", f"--shard_size={SIZE}", "--workers=1")
    assert run_script(*arguments).returncode == 2
    before = shards_in("out")
    assert len(before) >= 2
    pq.write_table(table[:1000], path, row_group_size=500, **plain)
    done = run_script(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, ("changed", "another --out"))
    assert shards_in("out") == before


def test_an_unused_source_may_be_replaced(here, run):
    write_texts("source/2.jsonl", ["Something else.", *DOCUMENTS[70:]])
    assert run(source="source", out="begun")[0] == 0
    assert shards_in("begun") == reference([*DOCUMENTS[:60], "Something else.", *DOCUMENTS[70:]])


@pytest.mark.parametrize("out", ["begun", "finished"])
@pytest.mark.parametrize("change", ["one more", "one less", "renamed"])
def test_other_files_than_before_are_refused(change, out, here, refused):
    if change == "one more":
        write_texts("source/3.jsonl", DOCUMENTS[:1])
    else:
        Path("source/2.jsonl").rename("source/0.jsonl" if change == "renamed" else "2.jsonl")
    refused("source", f"out={out!r}", "another --out", source="source", out=out)


def test_a_finished_directory_refuses_a_changed_source(here, refused):
    write_texts("source/2.jsonl", DOCUMENTS[60:61])
    refused(
        "2.jsonl", "changed", "out='finished'", "another --out", source="source", out="finished"
    )


def test_a_finished_directory_does_not_change(here, run):
    """The number of workers and the engine may differ. Some releases of filelock touch the lock."""

    def inodes() -> dict:
        return {path: path.stat().st_ino for path in Path("out").iterdir()}

    write_texts("source/2.jsonl", DOCUMENTS[60:])
    build("source", "out")
    before = times_in(Path("out")), inodes()
    code, out, err = run(source="source", workers=2, engine="auto")
    assert (code, err) == (0, "") and "finished already: 12 shards" in out
    assert (times_in(Path("out")), inodes()) == before


# -------------------------------------------------------------------------------------------------
# Damaged manifests


def altered(manifest: dict, **more) -> bytes:
    return json.dumps(manifest | more).encode()


DAMAGED = {
    "empty": lambda manifest: b"",
    "cut off": lambda manifest: json.dumps(manifest).encode()[:300],
    "zeros": lambda manifest: bytes(4096),
    "not text": lambda manifest: bytes(range(256)) * 400,
    "a list": lambda manifest: b"[]",
    "too deep": lambda manifest: b"[" * 100_000,
    "another program's": lambda manifest: b'{"name": "an app", "icons": []}',
    "without settings": lambda manifest: altered(manifest, settings={}),
    "shards null": lambda manifest: altered(manifest, shards=None),
    "shards of nothing": lambda manifest: altered(manifest, shards=[{}]),
    "a shard's size a word": lambda manifest: altered(
        manifest, shards=[manifest["shards"][0] | {"tokens": "many"}]
    ),
    "a shard elsewhere": lambda manifest: altered(
        manifest, shards=[manifest["shards"][0] | {"file": "../x.npy"}]
    ),
    "sources null": lambda manifest: altered(manifest, sources=None),
    "sources of nothing": lambda manifest: altered(manifest, sources=[{}, {}]),
    "totals null": lambda manifest: altered(manifest, totals=None),
    "a shard without a position": lambda manifest: altered(
        manifest, shards=[manifest["shards"][0] | {"place": None}]
    ),
    "counts in words": lambda manifest: altered(
        manifest, shards=[manifest["shards"][0] | {"place": [0, 0, 0, "many", 0, 0]}]
    ),
}


@pytest.mark.parametrize("out", ["begun", "finished"])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_manifest_is_named(case, out, here, refused):
    write_texts("source/2.jsonl", DOCUMENTS[60:])
    path = Path(out) / ("manifest.json" if out == "finished" else "manifest.partial.json")
    path.write_bytes(DAMAGED[case](json.loads(path.read_text())))
    refused(str(path), "damaged", repr(out), "another", source="source", out=out)


# -------------------------------------------------------------------------------------------------
# Small texts

TOO_LITTLE = {
    "an empty text": ("my.txt", lambda p: p.write_text(""), {}, "1 tokens"),
    "an empty jsonl": ("my.jsonl", lambda p: p.write_text(""), {}, "0 tokens"),
    "nothing but nulls": ("my.jsonl", lambda p: write_texts(p, [None] * 5), {}, "0 tokens"),
    "no rows": ("my.parquet", columns(text=pa.array([], pa.string())), {}, "0 tokens"),
    "one empty document": ("my.jsonl", lambda p: write_texts(p, [""]), {}, "1 tokens"),
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
        write_texts(name, DOCUMENTS)
    assert run(source=name, **settings)[0] == 0
    whole = [TEXT[:70_000]] if name == "my.txt" else DOCUMENTS
    assert shards_in("out") == reference(whole)


def test_two_tokens_are_enough_for_both_splits(run):
    write_texts("my.jsonl", ["", ""])
    assert run(source="my.jsonl")[0] == 0
    assert shards_in("out") == reference(["", ""]) and len(shards_in("out")) == 2


# -------------------------------------------------------------------------------------------------
# The manifest of several ranks


def test_ranks_that_finish_at_the_same_time_write_one_manifest(tmp_path):
    """Each finds the manifests of the others and writes the merged one, without an error."""
    settings = {"shard_size": 5, "val_tokens": 0}
    records = [ShardDirectory(tmp_path, settings, rank, 4) for rank in range(4)]
    for rank, record in enumerate(records):
        sources = [{"file": f"{rank}_{i}.txt", "bytes": i} for i in range(100)]
        record.begin(sources, "", None)
        record.write_piece(Piece(0, 0, 1, True, ()), np.zeros(3, np.uint16), (1, 0, 0))
        record.finish()
    assert records[0].merge()
    whole, together, failures = manifest_of(tmp_path), threading.Barrier(4, timeout=60), []
    assert len(whole["sources"]) == 400 and whole["totals"]["documents"] == 4

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


def test_each_of_several_last_ranks_writes_the_manifest(tmp_path):
    """Each rank may find that it is the last one."""
    Path("source").mkdir()
    for number in range(2):
        write_texts(f"source/{number}.jsonl", DOCUMENTS[number::2])
    for rank in range(2):
        build("source", "out", rank, world=2)
    settings = json.loads(Path("out/manifest.json").read_text())["settings"]
    failures = []

    def merge(rank: int) -> None:
        try:
            for _ in range(100):
                ShardDirectory(Path("out"), settings, rank, 2).merge()
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=merge, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
