"""TensorBoard and Weights & Biases: what they receive, also across a kill."""

import json
import signal
import struct
from pathlib import Path

import pytest
from conftest import losses, read_log, requires, start

import train_gpt2
from support import run_log, trackers, validate_settings
from support.errors import SettingError, UserError

EVALUATED = dict(
    max_steps=8, checkpoint_every=3, val_every=4, val_tokens=320, sample_every=4, sample_tokens=3,
    num_samples=1,
)  # fmt: skip


def kill_and_continue(config, step: int, **variables) -> None:
    """Kills a run when it begins `step`, and starts it again until its end."""
    process = start(config, harm=f"signal_at_step SIGKILL 0 {step}", **variables)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == -signal.SIGKILL, output
    process = start(config, **variables)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "continuing from" in output, output


def read_values(config) -> dict[str, dict[int, float]]:
    """{stream: {step: value}} of log.txt."""
    return {stream: losses(config, stream) for stream in ("train", "val")}


@pytest.mark.faults
@requires("tensorboard")
def test_tensorboard_holds_each_value_once_across_a_kill(small):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small(**EVALUATED, tracker="tensorboard")
    kill_and_continue(config, 5)
    found = EventAccumulator(str(Path(config.log_dir) / "tensorboard"))
    found.Reload()
    scalars = {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }
    validation = {"val_loss", "val_bpb", "val_perplexity"}
    assert set(scalars) == {"loss", "lr", "norm", "tok_per_sec"} | validation
    for stream, tag in (("train", "loss"), ("val", "val_loss")):
        assert [step for step, _ in scalars[tag]] == list(read_values(config)[stream])
        assert dict(scalars[tag]) == pytest.approx(read_values(config)[stream], abs=1e-6)
    assert [step for step, _ in scalars["lr"]] == list(range(8))
    assert dict(scalars["lr"])[3] == pytest.approx(train_gpt2.get_lr(3, config))
    texts = found.Tensors("sample_0/text_summary")
    assert [event.step for event in texts] == [4, 4, 8]  # the run repeated step 4
    assert config.sample_prompt.encode() in texts[0].tensor_proto.string_val[0]


def read_rows(directory: Path) -> list[dict]:
    """The rows in the file of an offline run of wandb, oldest first.

    The file has LevelDB's log format: blocks of 32 KiB, in which each piece of a record has a
    checksum, a length and a kind (full, first, middle, last), after a header of 7 bytes.
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = directory.glob("*.wandb")
    rows, raw, at, record = [], path.read_bytes(), 7, b""
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
@requires("wandb")
def test_wandb_continues_a_killed_run_under_its_id_and_keeps_the_key_secret(small):
    """The rows of the killed run are those of log.txt, as far as wandb had written them."""
    config = small(**EVALUATED, tracker="wandb")
    key = "0123456789abcdef" * 2 + "01234567"
    kill_and_continue(config, 5, WANDB_MODE="offline", WANDB_API_KEY=key)
    log_dir = Path(config.log_dir)
    killed, continued = map(read_rows, sorted(log_dir.glob("wandb/offline-run-*")))
    assert [row["_step"] for row in killed] == [*range(5)][: len(killed)]
    assert [row["_step"] for row in continued] == [*range(3, 9)]  # from the checkpoint on
    for stream, name in (("train", "loss"), ("val", "val_loss")):
        values = {row["_step"]: row[name] for row in killed + continued if name in row}
        logged = read_values(config)[stream]
        assert values == pytest.approx({step: logged[step] for step in values}, abs=1e-6)
        assert set(logged) - set(range(3)) <= set(values)
    ids = {path.name.split("-")[-1] for path in log_dir.glob("wandb/offline-run-*")}
    assert ids == {(log_dir / "wandb_id.txt").read_text().strip()}
    files = [path for path in log_dir.rglob("*") if path.is_file()]
    assert not any(key.encode() in path.read_bytes() for path in files)


@requires("wandb")
def test_wandb_has_all_values_of_a_step_in_one_row(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = trackers.WeightsAndBiases(tmp_path, {"T": 32}, 0)
    tracker.log(3, dict(val_loss=4.5))
    tracker.log_text(3, "sample_0", "a < b")
    tracker.log(3, dict(loss=4.0, lr=0.1))
    tracker.log(4, dict(loss=3.5))
    tracker.log(5, dict(val_loss=3.25))  # the last row has no training step
    tracker.close()
    wandb.teardown()  # returns when the file is complete
    (directory,) = tmp_path.glob("wandb/offline-run-*")
    rows = [{k: row[k] for k in ("_step", "loss", "lr", "val_loss") if k in row}
            for row in read_rows(directory)]  # fmt: skip
    assert rows == [
        dict(_step=3, loss=4.0, lr=0.1, val_loss=4.5),
        dict(_step=4, loss=3.5),
        dict(_step=5, val_loss=3.25),
    ]
    (text,) = directory.rglob("*.html")
    assert "<pre>a &lt; b</pre>" in text.read_text()


@requires("wandb")
def test_wandb_gets_no_step_again_that_it_has(tmp_path, monkeypatch):
    import wandb

    class Resumed:
        starting_step = 5

        def log(self, values, step):
            sent.append((step, values))

    sent = []
    monkeypatch.setattr(wandb, "init", lambda **settings: Resumed())
    tracker = trackers.WeightsAndBiases(tmp_path, {}, 3)
    for step in range(3, 7):
        tracker.log(step, dict(loss=1.0 * step))
    assert sent == [(5, dict(loss=5.0)), (6, dict(loss=6.0))]


@requires("wandb")
def test_an_id_that_cannot_be_written_is_one_error(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_log, "write_text", refuse)
    with pytest.raises(UserError, match="wandb_id.txt: cannot be written .No space left"):
        trackers.WeightsAndBiases(tmp_path, {}, 0)


@requires("wandb")
@pytest.mark.parametrize("damage", [b"\xff\xfe", None])
def test_an_id_that_cannot_be_read_is_one_error(tmp_path, damage):
    path = tmp_path / "wandb_id.txt"
    if damage is None:
        path.mkdir()
    else:
        path.write_bytes(damage)
    with pytest.raises(SettingError, match="wandb_id.txt: cannot be read .*; remove it"):
        trackers.WeightsAndBiases(tmp_path, {}, 0)


@pytest.mark.parametrize(
    "tracker", [pytest.param(name, marks=requires(name)) for name in ("tensorboard", "wandb")]
)
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
        validate_settings.validate(vars(small(tracker="tensorbord")), 1024)
    monkeypatch.setattr(trackers, "TRACKERS", ("a_package_that_is_not_there",))
    config = small(tracker="a_package_that_is_not_there")
    with pytest.raises(SettingError, match="pip install a_package_that_is_not_there"):
        validate_settings.validate(vars(config), 1024)
    assert not Path(config.log_dir).exists()
