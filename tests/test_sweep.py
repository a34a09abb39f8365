"""benchmarks/sweep.py: what it trains, where it continues, and the figures of its table."""

import contextlib
import io
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
from conftest import SMALL, assert_one_line, read_log

import train_gpt2
from support.errors import SettingError, UserError

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import sweep  # noqa: E402


@pytest.fixture
def runs_of(tmp_path, text_file, monkeypatch):
    """A function: more arguments -> what a sweep of two settings and two seeds prints.

    The trainer runs in this process; `trained` has the log directories that it trained in.
    """
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    content = {
        "common": SMALL | dict(data=str(text_file), val_every=4),
        "runs": {"slow": {"max_lr": 1e-4, "min_lr": 1e-5}, "fast": {"max_lr": 1e-2}},
        "seeds": [1, 2],
        "report_data": str(other),
    }
    file, trained = tmp_path / "sweep.json", []
    file.write_text(json.dumps(content), encoding="utf-8")

    def call_trainer(settings):
        arguments = ["gpt2", *(f"--{name}={value}" for name, value in settings.items())]
        config, output = train_gpt2.parse_config(arguments), io.StringIO()
        before = read_log(config) if Path(config.log_dir, "log.txt").exists() else None
        with contextlib.redirect_stdout(output):
            assert train_gpt2.train(config) == 0
        if read_log(config) != before:
            trained.append(str(Path(config.log_dir).relative_to(tmp_path / "out")))
        return output.getvalue()

    def call(*arguments) -> str:
        argv = ["sweep.py", str(file), f"--out={tmp_path / 'out'}", *arguments]
        output = io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(output):
            patch.setattr(sys, "argv", argv)
            patch.setattr(sweep, "call_trainer", call_trainer)
            assert sweep.main() == 0
        return output.getvalue()

    call.trained, call.out = trained, tmp_path / "out"
    return call


def loss_of(out: Path, name: str, seed: int) -> float:
    return json.loads((out / name / str(seed) / "run.json").read_text())["result"]["val_loss"]


def test_all_runs_are_trained_once_with_the_first_seed_first(runs_of):
    first = runs_of()
    assert runs_of.trained == ["slow/1", "fast/1", "slow/2", "fast/2"]
    assert runs_of() == first and len(runs_of.trained) == 4
    slow, fast = (
        [loss_of(runs_of.out, name, seed) for seed in (1, 2)] for name in ("slow", "fast")
    )
    assert fast[0] < slow[0]
    error = math.hypot(*(statistics.stdev(values) / math.sqrt(2) for values in (slow, fast)))
    difference = statistics.mean(fast) - statistics.mean(slow)
    assert first.splitlines()[-1] == (
        f"| fast | {statistics.mean(fast):.4f} | {statistics.stdev(fast):.4f} | 2 | "
        f"{difference:+.4f} | {error:.4f} |"
    )


def test_a_report_is_of_other_text_and_is_kept(runs_of):
    tuning, reported = runs_of("--only=fast"), runs_of("--only=fast", "--report")
    assert runs_of.trained == ["fast/1", "fast/2"]
    assert tuning.splitlines()[-1].split("|")[2] != reported.splitlines()[-1].split("|")[2]
    kept = runs_of.out / "fast" / "1" / "report.json"
    (loss,) = json.loads(kept.read_text()).values()
    assert f"fast, seed 1: {loss:.4f}" in reported
    kept.write_text(kept.read_text().replace(str(loss), "9.5"))
    assert "fast, seed 1: 9.5000" in runs_of("--only=fast", "--report")


def test_a_continued_run_is_reported_again(runs_of, tmp_path):
    """With more steps, or with more tokens of the text."""
    file = tmp_path / "sweep.json"
    reported = [runs_of("--only=fast", "--report")]
    for change in (dict(max_steps=6), dict(val_tokens=640)):
        content = json.loads(file.read_text())
        content["common"] |= change
        file.write_text(json.dumps(content))
        reported.append(runs_of("--only=fast", "--report"))
    assert len({text.splitlines()[-1] for text in reported}) == 3


def test_a_trainer_that_fails_is_named(tmp_path):
    settings = {"data": str(tmp_path / "missing.txt"), "log_dir": str(tmp_path / "log")}
    with pytest.raises(UserError, match="code 2") as error:
        sweep.call_trainer(settings)
    assert_one_line(f"error: {error.value}\n", (settings["log_dir"], "missing.txt"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"runs": {}}', '{"other": 1}', "null"])
def test_a_file_that_is_not_a_sweep_is_refused(tmp_path, content):
    file = tmp_path / "sweep.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="sweep.json: not a sweep"):
        sweep.read_sweep(file)


def test_two_dashes_are_not_a_directory(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "sweep.json", "--out=--"])
    with pytest.raises(SettingError, match="--out=--: -- is not a value"):
        sweep.main()


def test_the_settings_of_the_comparison_in_the_repository_are_valid():
    """benchmarks/fewer_tokens.json, whose command is in BENCHMARKS.md."""
    content = sweep.read_sweep(sweep.ROOT / "benchmarks" / "fewer_tokens.json")
    assert len(content.seeds) == 3 and content.report_data != content.common["data"]
    for settings in content.runs.values():
        arguments = [f"--{name}={value}" for name, value in (content.common | settings).items()]
        train_gpt2.parse_config(["gpt2", *arguments])
