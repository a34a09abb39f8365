"""Several ranks of fineweb.py: torchrun, srun, one after the other or at the same time."""

import io
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fineweb_helpers import (
    DOCUMENTS,
    ENVIRONMENT,
    SHARD,
    SMALL_PIECES,
    TEXT,
    assert_one_line,
    build_command,
    check_ranks,
    corpus_of,
    finish_command,
    kill_main,
    manifest_of,
    run_command,
    shards_in,
    shards_of,
    some_documents,
    start_ranks,
    texts_of,
    tokens_of,
    tree,
    wait_until,
    write_json_lines,
    write_jsonl,
    write_texts,
)

import fineweb
from support.launch import SLURM, TORCHRUN, Launch, read_launch

pytest_plugins = ["fineweb_helpers"]

# -------------------------------------------------------------------------------------------------
# Runs in processes of their own


def test_two_ranks_one_after_the_other(mixed, two_ranks):
    check_ranks(two_ranks, mixed, 2, SHARD, SHARD)


def test_three_ranks_at_the_same_time(mixed, tmp_path):
    settings = dict(shard_size=SHARD, workers=2, changes=SMALL_PIECES, method="fork")
    for process in start_ranks(3, mixed.path, tmp_path / "out", **settings):
        finish_command(process)
    check_ranks(tmp_path / "out", mixed, 3, SHARD, SHARD)


def test_srun(mixed, two_ranks, tmp_path):
    """Its variables do what RANK and WORLD_SIZE do."""
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    settings = dict(shard_size=SHARD, names=names, method="fork")
    for process in start_ranks(2, mixed.path, tmp_path / "out", **settings):
        finish_command(process)
    assert shards_in(tmp_path / "out") == shards_in(two_ranks)
    assert manifest_of(tmp_path / "out") == manifest_of(two_ranks)


def test_torchrun(mixed, two_ranks, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    python, *rest = build_command(mixed.path, tmp_path / "out", shard_size=SHARD)
    done = subprocess.run(
        [python, *launcher, *rest], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert shards_in(tmp_path / "out") == shards_in(two_ranks)
    assert manifest_of(tmp_path / "out") == manifest_of(two_ranks)


@pytest.mark.parametrize("world, shard_size", [(5, 50), (3, 10**6)])
def test_more_ranks_than_files(tmp_path, world, shard_size):
    """Ranks without a file write nothing, and both splits exist."""
    documents = {f"{i}.jsonl": some_documents(i, 4) for i in range(2)}
    (tmp_path / "in").mkdir()
    for name, held in documents.items():
        write_jsonl(tmp_path / "in" / name, held)
    corpus, out = corpus_of(tmp_path / "in", documents), tmp_path / "out"
    for process in start_ranks(world, corpus.path, out, method="fork", shard_size=shard_size):
        finish_command(process)
    first_rank = tokens_of(texts_of(documents["0.jsonl"]))
    val = np.load(io.BytesIO(shards_of(first_rank, shard_size)["edufineweb_val_000000.npy"]))
    check_ranks(out, corpus, world, shard_size, len(val))


def test_a_kill_of_one_rank_among_two(mixed, two_ranks, tmp_path):
    out, settings = tmp_path / "out", dict(method="fork", changes=SMALL_PIECES, shard_size=SHARD)
    killed, other = start_ranks(2, mixed.path, out, **settings)
    wait_until(lambda: list(out.glob("*_val_*.npy")) or killed.poll(), "no shards")
    kill_main(killed)
    finish_command(other)
    assert not (out / "manifest.json").exists()
    run_command(mixed.path, out, env={"RANK": "0", "WORLD_SIZE": "2"}, **settings)
    assert shards_in(out) == shards_in(two_ranks)
    check_ranks(out, mixed, 2, SHARD, SHARD)


def test_another_rank_creates_the_directory_at_any_time(text_file, tmp_path, monkeypatch, run_here):
    """As if it did so just after this rank has seen that there is none."""
    out, env = tmp_path / "out", {"RANK": "0", "WORLD_SIZE": "2"}
    for name in ("exists", "isdir"):
        real = getattr(os.path, name)

        def look_and_create(path, real=real):
            found = real(path)
            if str(path) == str(out):
                out.mkdir(exist_ok=True)
            return found

        monkeypatch.setattr(os.path, name, look_and_create)
    run_here(text_file, out, env=env)
    assert (out / "manifest_00000.json").exists()


@pytest.mark.parametrize("rank, world", [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_ranks_that_are_not_valid_are_refused(text_file, tmp_path, rank, world, run_here):
    env = {"RANK": rank, "WORLD_SIZE": world}
    failed = run_here(text_file, tmp_path / "out", code=2, env=env)
    assert f"RANK={rank}" in failed.stderr and not (tmp_path / "out").exists()


def test_an_error_of_a_later_rank_is_printed(two_ranks, mixed, tmp_path, run_here):
    """Every rank reports its own errors: its settings, files and directory may differ."""
    env = {"RANK": "1", "WORLD_SIZE": "2"}
    failed = run_here(mixed.path, two_ranks, code=2, env=env, shard_size=SHARD + 1)
    assert f"shard_size={SHARD + 1}" in failed.stderr
    failed = run_here(tmp_path / "not_mounted" / "a.txt", tmp_path / "out", code=2, env=env)
    assert "no such file" in failed.stderr


def test_ranks_that_see_other_files_do_not_mix(mixed, tmp_path, run_here):
    """A rank that reads another directory is detected before the manifest is written."""
    shutil.copytree(mixed.path / "sub", tmp_path / "in")
    out, settings = tmp_path / "out", dict(shard_size=50)
    run_here(tmp_path / "in", out, env={"RANK": "0", "WORLD_SIZE": "2"}, **settings)
    (tmp_path / "in" / "h.txt").write_text("more")
    failed = run_here(
        tmp_path / "in", out, code=2, env={"RANK": "1", "WORLD_SIZE": "2"}, **settings
    )
    assert "different sources" in failed.stderr and not (out / "manifest.json").exists()


# -------------------------------------------------------------------------------------------------
# Runs in this process

WRONG_LAUNCHES = {
    "a rank that is no number": dict(RANK="x", WORLD_SIZE="2"),
    "a rank too many": dict(RANK="2", WORLD_SIZE="2"),
    "a rank below 0": dict(RANK="-1", WORLD_SIZE="2"),
    "a number of ranks in words": dict(RANK="1", WORLD_SIZE="two"),
    "no ranks": dict(RANK="0", WORLD_SIZE="0"),
    "none on this machine": dict(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="0"),
    "some on this machine": dict(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="some"),
    "a task too many": dict(SLURM_PROCID="5", SLURM_STEP_NUM_TASKS="5"),
}


@pytest.mark.parametrize("case", WRONG_LAUNCHES)
def test_contradicting_launcher_variables_are_named(case, refused, monkeypatch):
    Path("my.txt").write_text(TEXT[:9000])
    for name, value in WRONG_LAUNCHES[case].items():
        monkeypatch.setenv(name, value)
    refused(*WRONG_LAUNCHES[case], "unset", source="my.txt", workers=0)


@pytest.mark.parametrize("variables", [dict(RANK="x", WORLD_SIZE="2"), dict(RANK="3")])
def test_a_wrong_setting_is_printed_with_a_rank_that_is_not_valid(variables, refused, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused("shard_size=0", source="my.txt", shard_size=0)


@pytest.mark.parametrize("out", ["begun", "finished"])
def test_another_number_of_processes_is_refused(out, here, refused, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(
        f"out={out!r}", "WORLD_SIZE=2", "WORLD_SIZE=1", "another --out", source="source", out=out
    )


def test_one_process_does_not_continue_the_work_of_two(here, refused, run, monkeypatch):
    write_texts("source/2.jsonl", DOCUMENTS[60:])
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert run(source="source")[0] == 0
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    refused("out='out'", "WORLD_SIZE=1", "WORLD_SIZE=2", "another --out", source="source")


def test_a_refused_rank_does_not_touch_the_files_of_others(here, run, monkeypatch):
    """A rank that is refused removes neither another's lock nor its shards."""
    write_texts("source/2.jsonl", DOCUMENTS[60:])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(source="source")[0] == 0
    before = tree(Path("out"))
    monkeypatch.setenv("RANK", "1")
    write_json_lines(Path("source/2.jsonl"), lines=["?"])
    code, _, err = run(source="source")
    assert code == 2
    assert_one_line(err, ("2.jsonl", "fix it"))
    assert before.items() <= tree(Path("out")).items()


@pytest.mark.parametrize(
    "cores, variables, workers",
    [
        (64, {}, 64),
        (64, {"RANK": "0", "LOCAL_WORLD_SIZE": "8"}, 8),
        (8, {"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "8"}, 8),  # bound to its own
        (64, {"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "8"}, 8),  # not bound
        (64, {"SLURM_NTASKS_PER_NODE": "8"}, 8),
        # torchrun in a task of Slurm
        (64, {"RANK": "0", "LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_PER_TASK": "64"}, 8),
        (2, {"SLURM_NTASKS_PER_NODE": "8"}, 1),
    ],
)
def test_each_process_has_its_part_of_the_cores(monkeypatch, cores, variables, workers):
    defaults = {"RANK": ("WORLD_SIZE", "8"), "SLURM_NTASKS_PER_NODE": ("SLURM_PROCID", "0")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
        if name in defaults:
            monkeypatch.setenv(*defaults[name])
    if "RANK" not in variables:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    launch = read_launch(TORCHRUN, SLURM) if variables else Launch()
    assert fineweb.count_workers(fineweb.Config(), launch) == workers
    assert fineweb.count_workers(fineweb.Config(workers=3), launch) == 3
