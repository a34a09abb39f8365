"""Faults that are real: kills, signals, stopped processes, damaged files and numbers.

The default run does what takes one process and little time; `pytest -m faults` does the rest: 50
runs killed at any instant and started again, 10 more under torchrun, and all that takes a process
group.
"""

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    ROOT,
    SMALL,
    assert_same_end,
    command_line,
    environment,
    losses,
    run_trainer,
    start,
    wait_for_step,
)

import train_gpt2
from support import checkpoint, shards
from support.errors import UserError
from support.huggingface import find_non_finite

faults = pytest.mark.faults


# The model of the recipe `tiny`; the second epoch of the text begins in step 11.
TINY = SMALL | dict(
    n_layer=4, n_head=4, n_embd=128, T=128, B=1, total_batch_size=384, max_steps=16, val_every=5,
    val_tokens=256, sample_every=8, sample_tokens=4, num_samples=2, checkpoint_every=4,
)  # fmt: skip


def question(label: int, **fields) -> str:
    """A line of HellaSwag."""
    endings = [" down.", " up on it.", " a.", " b c d."]
    return json.dumps(dict(activity_label="Cats", label=label, endings=endings) | fields) + "\n"


def make_text(directory: Path) -> str:
    """A .txt of about 5,000 tokens."""
    path = directory / "text.txt"
    path.write_text((ROOT / "input.txt").read_text(encoding="utf-8")[:16000], encoding="utf-8")
    return str(path)


def uninterrupted(directory: Path, processes: int, **settings):
    """(settings, a run with them that was never stopped, its seconds)."""
    settings = TINY | dict(data=make_text(directory)) | settings
    config = train_gpt2.Config(**settings, log_dir=str(directory / "log"))
    began = time.monotonic()
    done = run_trainer(config, processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return settings, config, time.monotonic() - began


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("complete"), processes=1)


@pytest.fixture(scope="module")
def complete_of_two(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("of_two"), processes=2)


def end(process: subprocess.Popen, timeout_s: float = 120) -> str:
    """The output of a process and all that it started, once they have ended."""
    return process.communicate(timeout=timeout_s)[0]


def ranks_of(torchrun: subprocess.Popen) -> dict[int, int]:
    """{rank: process id} of the processes that torchrun has started by now."""
    found = {}
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for child in children:
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().decode()
        except OSError:  # ended meanwhile
            continue
        if match := re.search(r"\0RANK=(\d)", variables):
            found[int(match[1])] = int(child)
    return found


def command_of(pid: int) -> bytes:
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# -------------------------------------------------------------------------------------------------
# Kills


EVENTS = 95  # times that a run of TINY opens, renames or removes a file


@faults
@pytest.mark.parametrize("seed", range(70))
def test_killed_anywhere_a_run_ends_in_the_same_bits(complete, tmp_path, seed):
    """Half of the runs are killed before they change a file, the others at a random instant; every
    fifth is killed again soon after its new start. The last 20 write in the background."""
    settings, uninterrupted, seconds = complete
    config = train_gpt2.Config(**settings, log_dir=str(tmp_path / "log"))
    generator = random.Random(seed)
    kills = [f"kill_at_event {generator.randint(1, EVENTS)}" if seed % 2 == 0 else seconds]
    if seed % 5 == 0:
        kills.append("kill_at_event 1" if seed % 2 else generator.uniform(2, 3))
    for kill in kills:
        if isinstance(kill, str):
            process = start(config, harm=f"{kill} + simulate_gpu" if seed >= 50 else kill)
        else:
            process = start(config, harm="simulate_gpu" if seed >= 50 else "")
            time.sleep(generator.uniform(0, kill))
            process.kill()
        output = end(process)
        assert process.returncode in (-signal.SIGKILL, 0), output
        if checkpoint.list_checkpoints(Path(config.log_dir)):
            assert checkpoint.newest_valid(Path(config.log_dir)) is not None
    process = start(config)
    output = end(process)
    assert process.returncode == 0, output
    assert_same_end(uninterrupted, config)
    assert {path.name for path in Path(config.log_dir).iterdir()} == {
        path.name for path in Path(uninterrupted.log_dir).iterdir()
    }


@faults
@pytest.mark.parametrize("seed", range(10))
def test_with_max_restarts_torchrun_recovers_a_killed_rank(complete_of_two, tmp_path, seed):
    settings, uninterrupted, seconds = complete_of_two
    config = train_gpt2.Config(**settings, log_dir=str(tmp_path / "log"))
    generator = random.Random(seed)
    torchrun = start(config, processes=2, launcher=["--max-restarts=3"])
    time.sleep(generator.uniform(4, seconds))
    if rank := ranks_of(torchrun).get(seed % 2):
        os.kill(rank, signal.SIGKILL)
    output = end(torchrun)
    assert torchrun.returncode == 0, output
    assert_same_end(uninterrupted, config)


# -------------------------------------------------------------------------------------------------
# Another number of processes


def windows_of(file: Path) -> dict[int, list[str]]:
    """{step: its windows, in the order of the ranks} as `record_windows` wrote them."""
    steps = {}
    for line in sorted(file.read_text().splitlines(), key=lambda line: int(line.split()[1])):
        step, _, *windows = line.split()
        steps.setdefault(int(step), []).extend(windows)
    return steps


@faults
def test_one_two_three_and_one_process_train_on_the_same_windows(tmp_path):
    settings = TINY | dict(data=make_text(tmp_path), total_batch_size=7 * 128, max_steps=16)
    single = train_gpt2.Config(**settings, log_dir=str(tmp_path / "single"))
    output = end(process := start(single, harm=f"record_windows {tmp_path / 'single.txt'}"))
    assert process.returncode == 0, output

    config = train_gpt2.Config(**settings, log_dir=str(tmp_path / "elastic"))
    for processes, B, last in ((1, 4, 3), (2, 1, 7), (3, 2, 11), (1, 7, None)):
        harm = f"record_windows {tmp_path / 'elastic.txt'}"
        if last is not None:  # a signal takes effect one step later
            harm += f" + signal_at_step SIGTERM {processes - 1} {last - 1}"
        process = start(dataclasses.replace(config, B=B), processes, harm)
        output = end(process)
        assert f"{processes} x cpu in float32 | B={B}" in output
        if last is not None:
            assert process.returncode == (143 if processes == 1 else 1), output
            assert f"stopped by SIGTERM after step {last}, saved" in output
    assert process.returncode == 0, output
    recorded = windows_of(tmp_path / "elastic.txt")
    assert recorded == windows_of(tmp_path / "single.txt") and list(sorted(recorded)) == list(
        range(16)
    )
    assert losses(config) == pytest.approx(losses(single), abs=1e-5)
    assert losses(config, "val") == pytest.approx(losses(single, "val"), abs=1e-5)


@faults
def test_three_ranks_share_one_window_and_two_questions(tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text(question(0, ctx="The cat sat") + question(1, ctx="A dog lay"))
    settings = TINY | dict(
        data=make_text(tmp_path), max_steps=4, val_every=2, val_tokens=128, hellaswag_every=2,
        hellaswag_data=str(data), num_samples=1, sample_every=2,
    )  # fmt: skip
    one, three = (
        train_gpt2.Config(**settings, log_dir=str(tmp_path / name)) for name in ("one", "three")
    )
    assert run_trainer(one).returncode == 0
    done = run_trainer(three, processes=3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(three, "hella") == losses(one, "hella") and len(losses(one, "hella")) == 3
    for stream in ("train", "val"):
        assert losses(three, stream) == pytest.approx(losses(one, stream), abs=1e-5)


# -------------------------------------------------------------------------------------------------
# Signals


@faults
@pytest.mark.parametrize("whom", ["the launcher", "rank 0", "rank 1"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_after_a_signal_all_ranks_save_the_same_step_and_end(complete_of_two, tmp_path, name, whom):
    settings, uninterrupted, _ = complete_of_two
    config = train_gpt2.Config(**settings, log_dir=str(tmp_path / "log"))
    torchrun = start(config, processes=2)
    wait_for_step(config, 5, torchrun)
    ranks = ranks_of(torchrun)
    target = torchrun.pid if whom == "the launcher" else ranks[int(whom[-1])]
    began = time.monotonic()
    os.kill(target, getattr(signal, name))
    output = end(torchrun)  # the pipe is closed when the last of them is gone
    assert time.monotonic() - began < 30
    assert not any(map(command_of, ranks.values()))

    # torchrun does not handle SIGUSR1, which ends it; its ranks then get a SIGTERM
    orphaned = whom == "the launcher" and name == "SIGUSR1"
    received = "SIGTERM" if orphaned else name
    stopped = int(re.search(rf"stopped by {received} after step (\d+), saved", output)[1])
    newest = checkpoint.newest_valid(Path(config.log_dir))
    assert newest.name == f"step_{stopped + 1:05d}" and max(losses(config)) == stopped
    if whom != "the launcher":
        assert torchrun.returncode == 1
        assert f"exitcode  : {128 + getattr(signal, name)}" in output
    else:
        assert torchrun.returncode == (-signal.SIGUSR1 if orphaned else 1)

    output = end(torchrun := start(config, processes=2))
    assert torchrun.returncode == 0, output
    assert_same_end(uninterrupted, config)


@faults
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_stops_in_a_first_step_of_minutes(small, processes):
    config = small(B=1, total_batch_size=32 * 100_000, timeout_s=60)
    process = start(config, processes)
    deadline = time.monotonic() + 60
    while not (Path(config.log_dir) / "log.txt").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(2)
    began = time.monotonic()
    process.terminate()
    output = end(process)
    assert 9 < time.monotonic() - began < 25
    assert "stopped by SIGTERM before the first step; the same command" in output
    assert process.returncode == (143 if processes == 1 else 1)
    assert not checkpoint.list_checkpoints(Path(config.log_dir))


@faults
def test_two_ranks_stop_in_an_evaluation_together(tmp_path):
    settings = TINY | dict(data="input.txt", val_every=3, val_tokens=128 * 50)  # 25 batches each
    config = train_gpt2.Config(**settings, log_dir=str(tmp_path / "log"))
    output = end(torchrun := start(config, 2, "signal_in_evaluation SIGTERM 1 3"))
    assert torchrun.returncode == 1 and "stopped by SIGTERM after step 2, saved" in output
    assert 3 not in losses(config, "val")
    output = end(torchrun := start(config, 2))
    assert torchrun.returncode == 0 and "continuing from" in output
    assert sorted(losses(config, "val")) == [0, 3, 6, 9, 12, 15, 16]


# Stand-ins for Slurm's commands: two processes on this machine, and a note of what was requeued.
SLURM = {
    "srun": """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
for pid in ${pids[@]}; do wait $pid; code=$?; [ $code -gt ${most:-0} ] && most=$code; done
exit ${most:-0}
""",
    "scontrol": """#!/bin/bash
case $1 in show) echo 127.0.0.1; echo elsewhere;; *) echo "$@" >> "$REQUEUED";; esac
""",
}


@faults
def test_the_batch_file_of_the_documentation_requeues_a_run_that_was_stopped(
    complete_of_two, tmp_path
):
    settings, uninterrupted, _ = complete_of_two
    config = train_gpt2.Config(**settings, log_dir=str(tmp_path / "log"))
    page = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    block = re.search(r"^```bash\n(#!/bin/bash\n.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "job.sh").write_text(block)
    for name, script in SLURM.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = dict(
        SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_ID=str(random.randrange(10**6)), SLURM_NTASKS="2",
        PATH=path, REQUEUED=str(tmp_path / "requeued"),
    )  # fmt: skip
    job = functools.partial(
        subprocess.Popen, ["bash", str(tmp_path / "job.sh"), *command_line(config)], cwd=ROOT,
        env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    process = job()
    wait_for_step(config, 5, process)
    found = subprocess.run(["pgrep", "-f", f"log_dir={config.log_dir}"], capture_output=True)
    python = [pid for pid in map(int, found.stdout.split()) if b"bash" not in command_of(pid)]
    assert len(python) == 2
    for pid in python:
        os.kill(pid, signal.SIGUSR1)
    output = end(process)
    assert process.returncode == 128 + signal.SIGUSR1, output
    assert "stopped by SIGUSR1" in output
    requeued = (tmp_path / "requeued").read_text()
    assert requeued == f"requeue incomplete {variables['SLURM_JOB_ID']}\n"
    output = end(process := job())
    assert process.returncode == 0, output
    assert (tmp_path / "requeued").read_text() == requeued
    assert_same_end(uninterrupted, config)


# -------------------------------------------------------------------------------------------------
# Data that is lost during a run


def write_shards(directory: Path, suffix: str, tokens: int = 3000) -> Path:
    """A training and a validation shard; the path of the first."""
    directory.mkdir(exist_ok=True)
    for split in ("train", "val"):
        ids = np.random.default_rng(len(split)).integers(0, 50257, tokens).astype(np.uint16)
        path = directory / f"{split}{suffix}"
        if suffix == ".npy":
            np.save(path, ids)
        else:
            header = np.zeros(256, dtype="<i4")
            header[:3] = 20240520, 1, tokens
            path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())
    return directory / f"train{suffix}"


DAMAGES = {
    "gone": (lambda path: path.unlink(), "No such file"),
    "cut": (lambda path: os.truncate(path, 3000), "3,000 bytes"),
    "emptied": (lambda path: os.truncate(path, 0), "0 bytes"),
}


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_lost_during_a_run_is_named_when_it_is_read(small, tmp_path, suffix, damage):
    """Reading a memory map beyond the end of its file would be SIGBUS, without a word."""
    shard = write_shards(tmp_path / "shards", suffix)
    tokens = shards.open_splits(str(tmp_path / "shards"))["train"]
    loader = train_gpt2.DataLoaderLite(tokens, B=4, T=32)
    loader.next_step()
    loader.prepared.result()
    damage_file, words = DAMAGES[damage]
    damage_file(shard)
    loader.next_step()  # prepared before
    with pytest.raises(UserError, match=rf"{re.escape(str(shard))}: {words}.*put it back"):
        loader.next_step()


@faults
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_ends_when_its_data_is_lost_and_continues_when_it_is_back(
    small, tmp_path, processes, damage
):
    shard = write_shards(tmp_path / "shards", ".npy", 50_000)
    settings = dict(data=str(shard.parent), max_steps=40, checkpoint_every=5, total_batch_size=1024)
    complete = small(log_dir=str(tmp_path / "complete"), **settings)
    assert run_trainer(complete, processes).returncode == 0
    config = small(log_dir=str(tmp_path / "log"), **settings)
    shutil.copy(shard, tmp_path / "safe.npy")
    process = start(config, processes)
    wait_for_step(config, 12, process)
    time.sleep(0.1)  # the batch that is being read now: within it no check could be in time
    damage_file, words = DAMAGES[damage]
    damage_file(shard)
    output = end(process)
    assert process.returncode == (2 if processes == 1 else 1), output
    assert re.search(rf"error: {re.escape(str(shard))}: {words}", output)
    assert processes > 1 or "Traceback" not in output  # torchrun has one of its own
    assert checkpoint.newest_valid(Path(config.log_dir)) is not None
    shutil.copy(tmp_path / "safe.npy", shard)
    assert run_trainer(config, processes).returncode == 0
    assert_same_end(complete, config)


# -------------------------------------------------------------------------------------------------
# Numbers and hangs


@faults
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_of_nan_in_one_rank_skips_the_step_in_all(tmp_path, value):
    """Two processes then hold the same weights as one process with the same fault."""
    settings = TINY | dict(data=make_text(tmp_path), max_steps=10)
    one, two = (
        train_gpt2.Config(**settings, log_dir=str(tmp_path / name)) for name in ("one", "two")
    )
    for config, processes, rank in ((one, 1, 0), (two, 2, 1)):
        output = end(process := start(config, processes, f"replace_gradient {value} {rank} 5"))
        assert process.returncode == 0, output
        assert len(re.findall("not finite, update skipped", output)) == 1
        assert re.search("step 5: loss .* not finite", output)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert find_non_finite(train_gpt2.GPT.from_pretrained(str(tmp_path / "two"))) is None


@faults
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_job_in_time_and_is_named(complete_of_two, tmp_path, stopped):
    """torchrun gives the stopped process 30 s of its own before it kills it."""
    settings, uninterrupted, _ = complete_of_two
    settings = settings | dict(log_dir=str(tmp_path / "log"), timeout_s=6)
    config = train_gpt2.Config(**settings)
    torchrun = start(config, 3, f"signal_at_step SIGSTOP {stopped} 5")
    wait_for_step(config, 4, torchrun)
    began = time.monotonic()
    output = end(torchrun)
    # 6 to notice, as long again and a little more to ask who is missing, then the launcher
    assert time.monotonic() - began < 6 + (2 * 6 + 5) + 30 + 10
    assert torchrun.returncode == 1 and "exitcode  : 3" in output
    assert f"rank {1 - stopped}: no answer from rank {stopped} " in output
    assert checkpoint.newest_valid(Path(config.log_dir)).name == "step_00004"


# -------------------------------------------------------------------------------------------------
# Safety


@faults
def test_secrets_are_not_written_and_paths_are_not_executed(small, tmp_path):
    """Tokens of the environment are in no file and no line; no file name is executed."""
    secrets = dict(HF_TOKEN="hf_" + "s3cret" * 5, WANDB_API_KEY="k3y" * 13)
    odd = tmp_path / "a b" / "$(touch ran); `touch ran` 'it\"s' & \u00e9"
    odd.mkdir(parents=True)
    text = odd / "my text.txt"
    shutil.copy(small().data, text)
    (tmp_path / "elsewhere").mkdir()
    config = small(
        data=str(text), log_dir=str(tmp_path / "elsewhere" / ".." / "a b" / odd.name / "log"),
        max_steps=2, val_every=1, sample_every=2, sample_tokens=2,
    )  # fmt: skip
    before = {path for path in tmp_path.rglob("*")}
    process = start(config, **secrets)
    output = end(process)
    assert process.returncode == 0, output
    log_dir = odd / "log"
    made = {path for path in tmp_path.rglob("*")} - before
    assert made and all(path == log_dir or log_dir in path.parents for path in made)
    assert not (ROOT / "ran").exists()
    assert list(losses(config)) == [0, 1]

    # an error with a traceback: a directory is where log.txt should be
    broken = dataclasses.replace(config, max_steps=3, init_from="scratch", device="cpu")
    (log_dir / "log.txt").unlink()
    (log_dir / "log.txt").mkdir()
    process = start(broken, **secrets)
    output += end(process)
    assert process.returncode != 0
    contents = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for secret in secrets.values():
        assert secret not in output and not any(secret.encode() in raw for raw in contents)
