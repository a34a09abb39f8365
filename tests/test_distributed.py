"""Joining the processes of a run: an address that cannot be used, and ranks that never come."""

import socket

import pytest
import torch.distributed as dist
from conftest import assert_one_line

from support.distributed import initialize
from support.errors import SettingError, run_main
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


@pytest.fixture
def free_port():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        return other.getsockname()[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_a_lost_process(rank, free_port, join):
    code, error = join(rank, free_port)
    assert code == 3, error
    words = (f"rank {rank}", "2 processes", f"127.0.0.1:{free_port}", "timeout_s=1")
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
