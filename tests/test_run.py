"""Runs of the trainer: start, bad numbers, fine-tuning, what is printed and recorded."""

import dataclasses
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_tensors, environment, losses, train_until

import train_gpt2
from support import checkpoint, fused_loss
from support.errors import UserError
from support.huggingface import find_non_finite
from support.shards import open_splits


def test_tiny_runs_from_any_directory(tmp_path):
    """The README's first command, for one step: it finds input.txt, the tokenizer and plot.py by
    its own place, and writes validation, sample, checkpoint and picture into the current one."""
    command = [sys.executable, str(ROOT / "train_gpt2.py"), "tiny", "--max_steps=1"]
    command += ["--val_tokens=64", "--sample_tokens=8", "--T=32", "--total_batch_size=32"]
    here, env = tmp_path / "here", environment(HOME=str(tmp_path / "home"))
    here.mkdir()
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 2
    assert "--- sample 0 at step 1\nQUEEN MARETH:\n" in done.stdout
    assert [path.name for path in here.iterdir()] == ["log_tiny"]
    assert sorted(path.name for path in (here / "log_tiny").iterdir()) == [
        ".lock", "curves.png", "log.txt", "progress.txt", "run.json", "step_00001",
    ]  # fmt: skip


def test_run_json_records_the_run(small, capsys):
    config = small()
    train_gpt2.train(config)
    assert capsys.readouterr().out.startswith(f"torch {torch.__version__} | ")
    record = json.loads((Path(config.log_dir) / "run.json").read_text())
    assert record["settings"]["max_lr"] == config.max_lr and record["finished_step"] == 4
    assert record["versions"]["torch"] == torch.__version__
    assert {"cuda", "cudnn"} <= set(record["versions"])
    assert (
        record["parameters"]
        == train_gpt2.GPT.from_pretrained(Path(config.log_dir) / "step_00004").num_parameters()
    )


@pytest.mark.gpt2
def test_fine_tuning_starts_from_the_given_model(small, tmp_path, capsys):
    """The first validation loss is the source's in transformers; the shape is the source's too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    source = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=48, n_layer=1, n_head=3)).eval()
    source.save_pretrained(tmp_path / "source")
    settings = dict(init_from=str(tmp_path / "source"), T=16, total_batch_size=64, val_every=2)
    config = small(**settings, val_tokens=320)
    train_gpt2.train(config)
    tokens = open_splits(config.data)["val"]
    windows = [tokens.read(i * 16, i * 16 + 17).astype("int64") for i in range(20)]
    x = torch.tensor([w.tolist() for w in windows])
    with torch.no_grad():
        logits = source(x[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    assert losses(config, "val")[0] == pytest.approx(expected.item(), abs=1e-4)
    assert losses(config, "val")[4] < losses(config, "val")[0]
    train_gpt2.train(small(**settings, val_tokens=320, max_steps=5))
    assert "continuing from" in capsys.readouterr().out
    record = json.loads((Path(config.log_dir) / "run.json").read_text())
    assert [record["settings"][name] for name in ("n_embd", "n_layer", "n_head")] == [48, 1, 3]


def test_each_epoch_is_printed_once(small, capsys):
    """In the line before the first step that begins in it."""
    config = small(total_batch_size=6 * 32, B=6, max_steps=9)
    text = Path(config.data).read_text(encoding="utf-8")
    Path(config.data).write_text(text[: len(text) // 8], encoding="utf-8")
    train_gpt2.train(config)
    output = capsys.readouterr().out
    windows = (len(open_splits(config.data)["train"]) - 1) // 32
    first = [-(-windows * epoch // 6) for epoch in (1, 2, 3)]
    expected = [
        f"step {step:5d} | epoch {epoch} of the data"
        for step, epoch in zip(first, (2, 3, 4))
        if step < 9
    ]
    assert len(expected) >= 2
    assert [line for line in output.splitlines() if "| epoch" in line] == expected


def test_no_file_of_a_run_is_open_to_others_for_writing(stopped):
    for path in Path(stopped.log_dir).rglob("*"):
        assert not path.stat().st_mode & stat.S_IWOTH, path


# -------------------------------------------------------------------------------------------------
# Numbers that are not finite


def replace_gradients(monkeypatch, steps, value=float("nan")):
    """Multiplies the gradient of the loss by `value` in the given backward passes."""
    original, count = fused_loss.ChunkedLoss.backward, iter(range(10**9))

    def backward(ctx, grad):
        loss_fn, dx, *rest = original(ctx, grad)
        return (loss_fn, dx * value if next(count) in steps else dx, *rest)

    monkeypatch.setattr(fused_loss.ChunkedLoss, "backward", staticmethod(backward))


def train_past_a_nan(config, monkeypatch, capsys) -> list[dict]:
    """The optimizer's states before and after a step with a gradient of NaN, and a step later.

    The weights must have stayed, and then moved.
    """
    config = dataclasses.replace(config, max_steps=4, checkpoint_every=1, keep_checkpoints=4)
    replace_gradients(monkeypatch, {2})
    train_gpt2.train(config)
    assert "step 2: loss" in capsys.readouterr().out
    paths = [Path(config.log_dir) / f"step_{step:05d}" for step in (2, 3, 4)]
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
    replace_gradients(monkeypatch, {1, 3, 4, 5, 6})
    with pytest.raises(UserError, match="max_bad_steps=3.*last good checkpoint is step_00004"):
        train_gpt2.train(config)
    assert list(losses(config)) == list(range(6))
    newest = checkpoint.newest_valid(Path(config.log_dir))
    model = train_gpt2.GPT.from_pretrained(newest)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_float16_scales_its_gradient(small, tmp_path, monkeypatch, capsys):
    """Forced float16 trains; an overflow halves the scale and skips; a resume keeps the scale."""
    settings = dict(T=16, B=2, total_batch_size=32)
    config = small(dtype="float16", max_steps=8, checkpoint_every=6, **settings)
    replace_gradients(monkeypatch, {1, 2, 4}, float("inf"))
    train_until(config, 7, monkeypatch)
    output = capsys.readouterr().out
    assert output.count("gradient overflow: update skipped") == 3
    state = torch.load(Path(config.log_dir) / "step_00006" / "train_state.pt")
    assert state["scaler"]["scale"] == 65536 / 8
    assert state["optimizer"]["state"][0]["step"] == 6 - 3
    train_gpt2.train(config)
    state = torch.load(Path(config.log_dir) / "step_00008" / "train_state.pt")
    assert state["scaler"]["scale"] == 65536 / 8
    reference = small(log_dir=str(tmp_path / "float32"), max_steps=2, **settings)
    train_gpt2.train(reference)
    assert losses(config)[1] == pytest.approx(losses(reference)[1], abs=0.02)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(small, stopped, tmp_path, value):
    model = train_gpt2.GPT.from_pretrained(Path(stopped.log_dir) / "step_00004")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = value
    model.save_pretrained(tmp_path / "not_finite")
    config = small(init_from=str(tmp_path / "not_finite"), log_dir=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"init_from.*h\.1\.mlp\.c_fc\.weight holds NaN or inf"):
        train_gpt2.train(config)
    assert not Path(config.log_dir).exists()


def test_weights_that_are_not_finite_are_never_saved(small):
    """A far too high learning rate overflows float32 in an update whose gradient was finite."""
    config = small(max_lr=1e38, warmup_steps=2, max_steps=8, checkpoint_every=1, weight_decay=100)
    with pytest.raises(UserError, match="not finite|finite loss") as error:
        train_gpt2.train(config)
    assert "max_lr" in str(error.value) and "last good checkpoint" in str(error.value)
    for path in checkpoint.list_checkpoints(Path(config.log_dir)).values():
        assert find_non_finite(train_gpt2.GPT.from_pretrained(path)) is None
