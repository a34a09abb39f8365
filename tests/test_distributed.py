"""Joining the processes of a run: an address that cannot be used, and ranks that never come."""

import socket
import subprocess
import sys

import pytest
from conftest import ROOT, assert_one_line, environment

JOIN = """
from support.distributed import initialize
from support.errors import run_main
from support.launch import read_launch

run_main(lambda: initialize("cpu", "float32", read_launch(), timeout_s=2))
"""


def join(rank: int, port: int) -> subprocess.CompletedProcess:
    """What a process of two does that never meets the other one, without the log of torch."""
    variables = dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return subprocess.run(
        [sys.executable, "-c", JOIN], env=environment(**variables, TORCH_CPP_LOG_LEVEL="FATAL"),
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def free_port():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        return other.getsockname()[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_a_lost_process(rank, free_port):
    done = join(rank, free_port)
    assert done.returncode == 3, done.stderr
    words = (f"rank {rank}", "2 processes", f"127.0.0.1:{free_port}", "timeout_s=2")
    assert_one_line(done.stderr, words)


def test_a_port_in_use_is_refused():
    with socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        other.bind(("::", 0))
        other.listen()
        port = other.getsockname()[1]
        done = join(0, port)
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stderr, (f"MASTER_PORT={port}", "in use"))
