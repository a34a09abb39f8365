"""Checkpoints: complete or not there, found, pruned, and readable by other programs."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (
    assert_one_line,
    assert_same_tensors,
    assert_second_interrupt_ends,
    losses,
    outcome,
    start,
    tree,
    wait_for_step,
)
from safetensors.torch import load_file

import train_gpt2
from support import checkpoint, huggingface, tokenizer
from support.distributed import Runtime, initialize
from support.errors import UserError
from support.run_output import RunOutput

FILES = {"a.bin": b"0123456789" * 1000, "b.txt": b"words\n"}


def fill(directory: Path) -> None:
    """Writes FILES."""
    for name, content in FILES.items():
        (directory / name).write_bytes(content)


def content(directory: Path) -> dict[str, bytes | None]:
    """{relative path: bytes, or None for a directory} of all below `directory`."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def make(log_dir: Path, *steps: int) -> dict[int, Path]:
    """Valid checkpoints of these steps."""
    paths = {step: log_dir / f"step_{step:05d}" for step in steps}
    for path in paths.values():
        checkpoint.write_directory(path, fill)
    return paths


# -------------------------------------------------------------------------------------------------
# One directory: complete, or not there


def test_a_written_directory_is_complete_and_lists_size_and_hash_of_every_file(tmp_path):
    target = tmp_path / "log" / "step_00001"
    checkpoint.write_directory(target, fill)
    listed = json.loads((target / "files.json").read_text())
    assert listed == {
        name: {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        for name, raw in FILES.items()
    }
    assert {path.name for path in target.iterdir()} == {*FILES, "files.json"}
    assert checkpoint.find_problem(target) is None
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("there", [False, True], ids=["new", "there before"])
def test_a_fill_that_raises_leaves_everything_as_it_was(tmp_path, error, there):
    make(tmp_path, 1, *([2] if there else []))
    before = content(tmp_path)

    def fail(directory):
        (directory / "a.bin").write_bytes(b"half")
        raise error

    with pytest.raises(BaseException) as raised:
        checkpoint.write_directory(tmp_path / "step_00002", fail)
    assert raised.value is error or raised.type is error
    assert content(tmp_path) == before


def test_while_it_is_filled_no_checkpoint_is_seen(tmp_path):
    seen = []

    def look(directory):
        fill(directory)
        seen.append(checkpoint.list_checkpoints(tmp_path))

    checkpoint.write_directory(tmp_path / "step_00001", look)
    assert seen == [{}] and list(checkpoint.list_checkpoints(tmp_path)) == [1]


def test_a_damaged_directory_and_a_partial_one_are_replaced(tmp_path):
    target = make(tmp_path, 1)[1]
    (target / "a.bin").write_bytes(b"")
    (target / "left over").write_bytes(b"x")
    partial = tmp_path / ".step_00001.partial"
    partial.mkdir()
    (partial / "c.txt").write_text("of a killed run")
    checkpoint.write_directory(target, fill)
    assert checkpoint.find_problem(target) is None
    assert {path.name for path in target.iterdir()} == {*FILES, "files.json"}
    assert list(tmp_path.iterdir()) == [target]


def flip_one_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)


PROBLEMS = {
    "missing": (lambda d: (d / "a.bin").unlink(), "a.bin is missing"),
    "a directory": (
        lambda d: ((d / "a.bin").unlink(), (d / "a.bin").mkdir()),
        "a.bin is missing",
    ),
    "truncated": (lambda d: os.truncate(d / "a.bin", 9_999), "a.bin has 9,999 bytes, not 10,000"),
    "emptied": (lambda d: os.truncate(d / "a.bin", 0), "a.bin has 0 bytes, not 10,000"),
    "grown": (lambda d: os.truncate(d / "a.bin", 10_001), "a.bin has 10,001 bytes, not 10,000"),
    "altered": (lambda d: flip_one_byte(d / "a.bin"), "a.bin was altered"),
    "no list": (lambda d: (d / "files.json").unlink(), "files.json is missing"),
    "no JSON": (lambda d: (d / "files.json").write_text("{"), "files.json cannot be read"),
    "empty list": (lambda d: (d / "files.json").write_text(""), "files.json cannot be read"),
    "no text": (lambda d: (d / "files.json").write_bytes(b"\xff\x00"), "files.json cannot be read"),
    "a list": (lambda d: (d / "files.json").write_text("[1]"), "files.json cannot be read"),
    "nested": (
        lambda d: (d / "files.json").write_text("[" * 100_000),
        "files.json cannot be read",
    ),
    "other JSON": (
        lambda d: (d / "files.json").write_text('{"a.bin": 1}'),
        "files.json cannot be read",
    ),
    "nothing listed": (lambda d: (d / "files.json").write_text("{}"), "files.json"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_are_named(tmp_path, case):
    harm, words = PROBLEMS[case]
    target = make(tmp_path, 1)[1]
    harm(target)
    reason = checkpoint.find_problem(target)
    assert reason is not None and words in reason


# -------------------------------------------------------------------------------------------------
# Several directories


def test_newest_valid_skips_damaged_ones_and_prints_them(tmp_path, capsys):
    paths = make(tmp_path, 5, 10, 15, 100000)
    flip_one_byte(paths[100000] / "a.bin")
    (paths[15] / "b.txt").unlink()
    assert checkpoint.newest_valid(tmp_path) == paths[10]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert all(
        str(paths[step]) in line and word in line
        for step, word, line in zip((100000, 15), ("a.bin", "b.txt"), printed)
    )


def test_newest_valid_prints_nothing_if_the_newest_is_valid(tmp_path, capsys):
    paths = make(tmp_path, 99999, 100000)
    assert checkpoint.newest_valid(tmp_path) == paths[100000]
    assert capsys.readouterr() == ("", "")


def test_newest_valid_is_none_without_a_checkpoint(tmp_path):
    assert checkpoint.newest_valid(tmp_path) is None
    assert checkpoint.newest_valid(tmp_path / "not there") is None
    for name in ("step_1", "step_00001.old", ".step_00001.partial", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00002").write_text("a file")
    assert checkpoint.newest_valid(tmp_path) is None


def test_newest_valid_raises_if_all_are_damaged(tmp_path, capsys):
    for path in make(tmp_path, 1, 2).values():
        (path / "a.bin").unlink()
    with pytest.raises(UserError, match="damaged") as error:
        checkpoint.newest_valid(tmp_path, file=sys.stderr)
    assert str(tmp_path) in str(error.value) and "--log_dir" in str(error.value)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 2


@pytest.mark.parametrize(
    "keep, best, left",
    [
        (1, None, [50]),
        (2, None, [40, 50]),
        (2, 10, [10, 40, 50]),
        (2, 50, [40, 50]),
        (1, 30, [30, 50]),
        (9, 20, [10, 20, 30, 40, 50]),
    ],
)
def test_prune_keeps_the_last_ones_and_the_best_and_touches_nothing_else(
    tmp_path, keep, best, left
):
    others = ("step_1", "notes", "step_00010.old", "step_00060x", ".hidden")
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    (tmp_path / "log.txt").write_text("0 train 10.9\n")
    before = content(tmp_path)
    make(tmp_path, 10, 20, 30, 40, 50)
    (tmp_path / ".step_00050.partial").mkdir()
    checkpoint.prune(tmp_path, 50, keep, best)
    assert list(checkpoint.list_checkpoints(tmp_path)) == left
    kept = {f"step_{step:05d}" for step in left}
    after = content(tmp_path)
    assert {name: raw for name, raw in after.items() if name.split(os.sep)[0] not in kept} == before
    assert all(checkpoint.find_problem(tmp_path / name) is None for name in kept)


# -------------------------------------------------------------------------------------------------
# Checkpoints of runs


def open_as_another_program(directory: Path, idx, text: str, monkeypatch) -> dict:
    """What torch, safetensors and transformers find, without code of this repository."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with monkeypatch.context() as patch:
        for name in list(sys.modules):
            if name.split(".")[0] in ("train_gpt2", "support"):
                patch.setitem(sys.modules, name, None)  # importing it is an error
        state = torch.load(directory / "train_state.pt")
        weights = load_file(directory / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        ids = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    with torch.no_grad():
        logits = model(idx[:, :-1]).logits.double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
    return dict(state=state, weights=weights, model=model, ids=ids, loss=loss.item())


@pytest.mark.gpt2
def test_another_program_opens_a_checkpoint_and_computes_the_logged_validation_loss(
    small, text_file, monkeypatch
):
    config = small(val_every=2, val_tokens=320, n_head=4, device="cpu")
    assert train_gpt2.train(config) == 0
    directory = Path(config.log_dir) / "step_00004"

    tokens = np.array(tokenizer.get_encoding().encode_ordinary(text_file.read_text()))
    held_out = tokens[len(tokens) * 9 // 10 :]
    windows = np.stack([held_out[i * 32 : i * 32 + 33] for i in range(320 // 32)])
    text = "MARETH:\nWho's there, at  12 o'clock? \u00e9\u4e2d\U0001f600"
    found = open_as_another_program(directory, torch.from_numpy(windows), text, monkeypatch)

    assert found["loss"] == pytest.approx(losses(config, "val")[4], abs=1e-4)
    assert found["state"]["step"] == 4
    parts = {"optimizer", "scaler", "position", "rng", "settings", "padding_rows"}
    assert parts <= {*found["state"]}
    theirs = found["model"].state_dict()
    del theirs["lm_head.weight"]
    shapes = {name: tensor.shape for name, tensor in found["weights"].items()}
    assert shapes == {name: t.shape for name, t in theirs.items()}  # no _orig_mod. or module.
    assert shapes["transformer.wte.weight"] == (50257, config.n_embd)
    assert {tensor.dtype for tensor in found["weights"].values()} == {torch.float32}
    assert found["ids"] == tokenizer.get_encoding().encode_ordinary(text)


def test_train_state_holds_no_name_of_a_wrapper(small):
    config = small(max_steps=1)
    train_gpt2.train(config)
    state = torch.load(Path(config.log_dir) / "step_00001" / "train_state.pt")

    def names(value):
        if isinstance(value, dict):
            return [str(k) for k in value] + [name for v in value.values() for name in names(v)]
        return []

    assert names(state) and not any("_orig_mod" in n or "module." in n for n in names(state))


@pytest.mark.parametrize(
    "keep, max_lr",
    [(1, 1.0), (2, 1.0), (3, 1e-3)],
    ids=["the last and the best", "the last two and the best", "the last three, the best of them"],
)
def test_a_run_keeps_the_last_the_best_and_the_final_checkpoint(small, keep, max_lr):
    config = small(
        keep_checkpoints=keep, checkpoint_every=1, val_every=1, val_tokens=320, max_steps=5,
        max_lr=max_lr, warmup_steps=6,
    )  # fmt: skip
    train_gpt2.train(config)
    log_dir = Path(config.log_dir)
    validations = losses(config, "val")
    best = min((step for step in validations if step > 0), key=validations.get)
    assert (best < 5 - keep) == (max_lr == 1.0), "the learning rate does not give the case"
    left = checkpoint.list_checkpoints(log_dir)
    assert set(left) == {best, *range(6 - keep, 6)}
    assert all(checkpoint.find_problem(path) is None for path in left.values())
    assert {path.name for path in log_dir.iterdir()} == {
        ".lock", "log.txt", "progress.txt", "run.json", *(path.name for path in left.values()),
    }  # fmt: skip


def test_checkpoint_every_0_leaves_the_final_one(small):
    config = small(checkpoint_every=0, keep_checkpoints=3)
    train_gpt2.train(config)
    assert list(checkpoint.list_checkpoints(Path(config.log_dir))) == [4]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_checkpoint_just_written_outlives_damaged_newer_ones(small, keep):
    """Damaged checkpoints that a restarted run skipped do not count among the last ones kept:
    killed again right after its first checkpoint, the run can continue from that one."""
    config = small(checkpoint_every=1, keep_checkpoints=6, max_steps=6)
    train_gpt2.train(config)
    log_dir = Path(config.log_dir)
    for step, path in checkpoint.list_checkpoints(log_dir).items():
        if step >= 3:
            os.truncate(path / "train_state.pt", 100)
    (log_dir / "run.json").unlink()  # the run has to reach the final one again
    config = small(checkpoint_every=3, keep_checkpoints=keep, max_steps=6)
    run = train_gpt2.open_run(config, initialize(config.device, config.dtype))
    assert run.step == 2
    run.step = 3
    train_gpt2.save_checkpoint(run)
    assert checkpoint.newest_valid(log_dir) == log_dir / "step_00003"


def test_if_the_newest_checkpoint_is_damaged_the_one_before_is_used(small, capsys):
    """Each of its files cut at each tenth, emptied, gone, and with one bit flipped."""
    config = small(n_head=1, n_embd=4, max_steps=2, checkpoint_every=1)
    train_gpt2.train(config)
    log_dir = Path(config.log_dir)
    older, newest = checkpoint.list_checkpoints(log_dir).values()
    generator, cases = random.Random(0), 0

    def assert_skipped(path: Path, what: str) -> None:
        capsys.readouterr()
        assert checkpoint.newest_valid(log_dir) == older, what
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1 and str(newest) in printed and path.name in printed, what

    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for tenth in range(10):
            os.truncate(path, len(content) * tenth // 10)
            assert_skipped(path, f"{path.name} cut at {tenth} tenths")
            path.write_bytes(content)
        if path.name != "files.json":  # whose own bytes are in no list
            flipped = bytearray(content)
            flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            path.write_bytes(flipped)
            assert_skipped(path, f"a bit of {path.name} flipped")
        path.unlink()
        assert_skipped(path, f"{path.name} gone")
        path.write_bytes(content)
        cases += 1
    assert cases >= 7 and checkpoint.newest_valid(log_dir) == newest


# -------------------------------------------------------------------------------------------------
# In the background: on a GPU, which is simulated here


def test_calls_are_made_one_after_the_other_and_an_error_is_raised_by_the_next_use():
    writer, go, made = checkpoint.Writer(background=True), threading.Event(), []

    def write(number):
        assert go.wait(timeout=60)
        made.append(number)
        if number == 2:
            raise UserError("no room")

    writer.start(functools.partial(write, 1))
    writer.check()
    assert made == []  # it waits in its thread
    go.set()
    writer.start(functools.partial(write, 2))
    assert made[0] == 1
    with pytest.raises(UserError, match="no room"):
        writer.wait()
    writer.wait()
    assert made == [1, 2]


def test_steps_do_not_wait_for_a_checkpoint_nor_change_what_it_holds(small, gpu, monkeypatch):
    """That of step 3 is written when step 4 has ended, and is the one of a run on a CPU."""
    settings = dict(checkpoint_every=3, keep_checkpoints=9, max_steps=5)
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "asynchronous", False)
        train_gpt2.train(small(**settings))
    log_dir = Path(small().log_dir)
    expected = log_dir.rename(log_dir.with_name("cpu"))

    gpu.event_ms, step_4 = 1, threading.Event()
    write_model, log_step = huggingface.write_model, RunOutput.log_step

    def write_later(model, directory):
        assert step_4.wait(timeout=60)
        write_model(model, directory)

    def log(output, step, *rest):
        if step == 4:
            assert checkpoint.list_checkpoints(log_dir) == {}
            step_4.set()
        log_step(output, step, *rest)

    monkeypatch.setattr(huggingface, "write_model", write_later)
    monkeypatch.setattr(RunOutput, "log_step", log)
    train_gpt2.train(small(**settings))
    assert list(checkpoint.list_checkpoints(log_dir)) == [3, 5]
    for step in ("step_00003", "step_00005"):
        weights, theirs = (load_file(p / step / "model.safetensors") for p in (log_dir, expected))
        assert_same_tensors(weights, theirs)
        states = [torch.load(p / step / "train_state.pt") for p in (log_dir, expected)]
        assert_same_tensors(*states)


def test_there_is_one_copy_of_a_checkpoint_at_a_time(small, gpu, monkeypatch):
    """The next one is made when the last one is written."""
    gpu.event_ms, writing, copies = 1, threading.Event(), []
    write_model, copy_to_host = huggingface.write_model, checkpoint.copy_to_host

    def write_slowly(*arguments):
        writing.set()
        time.sleep(0.2)
        write_model(*arguments)
        writing.clear()

    def copy(*arguments):
        copies.append(writing.is_set())
        return copy_to_host(*arguments)

    monkeypatch.setattr(huggingface, "write_model", write_slowly)
    monkeypatch.setattr(checkpoint, "copy_to_host", copy)
    train_gpt2.train(small(checkpoint_every=1))
    assert copies == [False] * 4


def test_a_run_that_ends_with_an_error_first_completes_its_checkpoint(small, gpu, monkeypatch):
    gpu.event_ms, write_model = 1, huggingface.write_model

    def write_slowly(model, directory):
        time.sleep(0.5)
        write_model(model, directory)

    monkeypatch.setattr(huggingface, "write_model", write_slowly)
    monkeypatch.setattr(train_gpt2, "validate", Mock(side_effect=[None, UserError("no loss")]))
    config = small(checkpoint_every=2, val_every=2)
    with pytest.raises(UserError, match="no loss"):
        train_gpt2.train(config)
    assert checkpoint.newest_valid(Path(config.log_dir)).name == "step_00002"


def test_a_second_SIGINT_does_not_wait_for_a_checkpoint(small):
    """The first one does; what the second one leaves is what a kill leaves."""
    config = small(checkpoint_every=20, max_steps=100_000)
    process = start(config, harm="simulate_gpu + delay_checkpoints 120")
    wait_for_step(config, 22, process)
    assert_second_interrupt_ends(process)
    assert checkpoint.list_checkpoints(Path(config.log_dir)) == {}


# -------------------------------------------------------------------------------------------------
# Full disks: writes that fail for real


RUN_FILES = {".lock", "log.txt", "progress.txt", "run.json"}  # of a run, besides its checkpoints


@contextlib.contextmanager
def limited_files():
    """No file that this process writes may grow beyond 5 MB."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def assert_disk_full(config, capsys) -> None:
    """The run cannot write step 4, and says so in one line."""
    code, _, err = outcome(config, capsys)
    assert code == 2, err
    words = (f"log_dir={config.log_dir!r}", "make room", "step 4", "step_00002")
    assert_one_line(err, words)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_without_room_for_a_checkpoint_the_earlier_ones_stay_and_a_rerun_completes(
    copy, stopped, capsys, device, request
):
    """The weights (3.2 MB) fit, the training state (6.5 MB) does not."""
    if device == "gpu":
        request.getfixturevalue("gpu").event_ms = 1
    log_dir = Path(copy.log_dir)
    shutil.rmtree(log_dir / "step_00004")
    with limited_files():
        assert_disk_full(copy, capsys)
    assert checkpoint.newest_valid(log_dir) == log_dir / "step_00002"
    assert {path.name for path in log_dir.iterdir()} == RUN_FILES | {"step_00002"}
    code, out, _ = outcome(copy, capsys)
    assert code == 0 and "continuing from" in out
    assert losses(copy) == pytest.approx(losses(stopped), abs=1e-5)
    assert checkpoint.find_problem(log_dir / "step_00004") is None


@pytest.fixture
def small_disk(tmp_path):
    """(directory, context manager that limits its size, function that makes room).

    A file system of 17 MB, which holds one checkpoint of 13 MB and no second; if this process may
    not mount one, a directory and `limited_files`.
    """
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=17m", "tmpfs", str(directory)]
    root = os.geteuid() == 0 and shutil.which("mount") is not None
    if root and subprocess.run(mount, capture_output=True).returncode == 0:
        remount = ["mount", "-o", "remount,size=200m", str(directory)]
        yield (
            directory,
            contextlib.nullcontext,
            functools.partial(subprocess.run, remount, check=True),
        )
        subprocess.run(["umount", "-l", str(directory)], check=True)
    else:
        yield directory, limited_files, lambda: None


@pytest.mark.gpt2  # the disk has room for one checkpoint with a tied head
def test_on_a_full_disk_the_earlier_checkpoint_stays_and_a_rerun_completes(
    small_disk, small, capsys
):
    disk, limit, make_room = small_disk
    config = small(log_dir=str(disk / "log"), max_steps=2, device="cpu")
    assert outcome(config, capsys)[0] == 0
    config = dataclasses.replace(config, max_steps=4)
    before = tree(disk / "log" / "step_00002")

    with limit():
        assert_disk_full(config, capsys)
    assert tree(disk / "log" / "step_00002") == before
    assert {path.name for path in (disk / "log").iterdir()} == RUN_FILES | {"step_00002"}

    make_room()
    code, out, _ = outcome(config, capsys)
    assert code == 0 and "continuing from" in out
    assert checkpoint.find_problem(disk / "log" / "step_00004") is None
    assert list(losses(config)) == [0, 1, 2, 3]
