"""The trainer on directories that fineweb.py wrote: intact, unfinished and damaged ones."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL, command_line, environment, losses
from fineweb_helpers import (
    DOCUMENTS,
    SECRET,
    TEXT,
    assert_one_line,
    build,
    reference,
    run_script,
    shards_in,
    tree,
    write_texts,
)

import train_gpt2
from support import errors
from support.shards import open_splits

pytest_plugins = ["fineweb_helpers"]
pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A directory of shards with a manifest, not to be written to."""
    directory = tmp_path_factory.mktemp("good")
    write_texts(directory / "my.jsonl", DOCUMENTS)
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
        manifest = json.loads((directory / "manifest.json").read_text())
        manifest["shards"][1] |= changes
        (directory / "manifest.json").write_text(json.dumps(manifest))

    return change


def list_twice(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["shards"].append(manifest["shards"][1])
    (directory / "manifest.json").write_text(json.dumps(manifest))


def list_elsewhere(directory: Path) -> None:
    """Lists an intact shard outside of the directory."""
    (directory / SECOND).rename(directory.parent / "x")
    edit(file="../x")(directory)


def write_manifest(content: bytes):
    return lambda directory: (directory / "manifest.json").write_bytes(content)


def leave_rank_1(directory: Path) -> None:
    """One of two ranks has finished: its manifest exists, and the merged one does not."""
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
def test_a_damaged_directory_is_refused(case, data, tmp_path, capsys):
    spoil, *words = BAD_DATA[case]
    spoil(data)
    before = tree(tmp_path)
    code, _, err = train(small_run(data), capsys)
    assert code == 2
    words = words if len(words) > 1 else [str(data)]
    assert_one_line(err, words)
    assert tree(tmp_path) == before


def test_trainer_and_fineweb_give_the_same_remedy_for_a_damaged_manifest(
    good, data, tmp_path, capsys, run
):
    shutil.copytree(good.parent, tmp_path / "again", copy_function=shutil.copy2)
    (tmp_path / "again" / "data" / "manifest.json").write_bytes(b"{")
    settings = dict(source=tmp_path / "again" / "my.jsonl", out=tmp_path / "again" / "data")
    _, _, theirs = run(shard_size=5000, **settings)
    _, _, ours = train(small_run(tmp_path / "again" / "data"), capsys)
    for err in (theirs, ours):
        assert_one_line(err, ("manifest.json", "damaged", "remove"))


@pytest.mark.parametrize("case", ["missing", "truncated", "altered"])
def test_the_same_command_rebuilds_a_shard(case, good, tmp_path, run):
    shutil.copytree(good.parent, tmp_path, dirs_exist_ok=True)
    BAD_DATA[f"a shard {case}"][0](tmp_path / "data")
    code, out, err = run(source="my.jsonl", out="data", shard_size=5000)
    assert code == 0 and SECOND in err
    assert shards_in("data") == shards_in(good)
    assert open_splits("data")


def test_an_altered_shard_is_used_without_check_data(data, capsys):
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
    assert code == 0 and "verified" not in out and losses(config) == expected
    for path in data.glob("*.npy"):
        tokens, header = np.load(path), np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(tokens)
        path.with_suffix(".bin").write_bytes(header.tobytes() + tokens.tobytes())
        path.unlink()
    config = dataclasses.replace(config, log_dir=str(tmp_path / "log3"))
    assert train(config, capsys)[0] == 0 and losses(config) == expected


def test_the_printed_epochs_agree_with_the_manifest(tmp_path, capsys):
    write_texts("my.jsonl", DOCUMENTS[:6])
    build("my.jsonl", "data", shard_size=300)
    totals = json.loads(Path("data/manifest.json").read_text())["totals"]
    windows = (totals["train_tokens"] - 1) // 32
    steps = 5 * windows // 2 // 4  # of 4 windows each, so nearly two and a half epochs
    settings = dict(max_steps=steps, val_every=99, total_batch_size=128)
    code, out, _ = train(small_run(tmp_path / "data", **settings), capsys)
    assert code == 0
    assert f"{totals['train_tokens']:,} tokens for training" in out
    assert f"({4 * steps / windows:.2f} epochs in {steps} steps)" in out
    assert f"{totals['val_tokens']:,} for val" in out
    assert [f"epoch {n} of the data" in out for n in (1, 2, 3, 4)] == [False, True, True, False]


@pytest.mark.faults
def test_a_text_is_tokenized_and_trained_on_from_any_directory(tmp_path):
    """No file contains the token of the environment."""
    for name in ("texts", "elsewhere"):
        Path(name).mkdir()
    text = TEXT[:200_000]
    Path("texts/my.txt").write_text(text)
    done = run_script("--source=my.txt", "--out=mydata", cwd="texts")
    assert done.returncode == 0, done.stderr
    assert "done: 2 shards" in done.stdout and "mydata" in done.stdout
    assert shards_in("texts/mydata") == reference([text], 10**8)

    few = SMALL | dict(max_steps=3, val_every=3, sample_every=3, sample_tokens=8)
    options = ["tiny", "--data=../texts/mydata", *(f"--{k}={v}" for k, v in few.items())]
    trained = subprocess.run(
        [sys.executable, str(ROOT / "train_gpt2.py"), *options],
        cwd="elsewhere", env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "verified 2 shards" in trained.stdout and "finished" in trained.stdout
    assert "--- sample 0 at step 3" in trained.stdout
    assert SECRET not in done.stdout + done.stderr + trained.stdout + trained.stderr
    assert Path("elsewhere/log_tiny/step_00003/model.safetensors").exists()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.faults
def test_two_processes_share_the_verification_and_both_stop(data):
    """The altered shard is in the part of the second process; the first one stops as well."""
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
