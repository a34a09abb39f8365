"""What a run shows: TensorBoard, Weights & Biases, the picture, the progress file, the console."""

import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    assert_same_end,
    command_line,
    environment,
    limit_files,
    losses,
    read_log,
    start,
)  # fmt: skip

import train_gpt2
from support import run_log, trackers
from support.errors import SettingError

EVALUATED = dict(
    max_steps=8, checkpoint_every=3, val_every=4, val_tokens=320, sample_every=4, sample_tokens=3,
    num_samples=1,
)  # fmt: skip


def killed_and_continued(config, step: int, **variables) -> None:
    """A run killed when it begins `step`, and started again to its end."""
    process = start(config, harm=f"signal_at_step SIGKILL 0 {step}", **variables)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == -signal.SIGKILL, output
    process = start(config, **variables)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "continuing from" in output, output


def logged(config) -> dict[str, dict[int, float]]:
    """{stream: {step: value}} of log.txt."""
    return {stream: losses(config, stream) for stream in ("train", "val")}


@pytest.mark.faults
def test_tensorboard_holds_each_value_once_across_a_kill(small):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small(**EVALUATED, tracker="tensorboard")
    killed_and_continued(config, 5)
    found = EventAccumulator(str(Path(config.log_dir) / "tensorboard"))
    found.Reload()
    scalars = {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }
    assert set(scalars) == {"loss", "lr", "norm", "tok_per_sec", "val_loss"}
    for stream, tag in (("train", "loss"), ("val", "val_loss")):
        assert [step for step, _ in scalars[tag]] == list(logged(config)[stream])
        assert dict(scalars[tag]) == pytest.approx(logged(config)[stream], abs=1e-6)
    assert [step for step, _ in scalars["lr"]] == list(range(8))
    assert dict(scalars["lr"])[3] == pytest.approx(train_gpt2.get_lr(3, config))
    texts = found.Tensors("sample_0/text_summary")
    assert [event.step for event in texts] == [4, 8]
    assert config.sample_prompt.encode() in texts[0].tensor_proto.string_val[0]


def history(log_dir: Path) -> list[dict]:
    """The rows in the files of offline runs of wandb, oldest first.

    They are records as LevelDB keeps its log: blocks of 32 KiB, in which each piece has a checksum,
    a length and a kind (whole, first, middle, last), after a header of 7 bytes.
    """
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted(log_dir.glob("wandb/offline-run-*/*.wandb")):
        raw, at, record = path.read_bytes(), 7, b""
        while at + 7 <= len(raw):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", raw, at)
            piece, at = raw[at + 7 : at + 7 + length], at + 7 + length
            record = piece if kind in (1, 2) else record + piece
            if kind in (1, 4):
                message = wandb_internal_pb2.Record.FromString(record)
                items = message.history.item
                if items:
                    rows.append(
                        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                    )
    return rows


@pytest.mark.faults
def test_wandb_holds_each_value_once_across_a_kill_and_keeps_its_key_to_itself(small):
    config = small(**EVALUATED, tracker="wandb")
    key = "0123456789abcdef" * 2 + "01234567"
    killed_and_continued(config, 5, WANDB_MODE="offline", WANDB_API_KEY=key)
    log_dir = Path(config.log_dir)
    rows = history(log_dir)
    found = {
        stream: {row["_step"]: row[name] for row in rows if name in row}
        for stream, name in (("train", "loss"), ("val", "val_loss"))
    }
    assert [row["_step"] for row in rows] == [*range(9)]  # so each once
    for stream, values in found.items():
        assert values == pytest.approx(logged(config)[stream], abs=1e-6)
    ids = {path.name.split("-")[-1] for path in log_dir.glob("wandb/offline-run-*")}
    assert ids == {(log_dir / "wandb_id.txt").read_text().strip()}
    files = [path for path in log_dir.rglob("*") if path.is_file()]
    assert not any(key.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_changes_nothing_else(small, tmp_path, monkeypatch, tracker):
    monkeypatch.setenv("WANDB_MODE", "offline")
    plain = small(log_dir=str(tmp_path / "plain"))
    train_gpt2.train(plain)
    tracked = small(log_dir=str(tmp_path / "tracked"), tracker=tracker)
    train_gpt2.train(tracked)
    a, b = (json.loads(Path(c.log_dir, "run.json").read_text()) for c in (plain, tracked))
    assert a["settings"] | dict(tracker="", log_dir="") == b["settings"] | dict(
        tracker="", log_dir=""
    )
    assert read_log(plain) == read_log(tracked)
    weights = [Path(c.log_dir, "step_00004", "model.safetensors") for c in (plain, tracked)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_tracker_that_is_not_there_is_refused_before_anything_is_written(small, monkeypatch):
    with pytest.raises(SettingError, match="tracker='tensorbord': must be"):
        train_gpt2.check_config(small(tracker="tensorbord"))
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "a_package_that_is_not_there")
    config = small(tracker="wandb")
    with pytest.raises(SettingError, match="pip install a_package_that_is_not_there"):
        train_gpt2.check_config(config)
    assert not Path(config.log_dir).exists()


# -------------------------------------------------------------------------------------------------
# progress.txt and curves.png


def test_progress_tells_tokens_and_seconds_and_continues_after_a_stop(small):
    config = small(max_steps=4)
    train_gpt2.train(config)
    path = Path(config.log_dir) / "progress.txt"
    first = path.read_text()
    rows = [line.split() for line in first.splitlines()]
    assert [(int(step), int(tokens)) for step, tokens, _ in rows] == [
        (step, 128 * (step + 1)) for step in range(4)
    ]
    seconds = [float(s) for *_, s in rows]
    assert all(a < b for a, b in zip([0.0, *seconds], seconds))
    path.write_text(first + "4 640 99.0\n5 7")  # of a run that was killed in the step after
    train_gpt2.train(small(max_steps=6))
    rows = [line.split() for line in path.read_text().splitlines()]
    assert path.read_text().startswith(first) and [int(row[0]) for row in rows] == list(range(6))
    assert seconds[-1] < float(rows[4][2]) < float(rows[5][2]) < 99


def test_the_picture_is_drawn_at_each_evaluation_and_whole_at_the_end(small, monkeypatch):
    drawn = []
    original = run_log.Curves.refresh

    def refresh(self):
        drawn.append(train_log.read_text().count("\n"))
        original(self)

    monkeypatch.setattr(run_log.Curves, "refresh", refresh)
    config = small(max_steps=6, val_every=3, val_tokens=320, curves=True)
    train_log = Path(config.log_dir) / "log.txt"
    train_gpt2.train(config)
    assert drawn == [1, 5, 9]
    picture = (Path(config.log_dir) / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and picture.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize(
    "how", ["the disk is full", "plot.py fails", "it hangs", "no process can be started"]
)
def test_a_picture_that_cannot_be_drawn_stops_no_run(small, tmp_path, monkeypatch, capsys, how):
    original = subprocess.Popen

    def popen(command, **rest):
        if command[1].endswith("plot.py"):
            if how == "no process can be started":
                raise OSError(12, "Cannot allocate memory")
            if how == "the disk is full":
                return original(command, **rest, preexec_fn=limit_files(1000))
            hang = "import time; time.sleep(60)"
            code = hang if how == "it hangs" else "raise SystemExit('a reason')"
            command = [sys.executable, "-c", code]
        return original(command, **rest)

    monkeypatch.setattr(subprocess, "Popen", popen)
    wait, most = run_log.Curves.wait, 0.5 if how == "it hangs" else 60
    monkeypatch.setattr(run_log.Curves, "wait", lambda self, s: wait(self, min(s, most)))
    config = small(val_every=2, val_tokens=320, curves=True)
    assert train_gpt2.train(config) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "curves.png" in line]
    assert len(told) == (0 if how == "it hangs" else 1)
    if how == "the disk is full":
        assert "cannot be written (File too large)" in told[0]
    assert all("not drawn" in line and "the run goes on" in line for line in told)


# -------------------------------------------------------------------------------------------------
# The console


def lines_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r"step +\d+ \| loss", line)]


def test_the_lines_of_steps_are_of_one_width(small, capsys):
    train_gpt2.train(small(max_steps=12, max_lr=1.0, warmup_steps=8, gpu_hour_usd=3600.0))
    output = capsys.readouterr().out
    assert len(lines_of(output)) == 12 and len({len(line) for line in lines_of(output)}) == 1
    estimate = r"by the first ten steps the rest takes 0s, 0\.\d\d USD, and evaluations on top"
    assert len(re.findall(estimate, output)) == 1


def test_the_price_is_that_of_all_gpus(small, capsys):
    config = small(max_steps=2, gpu_hour_usd=2.0)
    run, _ = train_gpt2.open_run(config, train_gpt2.set_up_processes(config))
    run.processes.world_size = 8
    report = train_gpt2.Report(run, train_gpt2.StopSignals(run.processes))
    report.tell_price(3 * 3600)
    assert "the rest takes 3h00m, 48.00 USD" in capsys.readouterr().out


def on_a_terminal(command: list[str], **variables) -> str:
    """What a command shows on a terminal of 100 columns."""
    master, slave = pty.openpty()
    subprocess.run(["stty", "cols", "100", "rows", "30"], stdin=slave, check=True)
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment(**variables)
    )
    os.close(slave)
    shown, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the last writer is gone
            break
        shown += piece
    assert process.wait(timeout=10) == 0, shown.decode()
    return shown.decode()


def test_a_terminal_has_a_bar_and_bold_lines_and_a_file_has_neither(small, tmp_path, capsys):
    settings = dict(val_every=2, val_tokens=320)
    shown_run = small(log_dir=str(tmp_path / "shown"), **settings)
    command = [sys.executable, str(ROOT / "train_gpt2.py"), *command_line(shown_run)]
    shown = on_a_terminal(command)
    assert "\x1b[1mstep     2 | validation loss" in shown and "step/s" in shown
    assert re.search(r"\d+%\|.*\| \d/4 ", shown)
    quiet = small(log_dir=str(tmp_path / "quiet"), **settings)
    train_gpt2.train(quiet)
    output, errors = capsys.readouterr()
    assert not set("\x1b\r") & set(output + errors) and "step/s" not in output + errors
    assert len(lines_of(output)) == 4
    assert_same_end(shown_run, quiet)
