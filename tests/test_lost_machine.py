"""A run whose machine is lost with its disk continues from what `after_checkpoint` has copied.

Copies by `cp`, and by the AWS command line to an S3 server on this machine (moto).
"""

import contextlib
import importlib.util
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import (
    SMALL,
    assert_same_end,
    environment,
    finish,
    read_log,
    reserved_port,
    start,
    weights,
)
from test_faults import make_text

import train_gpt2

pytestmark = pytest.mark.faults
needs_s3 = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("awscli", "moto"))),
    reason="needs awscli and moto: pip install awscli 'moto[server]'",
)
AWS = [sys.executable, "-m", "awscli", "--endpoint-url"]
CREDENTIALS = dict(
    AWS_ACCESS_KEY_ID="an-id-that-is-secret", AWS_SECRET_ACCESS_KEY="a-key-that-is-secret",
    AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true",
)  # fmt: skip
# A run of some ten seconds: a step takes 50 ms, a checkpoint has 10 MB.
SETTINGS = SMALL | dict(
    B=8, total_batch_size=32 * 8, max_steps=150, checkpoint_every=10, val_every=25
)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """(settings, a run with them that was never stopped)."""
    directory = tmp_path_factory.mktemp("complete")
    settings = SETTINGS | dict(data=make_text(directory))
    config = train_gpt2.Config(**settings, log_dir=str(directory / "log"))
    finish(start(config))
    return settings, config


# -------------------------------------------------------------------------------------------------
# Servers


class Proxy:
    """Passes connections to a port on, at most `rate` bytes/s of each upload, or refuses them.

    mode: pass, closed (connections are cut), refuse (each request gets a 403)
    """

    def __init__(self, port: int, mode: str = "pass", rate: float = float("inf")):
        self.target, self.mode, self.rate = port, mode, rate
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while True:
            client = self.listener.accept()[0]
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        with contextlib.suppress(OSError), client:
            if self.mode == "refuse":
                client.recv(65536)
                body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
                head = "HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\n"
                head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                client.sendall(head.encode() + body)
            if self.mode != "pass":
                return
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                back = threading.Thread(target=self.copy, args=(server, client), daemon=True)
                back.start()
                self.copy(client, server, self.rate)
                back.join()

    def copy(self, source, target, rate: float = float("inf")):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
                time.sleep(len(data) / rate)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def s3():
    """The port of an S3 server with the bucket `bucket`."""
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with reserved_port() as port:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], **quiet
        )
        try:
            deadline = time.monotonic() + 60
            url = f"http://127.0.0.1:{port}"
            while subprocess.run(
                [*AWS, url, "s3", "mb", "s3://bucket"],
                env=environment(**CREDENTIALS), **quiet,
            ).returncode:  # fmt: skip
                assert time.monotonic() < deadline and server.poll() is None
            yield port
        finally:
            server.kill()
            server.wait()


def sync(url: str, source: str, target: str) -> str:
    """The command that copies a directory to or from the server."""
    return f"{' '.join(AWS)} {url} --cli-connect-timeout 5 s3 sync {source} {target}"


# -------------------------------------------------------------------------------------------------
# The machine is lost


def survive(config, uninterrupted, seed: int, copy_back, forget, **variables) -> None:
    """Kills a run at 20 random instants; after each second kill its directory is lost, and copied
    back. A run that ends before the next kill is compared, and forgotten here and there.

    The instants are shares of the time that a first run takes, which is not killed.
    """
    generator, log_dir = random.Random(seed), Path(config.log_dir)
    begin = time.monotonic()
    finish(start(config, **variables))
    seconds = time.monotonic() - begin
    shutil.rmtree(log_dir)
    forget()
    kills, continued, ended = 0, [], False
    while kills < 20 or not ended:
        process, limit = start(config, **variables), seconds * generator.uniform(0.3, 1.1)
        try:
            output = process.communicate(timeout=limit if kills < 20 else 120)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0]
        continued += map(int, re.findall(r"continuing from .*step_([0-9]+)", output))
        ended = process.returncode == 0
        if ended:
            assert_same_end(config, uninterrupted)
            if kills < 20:
                shutil.rmtree(log_dir)
                forget()
            continue
        assert process.returncode == -signal.SIGKILL, output
        kills += 1
        if kills % 2:
            shutil.rmtree(log_dir, ignore_errors=True)
            copy_back()
    assert max(continued) > 0
    print(f"{kills} kills, 10 losses of log_dir; continued from steps {continued}")


def test_after_losses_of_the_machine_a_run_ends_in_the_same_bits(complete, tmp_path):
    settings, uninterrupted = complete
    remote, log_dir = tmp_path / "remote", tmp_path / "log"
    config = train_gpt2.Config(
        **settings, log_dir=str(log_dir),
        after_checkpoint=f'mkdir -p {remote}; cp -r "$LOG_DIR/." {remote}',
    )  # fmt: skip

    def copy_back():
        if remote.exists():
            shutil.copytree(remote, log_dir)

    survive(config, uninterrupted, 1, copy_back, lambda: shutil.rmtree(remote))


@needs_s3
def test_after_losses_of_the_machine_a_run_continues_from_s3(complete, s3, tmp_path):
    settings, uninterrupted = complete
    log_dir, runs = tmp_path / "log", iter(range(10**9))
    url, place = f"http://127.0.0.1:{s3}", tmp_path / "place"
    config = train_gpt2.Config(
        **settings, log_dir=str(log_dir),
        after_checkpoint=sync(url, '"$LOG_DIR"', f"s3://bucket/$(cat {place})"),
    )  # fmt: skip

    def forget():
        place.write_text(f"run{next(runs)}")

    def copy_back():
        back = sync(url, f"s3://bucket/{place.read_text()}", str(log_dir))
        subprocess.run(back, shell=True, env=environment(**CREDENTIALS), check=True)

    forget()
    survive(config, uninterrupted, 2, copy_back, forget, **CREDENTIALS)
    shutil.rmtree(log_dir)
    copy_back()  # what is on the server at the end is the finished run
    assert_same_end(config, uninterrupted)
    assert "this run is finished" in finish(start(config, **CREDENTIALS))


# -------------------------------------------------------------------------------------------------
# The server fails: no step waits for it, and the run ends with 0

FAULTS = {
    "gone for a while": (dict(mode="closed"), "after_checkpoint: exit code 1"),
    "slow": (dict(rate=1e6), None),
    "refuses": (dict(mode="refuse"), "AccessDenied"),
}


def wait_for_text(path: Path, text: str) -> None:
    """Returns when a file contains a text."""
    deadline = time.monotonic() + 120
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def step_ms(config) -> float:
    """The median time of the steps after the first ten, by progress.txt."""
    rows = (Path(config.log_dir) / "progress.txt").read_text().splitlines()
    totals = [1000 * float(row.split()[2]) for row in rows[10:]]
    return statistics.median(b - a for a, b in zip(totals, totals[1:]))


@needs_s3
@pytest.mark.parametrize("case", FAULTS)
def test_with_a_failing_server_the_run_ends_with_0_and_no_step_waits(case, complete, s3, tmp_path):
    """Four runs with the server and four without, in alternation."""
    settings, uninterrupted = complete
    settings = settings | dict(checkpoint_every=40)
    options, words = FAULTS[case]
    medians = {False: [], True: []}
    for number in range(8):
        proxy, with_server = Proxy(s3, **options), number % 2 == 1
        target = f"s3://bucket/{case.split()[0]}{number}"
        config = train_gpt2.Config(
            **settings, log_dir=str(tmp_path / f"log{number}"),
            after_checkpoint=sync(proxy.url, '"$LOG_DIR"', target) if with_server else "",
        )  # fmt: skip
        process = start(config, AWS_MAX_ATTEMPTS="1", **CREDENTIALS)
        if with_server and case.startswith("gone"):
            wait_for_text(Path(config.log_dir) / "after_checkpoint.log", "exit code 1")
            proxy.mode = "pass"
        output = finish(process, timeout_s=300)
        assert_same_weights(config, uninterrupted)
        medians[with_server].append(step_ms(config))
        failures = re.findall("step +[0-9]+ . (after_checkpoint: .*)", output)
        assert bool(failures) == bool(with_server and words), output
        assert all(words in line and "after_checkpoint.log" in line for line in failures[:1])
        assert not any(value in output for value in CREDENTIALS.values())
        if with_server and case != "refuses":
            back = sync(f"http://127.0.0.1:{s3}", target, str(tmp_path / "back"))
            subprocess.run(back, shell=True, env=environment(**CREDENTIALS), check=True)
            back = train_gpt2.Config(**vars(config) | dict(log_dir=str(tmp_path / "back")))
            assert_same_end(back, config)
            shutil.rmtree(tmp_path / "back")
    without, with_server = map(min, medians.values())  # what other programs disturbed least
    print(f"{case}: {failures}; step {without:.1f} ms without, {with_server:.1f} with: {medians}")
    assert with_server < 1.2 * without


def assert_same_weights(one, other) -> None:
    """Runs with checkpoints at other steps have the same last one and the same log."""
    assert weights(one, one.max_steps) == weights(other, other.max_steps)
    assert read_log(one) == read_log(other)
