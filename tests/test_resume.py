"""Continuing a run: exact resume, what may change and what must match, damaged checkpoints."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import (
    SMALL,
    TEXT,
    RunsCode,
    assert_refused,
    assert_same_end,
    assert_same_tensors,
    losses,
    outcome,
    start,
    train_until,
    tree,
    weights,
)

import train_gpt2
from support import checkpoint
from support.distributed import initialize


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.faults)])
def test_kill_and_resume_is_bit_identical(small, tmp_path, capsys, dtype):
    """kill -9 after a checkpoint, in the second epoch, changes nothing in the end."""
    settings = dict(dtype=dtype, max_steps=14, checkpoint_every=5, val_every=6, B=1)
    Path(small().data).write_text(TEXT[:1800], encoding="utf-8")
    complete = small(log_dir=str(tmp_path / "complete"), **settings)
    killed = small(log_dir=str(tmp_path / "killed"), **settings)
    process = start(killed, harm="signal_at_step SIGKILL 0 11")
    assert train_gpt2.train(complete) == 0
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL and max(losses(killed)) == 10, output
    assert train_gpt2.train(killed) == 0
    assert f"continuing from {Path(killed.log_dir) / 'step_00010'}" in capsys.readouterr().out
    assert max(losses(complete)) == 13 and set(losses(complete, "val")) == {0, 6, 12, 14}
    assert_same_end(complete, killed)


COMPLETE = dict(max_steps=9, checkpoint_every=3, val_every=4, keep_checkpoints=4)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A run with these settings that was never stopped."""
    directory = tmp_path_factory.mktemp("complete")
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    places = dict(data=str(directory / "text.txt"), log_dir=str(directory / "log"))
    config = train_gpt2.Config(**places, **SMALL | COMPLETE)
    assert train_gpt2.train(config) == 0
    return config


@pytest.mark.parametrize("stop", [
    2, 7,
    pytest.param(5, marks=pytest.mark.faults),
    pytest.param(8, marks=pytest.mark.faults),
])  # fmt: skip
def test_resume_from_any_step(small, complete, monkeypatch, stop):
    stopped = small(**COMPLETE)
    train_until(stopped, stop, monkeypatch)
    train_gpt2.train(stopped)
    assert_same_end(complete, stopped)


def test_resume_in_file_order(small, tmp_path, monkeypatch):
    settings = dict(max_steps=6, checkpoint_every=2, shuffle=False)
    complete = small(log_dir=str(tmp_path / "complete"), **settings)
    stopped = small(log_dir=str(tmp_path / "stopped"), **settings)
    train_gpt2.train(complete)
    train_until(stopped, 5, monkeypatch)
    train_gpt2.train(stopped)
    assert_same_end(complete, stopped)


def test_resume_with_another_B(small, complete, monkeypatch):
    stopped = small(**COMPLETE)
    train_until(stopped, 6, monkeypatch)
    train_gpt2.train(small(**COMPLETE | dict(B=1)))
    assert losses(stopped) == pytest.approx(losses(complete), abs=1e-5)


def test_logging_steps_late_changes_nothing(small, complete, gpu):
    """The log, the checkpoints and what is in them are those of a run that logs at once."""
    gpu.event_ms, late = 1, small(**COMPLETE)
    train_gpt2.train(late)
    assert_same_end(complete, late)
    for step in (3, 6):
        states = [Path(c.log_dir) / f"step_{step:05d}" / "train_state.pt" for c in (complete, late)]
        assert_same_tensors(*map(torch.load, states))


def test_a_longer_run_continues_a_finished_one(small, capsys):
    train_gpt2.train(small(max_steps=4))
    train_gpt2.train(small(max_steps=6))
    assert "max_steps was 4 and is 6" in capsys.readouterr().out
    assert list(losses(small())) == [0, 1, 2, 3, 4, 5]


# -------------------------------------------------------------------------------------------------
# Settings that must match, and those that may change


OTHER = dict(
    seed=1338, shuffle=False, init_from="gpt2", n_layer=3, n_head=4, n_embd=64, T=16,
    total_batch_size=512, batch_ramp_tokens=10**6, max_lr=2e-3, min_lr=2e-4, cooldown=0.5,
    warmup_steps=3, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-7, grad_clip=0.5,
    optimizer="muon", schedule="linear", muon_lr=0.01, muon_momentum=0.9, embedding_lr=2e-3,
)  # fmt: skip


def test_every_setting_must_match_or_may_change():
    fields = {field.name for field in dataclasses.fields(train_gpt2.Config)}
    assert train_gpt2.MAY_CHANGE <= fields
    assert set(OTHER) == fields - train_gpt2.MAY_CHANGE


def test_a_new_setting_must_match_unless_it_is_listed(copy, monkeypatch, capsys):
    """A setting that someone adds to `Config` is compared, without an entry in any list."""
    bases = (train_gpt2.Config,)
    new = dataclasses.make_dataclass("Config", [("dropout", float, 0.0)], bases=bases)
    monkeypatch.setattr(train_gpt2, "Config", new)
    path = Path(copy.log_dir) / "run.json"
    record = json.loads(path.read_text())
    record["settings"]["dropout"] = 0.0
    path.write_text(json.dumps(record))
    config = new(**vars(copy), dropout=0.1)
    assert_refused(config, capsys, "dropout=0.1:", "dropout=0.0;", "another --log_dir")
    monkeypatch.setattr(train_gpt2, "MAY_CHANGE", train_gpt2.MAY_CHANGE | {"dropout"})
    assert train_gpt2.open_run(config, initialize("cpu", "float32")).step == 4


@pytest.mark.parametrize("name", OTHER)
def test_a_changed_setting_is_refused_by_name(name, stopped, capsys):
    before, other = getattr(stopped, name), OTHER[name]
    config = dataclasses.replace(stopped, **{name: other})
    words = (f"{name}={other!r}:", f"{name}={before!r};", "log_dir=", "another --log_dir")
    assert_refused(config, capsys, *words)


def mark_finished(config) -> None:
    """Writes into run.json that the run is finished, as its end does."""
    path = Path(config.log_dir) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished_step": 4}))


def test_a_changed_setting_of_a_finished_run_is_refused(copy, capsys):
    mark_finished(copy)
    config = dataclasses.replace(copy, seed=1338)
    assert_refused(config, capsys, "seed=1338", "seed=1337", "another --log_dir")


@pytest.mark.parametrize("name", ["n_embd", "seed"])
def test_a_checkpoint_of_another_model_is_refused_without_run_json_too(name, copy, capsys):
    (Path(copy.log_dir) / "run.json").unlink()
    config = dataclasses.replace(copy, **{name: OTHER[name]})
    assert_refused(config, capsys, f"{name}={OTHER[name]}:", f"{name}={getattr(copy, name)}")


@pytest.mark.parametrize("finished", [False, True])
def test_max_steps_may_not_shrink(finished, copy, capsys):
    if finished:
        mark_finished(copy)
    config = dataclasses.replace(copy, max_steps=3)
    assert_refused(config, capsys, "max_steps=3:", "max_steps=4", "grow", "another --log_dir")


def test_max_steps_may_grow_and_is_reported(copy, capsys):
    mark_finished(copy)
    config = dataclasses.replace(copy, max_steps=6)
    code, out, err = outcome(config, capsys)
    assert (code, err) == (0, "")
    assert "max_steps was 4 and is 6" in out and "continuing from" in out and "step_00004" in out
    assert list(losses(config)) == [0, 1, 2, 3, 4, 5]
    assert json.loads((Path(config.log_dir) / "run.json").read_text())["finished_step"] == 6


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_run_whose_decay_has_not_begun_is_extended_to_exactly_the_longer_one(schedule, small):
    """Steps 2 to 4 of 8 are at max_lr; the rate of a run of 12 steps falls from step 7 on."""
    shape = dict(schedule=schedule, cooldown=0.5, warmup_steps=2, checkpoint_every=4)
    short = small(**shape, max_steps=8, log_dir=f"{small().log_dir}_short", keep_checkpoints=9)
    assert train_gpt2.train(short) == 0
    shutil.rmtree(Path(short.log_dir) / "step_00008")  # as if it had been stopped after step 4
    longer = dataclasses.replace(short, max_steps=12)
    assert train_gpt2.train(longer) == 0
    at_once = small(**shape, max_steps=12, keep_checkpoints=9)
    assert train_gpt2.train(at_once) == 0
    assert_same_end(longer, at_once)


FREE = {
    "the place of the data": (dict(), True),
    "rows at a time": (dict(B=3), False),
    "evaluation, log and checkpoints": (
        dict(
            val_every=1, val_tokens=64, sample_every=2, sample_tokens=2, num_samples=1,
            checkpoint_every=1, keep_checkpoints=1, max_bad_steps=9,
        ),
        True,
    ),
    "precision": (dict(dtype="bfloat16"), None),
}  # fmt: skip


@pytest.mark.parametrize("case", FREE)
def test_other_settings_may_change(case, copy, stopped, tmp_path, capsys):
    """The data are elsewhere in every case; if the sums are the same, so are the weights."""
    settings, same_weights = FREE[case]
    shutil.rmtree(Path(copy.log_dir) / "step_00004")
    moved = tmp_path / "moved.txt"
    Path(copy.data).rename(moved)
    config = dataclasses.replace(copy, data=str(moved), **settings)
    code, out, err = outcome(config, capsys)
    assert (code, err) == (0, "") and f"continuing from {Path(copy.log_dir) / 'step_00002'}" in out
    if same_weights:
        assert weights(config) == weights(stopped)
    if same_weights is not None:
        assert losses(config) == pytest.approx(losses(stopped), abs=1e-5)
    assert list(losses(config)) == [0, 1, 2, 3]


OTHER_TEXT = {
    "more": TEXT + TEXT[:500],
    "less": TEXT[:-500],
    "of the same length": TEXT.replace("e", "a"),
}


@pytest.mark.parametrize("case", OTHER_TEXT)
def test_other_text_at_the_same_path_is_refused(case, copy, capsys):
    Path(copy.data).write_text(OTHER_TEXT[case], encoding="utf-8")
    assert_refused(copy, capsys, f"data={copy.data!r}", "not the tokens", "another --log_dir")


def test_other_text_is_refused_without_run_json_too(copy, capsys):
    (Path(copy.log_dir) / "run.json").unlink()
    Path(copy.data).write_text(OTHER_TEXT["more"], encoding="utf-8")
    assert_refused(copy, capsys, f"data={copy.data!r}", "not the tokens", "another --log_dir")


# -------------------------------------------------------------------------------------------------
# What log_dir holds


def test_a_finished_run_is_reported_and_not_changed(copy, capsys):
    mark_finished(copy)
    before = tree(Path(copy.log_dir).parent)
    code, out, err = outcome(copy, capsys)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1 and copy.log_dir in out and "finished, at step 4 of 4" in out
    assert "--max_steps" in out and "--log_dir" in out
    assert tree(Path(copy.log_dir).parent) == before


def test_a_finished_run_whose_final_checkpoint_is_damaged_writes_it_again(copy, stopped, capsys):
    mark_finished(copy)
    os.truncate(Path(copy.log_dir) / "step_00004" / "model.safetensors", 1000)
    code, out, _ = outcome(copy, capsys)
    assert code == 0 and "step_00004: damaged, not used: model.safetensors has 1,000 bytes" in out
    assert weights(copy) == weights(stopped)


@pytest.mark.parametrize("what", ["a run", "run.json", "log.txt", "a checkpoint"])
def test_resume_false_refuses_a_directory_with_a_run(what, copy, capsys):
    log_dir = Path(copy.log_dir)
    for path in list(log_dir.iterdir()):
        if what != "a run" and path.name != {"a checkpoint": "step_00002"}.get(what, what):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = dataclasses.replace(copy, resume=False)
    assert_refused(config, capsys, "resume=False", "log_dir=", "another --log_dir")


def test_resume_false_starts_in_an_empty_directory(small, tmp_path):
    (tmp_path / "log").mkdir()
    assert train_gpt2.train(small(resume=False, max_steps=1)) == 0


def test_a_log_of_another_program_is_refused(small, tmp_path, capsys):
    log_dir = tmp_path / "log"
    log_dir.mkdir()
    lines = ("0 val 10.9504", "0 hella 0.2463", "0 train 10.955029", "1 train 10.6")
    (log_dir / "log.txt").write_text("\n".join(lines) + "\n")  # build-nanogpt's
    (log_dir / "model_00000.pt").write_bytes(b"weights")
    assert_refused(small(), capsys, "log_dir=", "log.txt", "another program", "another --log_dir")


DAMAGED = {
    "empty": b"",
    "cut off": b'{"settings": {"data": ',
    "not text": b"\xff\x00",
    "a list": b"[1, 2]",
    "another program's": b'{"name": "a run of something else"}',
    "without settings": b'{"settings": {}, "data": ""}',
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_run_json_is_refused(case, copy, capsys):
    path = Path(copy.log_dir) / "run.json"
    path.write_bytes(DAMAGED[case])
    assert_refused(copy, capsys, str(path), "remove")


def test_without_run_json_a_run_continues_from_its_checkpoint(copy, stopped, capsys):
    """The remedy that the message on a damaged one names."""
    shutil.rmtree(Path(copy.log_dir) / "step_00004")
    (Path(copy.log_dir) / "run.json").unlink()
    assert outcome(copy, capsys)[0] == 0
    assert weights(copy) == weights(stopped) and losses(copy) == losses(stopped)


@pytest.mark.parametrize("there", ["itself", "above it"])
def test_a_file_in_the_place_of_log_dir_is_refused(there, small, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    log_dir = tmp_path / "file" if there == "itself" else tmp_path / "file" / "log"
    config = small(log_dir=str(log_dir))
    assert_refused(config, capsys, "log_dir=", "another --log_dir", within=tmp_path)


# -------------------------------------------------------------------------------------------------
# Damaged checkpoints


def truncate(directory: Path, name: str) -> None:
    os.truncate(directory / name, (directory / name).stat().st_size // 2)


HALF_WRITTEN = {
    "truncated weights": lambda d: truncate(d, "model.safetensors"),
    "no list of files": lambda d: (d / "files.json").unlink(),
    "no training state": lambda d: (d / "train_state.pt").unlink(),
}


@pytest.mark.parametrize("case", HALF_WRITTEN)
def test_the_older_valid_checkpoint_is_used_and_reported(case, copy, stopped, capsys):
    newest = Path(copy.log_dir) / "step_00004"
    HALF_WRITTEN[case](newest)
    code, out, err = outcome(copy, capsys)
    assert (code, err) == (0, "")
    assert f"{newest}: damaged, not used" in out
    assert f"continuing from {Path(copy.log_dir) / 'step_00002'}" in out
    assert weights(copy) == weights(stopped) and losses(copy) == losses(stopped)
    assert losses(copy, "val") == losses(stopped, "val")
    assert checkpoint.find_problem(newest) is None


def test_a_partial_directory_of_a_killed_run_is_ignored_and_removed(copy, stopped, capsys):
    log_dir = Path(copy.log_dir)
    (log_dir / "step_00004").rename(log_dir / ".step_00004.partial")
    truncate(log_dir / ".step_00004.partial", "train_state.pt")
    code, out, _ = outcome(copy, capsys)
    assert code == 0 and "step_00002" in out
    assert weights(copy) == weights(stopped) and losses(copy) == losses(stopped)
    assert not list(log_dir.glob(".step*"))


def test_if_all_checkpoints_are_damaged_the_user_decides(copy, capsys):
    for step in (2, 4):
        truncate(Path(copy.log_dir) / f"step_{step:05d}", "model.safetensors")
    words = ("log_dir=", "every checkpoint", "damaged", "remove them", "another --log_dir")
    out = assert_refused(copy, capsys, *words)
    assert out.count("damaged, not used") == 2


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_train_state_that_runs_code_is_refused_and_not_run(form, copy, tmp_path, capsys):
    marker = tmp_path / "it ran"
    directory = Path(copy.log_dir) / "step_00004"
    path = directory / "train_state.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"step": RunsCode(marker)}, protocol=2))
    else:
        torch.save({"step": RunsCode(marker)}, path)
    listed = json.loads((directory / "files.json").read_text())
    raw = path.read_bytes()
    listed[path.name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (directory / "files.json").write_text(json.dumps(listed))
    assert checkpoint.find_problem(directory) is None
    assert_refused(copy, capsys, str(path), "remove", str(directory))
    assert not marker.exists()
    loaded = pickle.loads(raw) if form == "pickle" else torch.load(path, weights_only=False)
    loaded["step"].close()
    assert marker.exists(), "the file does not do what it is to show"
