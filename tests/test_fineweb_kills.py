"""fineweb.py after kills at random and at chosen instants, signals, and damage to its shards.

Continued by the same command, it ends with the shards of the oracle.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from filelock import FileLock
from fineweb_helpers import (
    DRIVER,
    FORTY,
    RUN,
    SHARD,
    SMALL_PIECES,
    finish_command,
    kill_main,
    manifest_of,
    members,
    no_leftovers,
    run_command,
    shards_in,
    shards_of,
    start_command,
    times_in,
    tokens_of,
    wait_for_records,
    wait_until,
    wait_until_alone,
)

from support.errors import SettingError
from support.shards import open_splits

pytest_plugins = ["fineweb_helpers"]

# -------------------------------------------------------------------------------------------------
# Kills


def check_unfinished(out: Path, expected: dict[str, bytes]) -> None:
    """Files with a shard's name are complete, and the record lists no others."""
    assert all(expected[name] == data for name, data in shards_in(out).items())
    if (record := out / "manifest.partial.json").exists():
        listed = json.loads(record.read_text(encoding="utf-8"))["shards"]
        assert {shard["file"] for shard in listed} <= {*shards_in(out)}


@pytest.mark.faults
def test_kills_at_random_instants(mixed, tmp_path):
    """SIGKILL to the main process alone; its workers exit by themselves."""
    choose, kills, out = random.Random(0), 0, tmp_path / "out"
    expected, methods = mixed.shards(SHARD), ("fork", "spawn", "fork", "forkserver")
    settings = dict(shard_size=SHARD, changes=SMALL_PIECES)
    begin = time.monotonic()
    run_command(mixed.path, out, method="fork", **settings)
    run_s = time.monotonic() - begin
    shutil.rmtree(out)
    while kills < 25:
        method, workers = methods[kills % 4], choose.choice((1, 2))
        process = start_command(mixed.path, out, method=method, workers=workers, **settings)
        try:
            process.wait(timeout=choose.uniform(0.2, 0.9) * run_s)
            finish_command(process)
            assert shards_in(out) == expected
            shutil.rmtree(out)  # and once more
        except subprocess.TimeoutExpired:
            kill_main(process)
            kills += 1
            check_unfinished(out, expected)
    run_command(mixed.path, out, method="fork", **settings)
    assert shards_in(out) == expected and no_leftovers(out)
    totals = manifest_of(out)["totals"]
    assert {n: totals[n] for n in ("documents", "nulls")} == {
        n: mixed.totals[n] for n in ("documents", "nulls")
    }


# Each run of the chain dies just before the third time that it would give a file its name.
CHAIN = """
import os, signal
kills = 0
while True:
    if not (child := os.fork()):
        replace, calls = os.replace, []
        def deadly(*arguments):
            calls.append(1)
            if len(calls) == 3:
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
    """Also between the renaming and the record of a shard, and in a small text."""
    settings = dict(shard_size=shard_size, method="fork", changes={"support.text_files.PIECE": 60})
    done = run_command(forty, tmp_path / "out", driver=DRIVER + CHAIN, **settings)
    assert int(re.search(r"(\d+) kills", done.stdout)[1]) >= 4
    assert "missing or altered" not in done.stderr  # the work of no run is lost
    assert shards_in(tmp_path / "out") == shards_of(FORTY, shard_size)
    assert no_leftovers(tmp_path / "out")
    for number, path in enumerate(sorted((tmp_path / "out").glob("*.npy"))[::2]):
        apply_damage(path, number % 3)
    run_command(forty, tmp_path / "out", driver=DRIVER + CHAIN, **settings)
    assert shards_in(tmp_path / "out") == shards_of(FORTY, shard_size)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_stops_the_run_and_the_same_command_continues(mixed, tmp_path, number, code):
    """SIGINT to all processes, as ^C in a terminal sends it; SIGTERM to the main one."""
    out, settings = tmp_path / "out", dict(workers=2, shard_size=SHARD, changes=SMALL_PIECES)
    process = start_command(mixed.path, out, **settings)
    wait_for_records(process, out)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    stopped = finish_command(process, code)
    assert number == signal.SIGTERM or stopped.stderr.splitlines()[-1] == "interrupted"
    wait_until_alone(process.pid)
    with pytest.raises(SettingError, match="unfinished"):
        open_splits(str(out))
    done = run_command(mixed.path, out, **settings)
    assert "continuing after" in done.stderr
    assert shards_in(out) == mixed.shards(SHARD)


def ignores_interrupts(pid: int) -> bool:
    ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(ignored, 16) & 1 << signal.SIGINT - 1)


def test_control_c_while_the_workers_start(mixed, tmp_path):
    """The interrupt is handled while workers import modules, and they print nothing."""
    process = start_command(mixed.path, tmp_path / "out", workers=3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: len(children.read_text().split()) > 2, "no workers")
    wait_until(lambda: not ignores_interrupts(process.pid), "interrupts are ignored")
    os.killpg(process.pid, signal.SIGINT)
    assert finish_command(process, 130).stderr.splitlines()[-1] == "interrupted"


def test_workers_that_cannot_start_end_the_run(text_file, tmp_path):
    (tmp_path / "gigatoken.py").write_text(
        "import multiprocessing, os\nif multiprocessing.parent_process():\n    os._exit(1)\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    failed = run_command(text_file, tmp_path / "out", code=2, env=env, workers=5)
    assert "a process that tokenizes died" in failed.stderr


@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=pytest.mark.faults)])
def test_a_worker_that_dies_ends_the_run(mixed, tmp_path, method):
    """In one line, without a hang; the same command continues."""
    out, settings = tmp_path / "out", dict(workers=2, shard_size=SHARD, changes=SMALL_PIECES)
    process = start_command(mixed.path, out, method=method, **settings)
    wait_for_records(process, out)
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in members(process.pid)}
    workers = [pid for pid in lines if pid != process.pid and "resource_tracker" not in lines[pid]]
    os.kill(workers[0], signal.SIGKILL)
    failed = finish_command(process, 2)
    assert "a process that tokenizes died" in failed.stderr
    wait_until_alone(process.pid)
    run_command(mixed.path, out, method="fork", **settings)
    assert shards_in(out) == mixed.shards(SHARD) and no_leftovers(out)


# -------------------------------------------------------------------------------------------------
# Damaged shards


def apply_damage(path: Path, how: int) -> None:
    data = bytearray(path.read_bytes())
    if how == 0:
        path.unlink()
    elif how == 1:
        path.write_bytes(data[:-2])
    else:
        data[-1] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", range(3))
def test_shards_are_rebuilt_from_the_first_damaged_one_on(mixed, tmp_path, how, run_here):
    """Deleted, cut off or with a flipped bit; the shards before it are left alone."""
    out, expected = tmp_path / "out", mixed.shards(SHARD)
    settings = dict(shard_size=SHARD, changes=SMALL_PIECES)
    run_here(mixed.path, out, **settings)
    manifest, before = manifest_of(out), times_in(out)
    names = sorted(expected, key=lambda name: name.split("_")[-1])
    first = (0, 9, len(names) - 1)[how]
    for name in {names[first], names[-1]}:
        apply_damage(out / name, how)
    done = run_here(mixed.path, out, **settings)
    assert [name for name in names if name in done.stderr] == [names[first]]
    assert shards_in(out) == expected and manifest_of(out) == manifest and no_leftovers(out)
    after = times_in(out)
    assert [name for name in names if after[name] != before[name]] == names[first:]


@pytest.mark.parametrize(
    "shard_size", [1, *(pytest.param(n, marks=pytest.mark.faults) for n in (2, 3))]
)
def test_shards_between_empty_documents_are_rebuilt(tmp_path, shard_size, run_here):
    """Empty files are positions, too: each is used once, from whatever position a run continues."""
    (tmp_path / "in").mkdir()
    texts = ["", "", "hello world", "", "again here", ""]
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    arguments, expected = (tmp_path / "in", tmp_path / "out"), shards_of(tokens_of(texts), 1)
    expected = shards_of(tokens_of(texts), shard_size)
    for odd in (0, 1):
        run_here(*arguments, shard_size=shard_size)
        assert shards_in(tmp_path / "out") == expected
        for name in sorted(expected, key=lambda name: name.split("_")[-1])[odd::2]:
            (tmp_path / "out" / name).unlink()
    run_here(*arguments, shard_size=shard_size)
    assert shards_in(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "damaged", [1, *(pytest.param(n, marks=pytest.mark.faults) for n in (0, 2))]
)
def test_a_damaged_shard_of_a_small_text_is_rebuilt(forty, tmp_path, damaged, run_here):
    run_here(forty, tmp_path / "out", shard_size=21)
    expected = shards_of(FORTY, 21)
    assert len(expected) == 3
    apply_damage(tmp_path / "out" / sorted(expected)[damaged], damaged)
    run_here(forty, tmp_path / "out", shard_size=21)
    assert shards_in(tmp_path / "out") == expected and no_leftovers(tmp_path / "out")


# -------------------------------------------------------------------------------------------------
# A second process

HASTY = DRIVER.replace("min(timeout, 10)", "0.2") + RUN


def test_a_second_process_is_refused(mixed, tmp_path):
    """It changes nothing."""
    out, settings = tmp_path / "out", dict(shard_size=SHARD, changes=SMALL_PIECES)
    first = start_command(mixed.path, out, method="fork", **settings)
    wait_for_records(first, out)
    os.kill(first.pid, signal.SIGSTOP)
    before = times_in(out)
    failed = run_command(mixed.path, out, code=2, driver=HASTY, **settings)
    assert "another process is writing there" in failed.stderr
    assert times_in(out) == before
    os.kill(first.pid, signal.SIGCONT)
    finish_command(first)
    assert shards_in(out) == mixed.shards(SHARD)


def test_a_refused_process_does_not_remove_the_lock(text_file, tmp_path):
    """The first process has written nothing yet."""
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock_00000"):
        run_command(text_file, out, code=2, driver=HASTY)
        assert [path.name for path in out.iterdir()] == [".lock_00000"]
