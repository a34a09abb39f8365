"""Helpers and fixtures that several test files use: small runs, what they leave, how they end."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.register_assert_rewrite(
    "fineweb_helpers", "hellaswag_helpers", "hub_helpers", "model_helpers"
)
ROOT = Path(__file__).resolve().parent.parent
# For the test processes and all that they start, before torch is imported: at these sizes more
# threads only cost. (torch is imported by the workers only: pytest's first process needs no test.)
os.environ["OMP_NUM_THREADS"] = "1"
# A shell's background job has SIGINT ignored, which its children would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")[:16000]  # about 5,000 tokens

# A run of half a second: 2 rows of 32 tokens a step, float32, uncompiled.
SMALL = dict(
    n_layer=2, n_head=2, n_embd=16, T=32, B=2, total_batch_size=64, max_lr=1e-3, min_lr=1e-4,
    warmup_steps=2, max_steps=4, val_every=0, val_tokens=128, sample_every=0, checkpoint_every=0,
    hellaswag_every=0, curves=False, dtype="float32", compile=False,
)  # fmt: skip


def requires(*packages: str) -> pytest.MarkDecorator:
    """Skips a test if one of these packages is not installed. The reason names it."""
    # Not by find_spec: to look for pip replaces setuptools' distutils, which inductor imports.
    missing = [name for name in packages if not any(importlib.metadata.distributions(name=name))]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture
def text_file(tmp_path):
    """A .txt of about 5,000 tokens: the beginning of input.txt."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def small(tmp_path, text_file):
    """A function: settings -> the `Config` of a small run in tmp_path/log."""
    import train_gpt2

    def make(**settings):
        return train_gpt2.Config(
            **{"data": str(text_file), "log_dir": str(tmp_path / "log"), **SMALL, **settings}
        )

    return make


class SimulatedGPU:
    """A queue of work that takes the time that a test gives it, in milliseconds.

    The CPU computes all results; only `Runtime.asynchronous` and `torch.cuda.Event` say that there
    is a GPU. Its time passes while the host waits for an event. idle_ms: how long it had no work.
    """

    event_ms = 0.0  # work that comes with each event

    def __init__(self):
        self.host_ms = self.done_ms = self.idle_ms = 0.0  # done: when the queue will be empty

    def launch(self, duration_ms: float) -> None:
        """Adds work to the queue."""
        self.idle_ms += max(0.0, self.host_ms - self.done_ms)
        self.done_ms = max(self.host_ms, self.done_ms) + duration_ms

    def make_event(self, enable_timing: bool = False):
        """A `torch.cuda.Event` of the queue."""
        gpu = self

        class Event:
            def record(self):
                gpu.launch(gpu.event_ms)
                self.ms = max(gpu.done_ms, gpu.host_ms)

            def synchronize(self):
                gpu.host_ms = max(gpu.host_ms, self.ms)

            def elapsed_time(self, later) -> float:
                assert enable_timing and max(self.ms, later.ms) <= gpu.host_ms, "not reached"
                return later.ms - self.ms

        return Event()


@pytest.fixture
def gpu(monkeypatch):
    """Makes a run believe that the CPU is a GPU whose work is queued (SimulatedGPU)."""
    import torch

    from support.distributed import Runtime

    simulated = SimulatedGPU()
    monkeypatch.setattr(Runtime, "asynchronous", True)
    monkeypatch.setattr(torch.cuda, "Event", simulated.make_event)
    return simulated


@pytest.fixture
def error_on_recompile():
    """Clears the compiler's cache, and makes it an error to compile a function a second time."""
    import torch._dynamo

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Says what the failure of a test with the marker `gpt2` means."""
    report = yield
    if report.failed and item.get_closest_marker("gpt2"):
        text = (
            "This holds for GPT-2 only: if the model was changed on purpose, the failure is right."
        )
        report.sections.append(("gpt2", text))
    return report


# -------------------------------------------------------------------------------------------------
# A port without a server


@contextlib.contextmanager
def reserved_port():
    """A port of 127.0.0.1 that refuses connections until a server of the test listens on it.

    It stays bound, so that no other process is given it. A server that sets SO_REUSEADDR, as
    torch's and Python's do, can listen on it nevertheless.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def port():
    with reserved_port() as number:
        yield number


# -------------------------------------------------------------------------------------------------
# Runs in processes of their own


def command_line(config) -> list[str]:
    """The arguments that give a `Config`."""
    return [f"--{name}={value}" for name, value in vars(config).items()]


def environment(**more) -> dict:
    """This process's environment without a launcher's variables and with one thread."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


def without_gloo(output: str) -> str:
    """An output without the lines of torch 2.9's Gloo, which ranks print at the same time."""
    return re.sub(r"^([\d ]*$|.*(Gloo|peer ranks).*)\n", "", output, flags=re.MULTILINE)


def run_trainer(config, processes: int = 1, **kwargs) -> subprocess.CompletedProcess:
    """`train_gpt2.py` in a process of its own, or in several under torchrun."""
    arguments = [str(ROOT / "train_gpt2.py"), *command_line(config)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        arguments = [*launcher, *arguments]
    kwargs = {"env": environment(), "timeout": 240, "cwd": ROOT} | kwargs
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **kwargs)


def start(config, processes: int = 1, harm: str = "", launcher=(), **variables):
    """A run in a process of its own, or under torchrun (Popen, its output in one pipe).

    harm: of saboteur.py; launcher: more options of torchrun; variables: of the environment
    """
    program = [str(ROOT / "train_gpt2.py")]
    if harm:
        program = [str(ROOT / "tests" / "saboteur.py"), *harm.split(), "--"]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        program = [*torchrun, *launcher, *program]
    command = [sys.executable, *program, *command_line(config)]
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=environment(**variables), cwd=ROOT, **output)


def wait_for_step(config, step: int, process: subprocess.Popen) -> None:
    """Returns when the run has logged the loss of `step` > 0."""
    log = Path(config.log_dir) / "log.txt"
    deadline = time.monotonic() + 120
    while f"\n{step} train" not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def finish(process: subprocess.Popen, timeout_s: float = 120) -> str:
    """The output of a run that must end well."""
    output = process.communicate(timeout=timeout_s)[0]
    assert process.returncode == 0, output
    return output


def assert_second_interrupt_ends(process: subprocess.Popen) -> None:
    """The process continues its work after one SIGINT, and ends at once after another."""
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def limit_files(size: int):
    """A function for a new process: no file that it writes may grow beyond `size` bytes."""
    return functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


class _Killed(BaseException):
    """Stands for a kill in tests within one process."""


def train_until(config, step: int, monkeypatch) -> None:
    """Runs in this process until `step` is about to begin, as if it was killed there."""
    import train_gpt2

    original = train_gpt2.get_lr

    def get_lr(now, config):
        if now == step:
            raise _Killed
        return original(now, config)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "get_lr", get_lr)
        with pytest.raises(_Killed):
            train_gpt2.train(config)


# -------------------------------------------------------------------------------------------------
# What runs leave


def read_log(config) -> list[str]:
    """The lines of a run's log.txt."""
    return (Path(config.log_dir) / "log.txt").read_text().splitlines()


def losses(config, stream: str = "train") -> dict[int, float]:
    """{step: value} of a stream of a run's log.txt; each step must be there once."""
    lines = [line.split() for line in read_log(config)]
    values = {int(step): float(value) for step, name, value in lines if name == stream}
    assert len(values) == sum(name == stream for _, name, _ in lines), "a step was logged twice"
    return values


def weights(config, step: int = 4) -> bytes:
    """The bytes of a checkpoint's model.safetensors."""
    return (Path(config.log_dir) / f"step_{step:05d}" / "model.safetensors").read_bytes()


def tree(directory: Path) -> dict[str, str]:
    """{relative path: SHA-256, or "directory"} of all below `directory`."""
    from support import files

    return {
        str(path.relative_to(directory)): files.sha256(path) if path.is_file() else "directory"
        for path in directory.rglob("*")
    }


def assert_same_tensors(a, b, where=""):
    """Two states must be equal to the last bit."""
    import torch

    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("settings", "B", "log_dir", "progress.txt"):
                assert_same_tensors(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_tensors(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def assert_same_end(one, other) -> None:
    """Two runs must have ended in the same weights, training state and log, bit for bit."""
    import torch

    a, b = (Path(c.log_dir) / f"step_{c.max_steps:05d}" for c in (one, other))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert_same_tensors(*(torch.load(d / "train_state.pt") for d in (a, b)))
    assert read_log(one) == read_log(other)


# -------------------------------------------------------------------------------------------------
# Runs that end in one line


def outcome(config, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a run in this process, through `run_main` as from a shell."""
    import train_gpt2
    from support import errors

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        errors.run_main(lambda: train_gpt2.train(config))
    return stop.value.code, *capsys.readouterr()


def assert_one_line(err: str, words) -> None:
    """`err` is the one error line that a user reads, with all `words` in it."""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert all(word in err for word in words), (words, err)


def assert_refused(config, capsys, *words, within: Path | None = None) -> str:
    """The run ends with one line that has all `words`, code 2, and nothing in `within` changed.

    Returns what was printed before.
    """
    within = within or Path(config.log_dir).parent
    before = tree(within)
    code, out, err = outcome(config, capsys)
    assert code == 2
    assert_one_line(err, words)
    assert tree(within) == before
    return out


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The settings of a run of 4 steps with checkpoints at 2 and 4, as a kill at its very end
    leaves it: complete, but `run.json` does not say so yet. Not to be written to."""
    import train_gpt2

    directory = tmp_path_factory.mktemp("stopped")
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    config = train_gpt2.Config(
        data=str(directory / "text.txt"), log_dir=str(directory / "log"),
        **SMALL | dict(checkpoint_every=2, val_every=2, val_tokens=320, device="cpu"),
    )  # fmt: skip
    assert train_gpt2.train(config) == 0
    path = directory / "log" / "run.json"
    record = json.loads(path.read_text())
    assert record.pop("finished_step") == 4
    path.write_text(json.dumps(record))
    return config


@pytest.fixture
def copy(stopped, tmp_path):
    """The same, copied to where a test may write: text and log directory have both moved."""
    shutil.copytree(Path(stopped.log_dir).parent, tmp_path / "copy")
    data, log_dir = tmp_path / "copy" / "text.txt", tmp_path / "copy" / "log"
    return dataclasses.replace(stopped, data=str(data), log_dir=str(log_dir))


class RunsCode:
    """Pickled, it creates the file `path` when it is loaded."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")
