"""Whole runs: exact resume, signals, bad numbers, compilation."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_end,
    assert_same_tensors,
    environment,
    finish,
    losses,
    start,
    wait_for_step,
)  # fmt: skip

import train_gpt2
from support import checkpoint
from support.errors import UserError


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.faults)])
def test_kill_and_resume_is_bit_identical(small, tmp_path, dtype):
    """kill -9 after a checkpoint, in the second epoch, changes nothing in the end."""
    settings = dict(dtype=dtype, max_steps=30, checkpoint_every=6, val_every=10, B=2)
    text = Path(small().data).read_text(encoding="utf-8")
    Path(small().data).write_text(text[:6000], encoding="utf-8")
    whole = small(log_dir=str(tmp_path / "whole"), **settings)
    killed = small(log_dir=str(tmp_path / "killed"), **settings)
    uninterrupted, process = start(whole), start(killed)
    wait_for_step(killed, 14, process)
    process.kill()
    process.communicate()
    finish(uninterrupted)
    assert "continuing from" in finish(start(killed))
    assert max(losses(whole)) == 29 and set(losses(whole, "val")) == {0, 10, 20, 30}
    assert_same_end(whole, killed)


class Killed(BaseException):
    """Stands for a kill in tests within one process."""


def train_until(config, step: int, monkeypatch) -> None:
    """Runs until `step` is about to begin, and no further."""
    original = train_gpt2.get_lr

    def get_lr(now, config):
        if now == step:
            raise Killed
        return original(now, config)

    monkeypatch.setattr(train_gpt2, "get_lr", get_lr)
    with pytest.raises(Killed):
        train_gpt2.train(config)
    monkeypatch.setattr(train_gpt2, "get_lr", original)


@pytest.mark.parametrize("stop, shuffle", [
    (3, True), (8, False),
    pytest.param(5, True, marks=pytest.mark.faults),
    pytest.param(11, True, marks=pytest.mark.faults),
])  # fmt: skip
def test_resume_from_any_step(small, tmp_path, monkeypatch, shuffle, stop):
    settings = dict(max_steps=12, checkpoint_every=5, val_every=4, shuffle=shuffle)
    whole = small(log_dir=str(tmp_path / "whole"), **settings)
    stopped = small(log_dir=str(tmp_path / "stopped"), **settings)
    train_gpt2.train(whole)
    train_until(stopped, stop, monkeypatch)
    train_gpt2.train(stopped)
    assert_same_end(whole, stopped)


def test_resume_with_another_B(small, tmp_path, monkeypatch):
    whole = small(log_dir=str(tmp_path / "whole"), max_steps=10, checkpoint_every=5)
    train_gpt2.train(whole)
    stopped = small(log_dir=str(tmp_path / "stopped"), max_steps=10, checkpoint_every=5)
    train_until(stopped, 5, monkeypatch)
    train_gpt2.train(small(log_dir=stopped.log_dir, max_steps=10, checkpoint_every=5, B=3))
    assert losses(stopped) == pytest.approx(losses(whole), abs=1e-5)


def test_a_longer_run_continues_a_finished_one(small, capsys):
    train_gpt2.train(small(max_steps=4))
    train_gpt2.train(small(max_steps=6))
    assert "max_steps was 4 and is 6" in capsys.readouterr().out
    assert list(losses(small())) == [0, 1, 2, 3, 4, 5]


@pytest.fixture
def ahead(monkeypatch):
    """Tells steps as on a GPU, one later: results must not depend on it."""
    monkeypatch.setattr(train_gpt2.Processes, "runs_ahead", True)


def test_telling_steps_late_changes_nothing(small, tmp_path, monkeypatch):
    """The log, the checkpoints and what is in them are those of a run that tells at once."""
    settings = dict(max_steps=9, checkpoint_every=3, val_every=2, keep_checkpoints=4)
    at_once = small(log_dir=str(tmp_path / "at_once"), **settings)
    late = small(log_dir=str(tmp_path / "late"), **settings)
    train_gpt2.train(at_once)
    monkeypatch.setattr(train_gpt2.Processes, "runs_ahead", True)
    train_gpt2.train(late)
    assert_same_end(at_once, late)
    for step in (3, 6):
        states = [Path(c.log_dir) / f"step_{step:05d}" / "train_state.pt" for c in (at_once, late)]
        assert_same_tensors(*map(torch.load, states))


def stop_by_signal(config, name: str, monkeypatch) -> int:
    """The exit code of a run that gets the signal in the middle of step 7."""
    original, number = train_gpt2.get_lr, getattr(signal, name)

    def get_lr(step, config):
        if step == 7:
            os.kill(os.getpid(), number)
        return original(step, config)

    monkeypatch.setattr(train_gpt2, "get_lr", get_lr)
    code = train_gpt2.train(config)
    monkeypatch.setattr(train_gpt2, "get_lr", original)
    return code


def test_a_SIGINT_after_another_signal_still_waits_for_the_step(small, monkeypatch):
    """^C while a scheduler's SIGTERM is being obeyed must not lose the step."""
    original = train_gpt2.get_lr

    def get_lr(step, config):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return original(step, config)

    monkeypatch.setattr(train_gpt2, "get_lr", get_lr)
    config = small(max_steps=6)
    assert train_gpt2.train(config) == 128 + signal.SIGINT
    assert checkpoint.damage(Path(config.log_dir) / "step_00003") is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_the_step_and_the_run_continues(small, tmp_path, monkeypatch, capsys, name):
    """The signal comes in mid-step; exit code 128 + its number, and nothing is lost."""
    whole = small(log_dir=str(tmp_path / "whole"), max_steps=12)
    stopped = small(log_dir=str(tmp_path / "stopped"), max_steps=12)
    train_gpt2.train(whole)
    assert stop_by_signal(stopped, name, monkeypatch) == 128 + getattr(signal, name)
    assert f"stopped by {name} after step 7" in capsys.readouterr().out
    assert checkpoint.damage(Path(stopped.log_dir) / "step_00008") is None
    assert train_gpt2.train(stopped) == 0
    assert_same_end(whole, stopped)


def test_a_signal_where_steps_are_told_late(small, tmp_path, monkeypatch, capsys, ahead):
    """The step launched meanwhile is saved and logged too."""
    whole = small(log_dir=str(tmp_path / "whole"), max_steps=12)
    stopped = small(log_dir=str(tmp_path / "stopped"), max_steps=12)
    train_gpt2.train(whole)
    assert stop_by_signal(stopped, "SIGTERM", monkeypatch) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 8" in capsys.readouterr().out
    assert list(losses(stopped)) == list(range(9))
    assert train_gpt2.train(stopped) == 0
    assert_same_end(whole, stopped)


def test_a_signal_from_outside_and_a_second_SIGINT(small, tmp_path):
    """The process exits by the documented codes; a second SIGINT does not wait for the step."""
    config = small(max_steps=100_000)
    process = start(config)
    wait_for_step(config, 3, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "the same command continues the run" in output
    assert len(checkpoint.list_checkpoints(Path(config.log_dir))) == 1

    # a step that takes minutes: eight rows are nothing, 20,000 micro-batches are
    endless = small(log_dir=str(tmp_path / "endless"), B=1, total_batch_size=32 * 20_000)
    process = start(endless)
    deadline = time.monotonic() + 60
    while not (Path(endless.log_dir) / "log.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)  # into the step
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130


def spoil_gradients(monkeypatch, steps, value=float("nan")):
    """Makes the gradient of the loss `value` at the given backward passes."""
    original, count = train_gpt2.HeadLoss.backward, iter(range(10**9))

    def backward(ctx, grad):
        dx, dw, *rest = original(ctx, grad)
        return (dx * value if next(count) in steps else dx, dw, *rest)

    monkeypatch.setattr(train_gpt2.HeadLoss, "backward", staticmethod(backward))


def train_past_a_nan(config, monkeypatch, capsys) -> list[dict]:
    """The optimizer's states before and after a step with a gradient of NaN, and a step later.

    The weights must have stayed, and then moved.
    """
    config = dataclasses.replace(config, max_steps=8, checkpoint_every=1, keep_checkpoints=8)
    spoil_gradients(monkeypatch, {5})
    train_gpt2.train(config)
    assert "step 5: loss" in capsys.readouterr().out
    paths = [Path(config.log_dir) / f"step_{step:05d}" for step in (5, 6, 7)]
    weights = [(path / "model.safetensors").read_bytes() for path in paths]
    assert weights[0] == weights[1] != weights[2]
    return [torch.load(path / "train_state.pt")["optimizer"] for path in paths]


def test_a_nan_gradient_skips_the_update(small, monkeypatch, capsys):
    """Weights and moments stay as they were, bit for bit, and the next step trains."""
    before, bad, after = train_past_a_nan(small(), monkeypatch, capsys)
    assert_same_tensors(before["state"], bad["state"])
    assert after["state"][0]["step"] == before["state"][0]["step"] + 1
    assert all(torch.isfinite(s["exp_avg"]).all() for s in after["state"].values())


def test_bad_steps_in_a_row_stop_the_run(small, monkeypatch):
    config = small(max_steps=20, checkpoint_every=2, max_bad_steps=3)
    spoil_gradients(monkeypatch, {3, 6, 7, 8, 9, 10})
    with pytest.raises(UserError, match="max_bad_steps=3.*last good checkpoint is step_00008"):
        train_gpt2.train(config)
    assert list(losses(config)) == list(range(9))
    newest = checkpoint.newest_whole(Path(config.log_dir))
    model = train_gpt2.GPT.from_pretrained(newest)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_float16_scales_its_gradient(small, tmp_path, monkeypatch, capsys):
    """Forced float16 trains; an overflow halves the scale and skips; a resume keeps the scale."""
    config = small(dtype="float16", max_steps=12, checkpoint_every=4, total_batch_size=64, B=2)
    spoil_gradients(monkeypatch, {2, 3, 5}, float("inf"))
    train_until(config, 10, monkeypatch)
    output = capsys.readouterr().out
    assert output.count("gradient overflow: update skipped") == 3
    state = torch.load(Path(config.log_dir) / "step_00008" / "train_state.pt")
    assert state["scaler"]["scale"] == 65536 / 8
    assert state["optimizer"]["state"][0]["step"] == 8 - 3
    train_gpt2.train(config)
    state = torch.load(Path(config.log_dir) / "step_00012" / "train_state.pt")
    assert state["scaler"]["scale"] == 65536 / 8
    reference = small(log_dir=str(tmp_path / "float32"), max_steps=2, total_batch_size=64, B=2)
    train_gpt2.train(reference)
    assert losses(config)[1] == pytest.approx(losses(reference)[1], abs=0.02)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.faults)]
)
def test_compiled_training_never_recompiles(
    small, error_on_recompile, monkeypatch, capsys, backend
):
    """Validation, odd shapes on the raw model and samples leave the compiled step as it is.

    What is traced, and how often, does not depend on what makes machine code of it, which takes
    most of the time; test_processes.py has it made.
    """
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    settings = dict(max_steps=8, val_every=2, sample_every=2, sample_tokens=4, num_samples=2, B=3)
    config = small(compile=True, **settings)
    graphs = []
    original = train_gpt2.samples

    def samples(model, *rest):
        for shape in ((4, 7), (1, 32), (3, 31)):  # as HellaSwag's
            model(torch.zeros(shape, dtype=torch.int64))
        graphs.append(counters["stats"]["unique_graphs"])
        return original(model, *rest)

    monkeypatch.setattr(train_gpt2, "samples", samples)
    counters.clear()
    assert train_gpt2.train(config) == 0
    assert "compiled in" in capsys.readouterr().out
    assert graphs == [4] * 4  # trunk and loss kernel, each for training and for validation
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]

    plain = small(log_dir=config.log_dir + "_eager", **settings)
    train_gpt2.train(plain)
    assert losses(config) == pytest.approx(losses(plain), abs=1e-4)
    assert losses(config, "val") == pytest.approx(losses(plain, "val"), abs=1e-4)


def test_a_missing_toolchain_falls_back_to_eager(small, monkeypatch, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler found\nand more lines")

    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", no_compiler)
    config = small(compile=True)
    assert train_gpt2.train(config) == 0
    output = capsys.readouterr().out
    assert "torch.compile failed, going on without it" in output
    assert "no C++ compiler found" in output and "and more lines" not in output
    assert list(losses(config)) == [0, 1, 2, 3]


def test_import_is_light_and_leaves_nothing(tmp_path):
    """No file, no process group, no heavy package, and little more time than torch alone."""
    code = (
        "import time, torch; started = time.perf_counter(); import train_gpt2, sys, os, json;"
        "print(json.dumps([time.perf_counter() - started, os.listdir('.'),"
        " torch.distributed.is_initialized(),"
        " [m for m in ('transformers', 'tiktoken', 'matplotlib', 'torch._inductor.compile_fx')"
        " if m in sys.modules]]))"
    )
    env = environment(PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    seconds, files, initialized, heavy = json.loads(done.stdout)
    assert seconds < 2 and files == [] and not initialized and heavy == []


def test_tiny_runs_from_any_directory(tmp_path):
    """The README's first command, for two steps: validation, sample, checkpoint, all right here."""
    command = [sys.executable, str(ROOT / "train_gpt2.py"), "tiny", "--max_steps=2"]
    command += ["--val_tokens=1024", "--sample_tokens=20"]
    here, env = tmp_path / "here", environment(HOME=str(tmp_path / "home"))
    here.mkdir()
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 2
    assert "--- sample 0 at step 2\nQUEEN MARETH:\n" in done.stdout
    assert [path.name for path in here.iterdir()] == ["log_tiny"]
    assert sorted(path.name for path in (here / "log_tiny").iterdir()) == [
        "curves.png", "log.txt", "progress.txt", "run.json", "step_00002",
    ]  # fmt: skip


def test_run_json_records_the_run(small):
    config = small()
    train_gpt2.train(config)
    facts = json.loads((Path(config.log_dir) / "run.json").read_text())
    assert facts["settings"]["max_lr"] == config.max_lr and facts["finished_step"] == 4
    assert facts["versions"]["torch"] == torch.__version__
    assert (
        facts["parameters"]
        == train_gpt2.GPT.from_pretrained(Path(config.log_dir) / "step_00004").num_parameters()
    )


def test_fine_tuning_starts_from_the_given_model(small, tmp_path, capsys):
    """The first validation loss is the source's in transformers; the shape is the source's too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    source = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=48, n_layer=1, n_head=3)).eval()
    source.save_pretrained(tmp_path / "source")
    settings = dict(init_from=str(tmp_path / "source"), T=16, total_batch_size=64, val_every=2)
    config = small(**settings, val_tokens=320)
    train_gpt2.train(config)
    _, tokens = train_gpt2.open_tokens(config.data)
    windows = [tokens.read(i * 16, i * 16 + 17).astype("int64") for i in range(20)]
    x = torch.tensor([w.tolist() for w in windows])
    with torch.no_grad():
        logits = source(x[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    assert losses(config, "val")[0] == pytest.approx(expected.item(), abs=1e-4)
    assert losses(config, "val")[4] < losses(config, "val")[0]
    train_gpt2.train(small(**settings, val_tokens=320, max_steps=5))
    assert "continuing from" in capsys.readouterr().out
    facts = json.loads((Path(config.log_dir) / "run.json").read_text())
    assert [facts["settings"][name] for name in ("n_embd", "n_layer", "n_head")] == [48, 1, 3]


def test_each_epoch_is_told_once(small, capsys):
    """In the line before the first step that begins in it."""
    config = small(total_batch_size=12 * 32, B=12, max_steps=9)
    text = Path(config.data).read_text(encoding="utf-8")
    Path(config.data).write_text(text[: len(text) // 4], encoding="utf-8")
    train_gpt2.train(config)
    output = capsys.readouterr().out
    windows = (len(train_gpt2.open_tokens(config.data)[0]) - 1) // 32
    first = [-(-windows * epoch // 12) for epoch in (1, 2, 3)]
    told = [
        f"step {step:5d} | epoch {epoch} of the data"
        for step, epoch in zip(first, (2, 3, 4))
        if step < 9
    ]
    assert len(told) >= 2
    assert [line for line in output.splitlines() if "| epoch" in line] == told
