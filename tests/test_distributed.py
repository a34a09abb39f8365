"""Joining the processes of a run: an address that cannot be used, and ranks that never come."""

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    ROOT,
    assert_one_line,
    assert_refused,
    environment,
    start,
    tree,
    without_gloo,
)

import train_gpt2
from support import distributed
from support.distributed import Runtime, initialize
from support.errors import SettingError, UserError, run_main
from support.launch import Launch, read_launch


@pytest.fixture
def join(monkeypatch, capsys):
    """A function: rank, port -> exit code and stderr of a process of two that never meets the
    other one. It runs in this process."""

    def run(rank: int, port: int) -> tuple[int, str]:
        variables = dict(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: initialize("cpu", "float32", read_launch(), timeout_s=1))
        assert not dist.is_initialized()
        return stop.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_a_lost_process(rank, port, join):
    code, error = join(rank, port)
    assert code == 3, error
    words = (f"rank {rank}", "2 processes", f"127.0.0.1:{port}", "timeout_s=1")
    assert_one_line(error, words)


def test_one_gpu_for_several_processes_is_refused():
    """Of one machine: on two machines each may name the GPU of its only process."""
    with pytest.raises(SettingError, match="device='cuda:0': all processes would share it"):
        initialize("cuda:0", "auto", Launch(1, 2, local_rank=1, local_world_size=2))
    with pytest.raises(SettingError, match="no CUDA device"):
        initialize("cuda:0", "auto", Launch(1, 2, local_rank=0, local_world_size=1))


def test_a_port_in_use_is_refused(join):
    with socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        other.bind(("::", 0))
        other.listen()
        port = other.getsockname()[1]
        code, error = join(0, port)
    assert code == 2, error
    assert_one_line(error, (f"MASTER_PORT={port}", "in use"))


# -------------------------------------------------------------------------------------------------
# NCCL, simulated by gloo: a collective on a GPU only starts a kernel, and the wait for the device
# may never end, in the run or in the teardown of the process.

ON_GPUS = """
import atexit, sys, threading
import torch
import torch.distributed as dist
from support import distributed
from support.errors import run_main

fault, rank = sys.argv[1], int(sys.argv[2])
init, ones, never = dist.init_process_group, torch.ones, threading.Event()

def start_kernel(tensor):
    if fault == "the call fails":
        raise dist.DistBackendError("NCCL error: unhandled system error")
    if fault == "the call hangs":
        never.wait()

def synchronize(device):
    if fault in ("the kernel hangs", "a rank hangs"):
        never.wait()

def init_nccl(backend, device_id, **group):
    assert backend == "nccl" and device_id == torch.device("cuda", rank)
    init("gloo", **group)

def join():
    distributed.join_process_group(rank, 2, torch.device("cuda", rank), timeout_s=2)
    print("joined")

dist.init_process_group, dist.all_reduce = init_nccl, start_kernel
torch.cuda.synchronize = synchronize
torch.ones = lambda *shape, device: ones(*shape)
dist.get_backend = lambda: "nccl"
atexit.register(lambda: fault == "none" or never.wait())
if fault == "a rank hangs" and rank == 1:
    distributed.check_all_reduce = lambda *_: never.wait()
run_main(join)
"""


def join_on_gpus(fault: str, port: int) -> list[subprocess.Popen]:
    """Two processes that join, with a fault."""
    variables = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    return [
        subprocess.Popen(
            [sys.executable, "-c", ON_GPUS, fault, str(rank)], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=environment(**variables, RANK=str(rank)),
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("the kernel hangs", "not done within 2 s"),
        pytest.param("the call hangs", "not done within 2 s", marks=pytest.mark.faults),
        pytest.param("the call fails", "unhandled system error", marks=pytest.mark.faults),
        ("none", ""),
    ],
)
def test_gpus_that_do_not_reach_each_other_are_reported(fault, reason, port):
    """By each rank, in one line with the remedy; the process ends though its teardown would not."""
    for rank, process in enumerate(join_on_gpus(fault, port)):
        output, errors = process.communicate(timeout=120)
        if fault == "none":
            assert process.returncode == 0 and without_gloo(output) == "joined\n", errors
            continue
        assert process.returncode == 3, errors
        line = errors[errors.index("error: ") :]
        words = (f"rank {rank}: ", reason, "all ranks answer", "NCCL_P2P_DISABLE=1")
        assert_one_line(line, words)


def test_a_rank_that_hangs_in_front_of_the_first_all_reduce_is_named(port):
    first, second = join_on_gpus("a rank hangs", port)
    errors = first.communicate(timeout=120)[1]
    assert first.returncode == 3, errors
    assert_one_line(errors[errors.index("error: ") :], ("no answer from rank 1",))
    second.kill()
    second.communicate()


def test_an_error_of_nccl_at_the_start_has_its_remedy(monkeypatch):
    """Not that of processes that do not meet."""

    def fail(*_, **__):
        raise dist.DistBackendError("NCCL error in: NCCLUtils.cpp:94, unhandled system error")

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(distributed, "create_store", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", fail)
    words = "rank 1.*NCCLUtils.*NCCL_P2P_DISABLE=1"
    with pytest.raises(distributed.LostProcess, match=words) as lost:
        distributed.join_process_group(1, 2, torch.device("cuda", 0), timeout_s=2)
    assert "met" not in str(lost.value)


# -------------------------------------------------------------------------------------------------
# What all ranks must have in common


@pytest.fixture
def second_rank(monkeypatch):
    """A function: change -> this process, rank 0, sees a rank 1 that gives change(its own)."""

    def set_change(change) -> None:
        monkeypatch.setattr(Runtime, "all_gather", lambda self, value: [value, change(value)])

    return set_change


def with_other(name: str, value):
    """Of what a rank gives: the same but for one named value."""
    return lambda given: given | {name: value} if name in (given or {}) else given


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("max_lr", 0.5, ("max_lr=0.01, but 0.5 on rank 1", "the same settings")),
        ("eval_only", True, ("eval_only=False, but True on rank 1", "the same settings")),
        ("newest checkpoint", None, ("'step_00004', but None on rank 1", "log_dir=")),
        ("finished", True, ("finished=False, but True on rank 1", "log_dir=")),
        ("tokens of train", "0123", ("but '0123' on rank 1", "data=", "the same tokens")),
        ("tokens of val", "0123", ("but '0123' on rank 1", "data=", "the same tokens")),
    ],
)
def test_a_rank_with_another_setting_directory_or_text_is_named(
    copy, capsys, second_rank, name, value, words
):
    second_rank(with_other(name, value))
    config = dataclasses.replace(copy, max_lr=0.01) if name == "max_lr" else copy
    assert_refused(config, capsys, name, *words)


def test_paths_and_devices_may_differ_between_nodes(copy, second_rank):
    second_rank(lambda given: given | {"data": "other"} if "data" in (given or {}) else given)
    assert "data" in vars(copy) and train_gpt2.train(copy) == 0


@pytest.mark.parametrize("failing", range(1, 4))
def test_what_fails_on_one_rank_ends_all(copy, capsys, second_rank, failing):
    """Whatever a check of the set-up is: of log_dir, data, checkpoint and model."""
    checks = []

    def fail(given):
        if given is None:
            checks.append(given)
        return "x.npy: missing; put it back" if given is None and len(checks) > failing else given

    second_rank(fail)
    assert_refused(copy, capsys, "rank 1: x.npy: missing; put it back")


def test_the_first_rank_that_fails_is_reported(monkeypatch):
    runtime = Runtime(1, 2, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(Runtime, "all_gather", lambda self, value: ["a=1: wrong", value])
    with pytest.raises(SettingError, match="^a=1: wrong$"), runtime.failing_together():
        pass
    with pytest.raises(SettingError, match="^a=1: wrong$"), runtime.failing_together():
        raise UserError("b=2: wrong too")


@pytest.mark.parametrize("rank, local_rank, printed", [(0, 0, 1), (3, 3, 0), (8, 0, 1)])
def test_an_error_of_all_ranks_is_printed_once_per_node(
    monkeypatch, capsys, rank, local_rank, printed
):
    for name, value in dict(RANK=rank, WORLD_SIZE=16, LOCAL_RANK=local_rank).items():
        monkeypatch.setenv(name, str(value))

    def fail():
        raise SettingError("data='x': no such directory")

    with pytest.raises(SystemExit):
        run_main(fail)
    assert capsys.readouterr().err.count("no such directory") == printed


def start_ranks(port: int, *configs) -> list[tuple[int, str]]:
    """(exit code, output) of one process for each of the settings, which are ranks of one run."""
    started = [
        start(
            config, RANK=str(rank), WORLD_SIZE=str(len(configs)), LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )
        for rank, config in enumerate(configs)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs)]


@pytest.mark.faults
@pytest.mark.parametrize("case", ["settings", "text", "no text", "no log_dir", "finished"])
def test_two_nodes_that_differ_both_end_with_the_reason(copy, tmp_path, port, case):
    other = tmp_path / "other.txt"
    other.write_text(Path(copy.data).read_text(encoding="utf-8")[::-1], encoding="utf-8")
    copy = dataclasses.replace(copy, max_steps=6)
    if case == "finished":
        assert train_gpt2.train(copy) == 0
    change, reason = {
        "settings": (dict(max_lr=0.5), "max_lr="),
        "text": (dict(data=str(other)), "tokens of train="),
        "no text": (dict(data=str(tmp_path / "none.txt")), "rank 1: data="),
        "no log_dir": (dict(log_dir=str(tmp_path / "log")), "one directory of all nodes"),
        "finished": (dict(log_dir=str(tmp_path / "log")), "one directory of all nodes"),
    }[case]
    before = tree(Path(copy.log_dir))
    for code, output in start_ranks(port, copy, dataclasses.replace(copy, **change)):
        assert code == 2 and reason in output, output
    assert tree(Path(copy.log_dir)) == before
