"""A log directory that was copied while it changed: each file of it may be of another instant."""

import random
import shutil
from pathlib import Path

import pytest
from conftest import SMALL, TEXT, assert_one_line, assert_same_end, finish, losses, outcome, start

import train_gpt2
from support import checkpoint
from support.run_log import PROGRESS_TYPES, RunLog, read_rows
from support.run_output import RunOutput


def assert_complete(config, uninterrupted) -> None:
    """The run has the end of the one that was not interrupted, and the time of each step."""
    assert_same_end(config, uninterrupted)
    rows = read_rows(Path(config.log_dir) / "progress.txt", PROGRESS_TYPES)
    assert [step for step, *_ in rows] == list(range(config.max_steps))
    assert [seconds for *_, seconds in rows] == sorted(seconds for *_, seconds in rows)


# -------------------------------------------------------------------------------------------------
# One file of another instant


def cut(path: Path, lines: float) -> None:
    """Leaves so many lines of a file: half a line is one that was being written."""
    all_lines = path.read_text().splitlines(keepends=True)
    complete, part = divmod(lines, 1)
    more = all_lines[int(complete)]
    path.write_text("".join(all_lines[: int(complete)]) + more[: int(len(more) * part)])


LATE_LOGS = {
    "log.txt is older than the checkpoint": lambda d: cut(d / "log.txt", 3),
    "log.txt ends within a line": lambda d: cut(d / "log.txt", 4.5),
    "log.txt is missing": lambda d: (d / "log.txt").unlink(),
    "progress.txt is older": lambda d: cut(d / "progress.txt", 1.5),
    "progress.txt is missing": lambda d: (d / "progress.txt").unlink(),
}


@pytest.mark.parametrize("case", LATE_LOGS)
def test_a_log_that_is_older_than_the_checkpoint_is_completed_from_it(case, copy, stopped, capsys):
    LATE_LOGS[case](Path(copy.log_dir))
    code, out, _ = outcome(copy, capsys)
    assert code == 0 and "continuing from" in out and "step_00004" in out
    assert_complete(copy, stopped)


@pytest.mark.parametrize("case", [case for case in LATE_LOGS if "log.txt" in case])
def test_a_log_older_than_run_json_does_not_pass_for_that_of_a_finished_run(
    case, copy, stopped, capsys
):
    assert outcome(copy, capsys)[0] == 0
    LATE_LOGS[case](Path(copy.log_dir))
    assert "this run is finished" not in outcome(copy, capsys)[1]
    assert_complete(copy, stopped)
    assert "this run is finished" in outcome(copy, capsys)[1]


def test_a_log_of_another_history_is_replaced_and_other_lines_stay(tmp_path):
    """On GPUs a repeated step has another loss: the log must be the one of the checkpoint."""
    log = RunLog(tmp_path)
    log.saved = {"log.txt": "0 train 3.0\n1 train 2.0\n", "progress.txt": "0 9 1.0\n1 18 2.0\n"}
    log.path.write_text("0 train 3.0\n0 mine 1\n1 train 2.0\n2 train 1.0\n")
    log.remove_steps(2)
    assert log.path.read_text() == "0 train 3.0\n0 mine 1\n1 train 2.0\n"
    assert log.progress_path.read_text() == log.saved["progress.txt"] and log.seconds == 2.0
    log.path.write_text("0 train 3.0\n1 train 2.1\n2 train 1.1\n")
    log.remove_steps(2)
    assert log.path.read_text() == log.saved["log.txt"]


def test_a_checkpoint_of_an_earlier_version_has_no_copy_of_the_log(copy, stopped, monkeypatch):
    monkeypatch.setattr(RunLog, "texts", lambda log: {})
    shutil.rmtree(copy.log_dir)
    assert train_gpt2.train(copy) == 0
    monkeypatch.undo()
    copy.max_steps = 6
    assert train_gpt2.train(copy) == 0
    assert list(losses(copy)) == [0, 1, 2, 3, 4, 5]


def test_what_a_writer_was_writing_is_removed(copy, stopped, capsys):
    """Its temporary files and directories, the trial of its start, and its lock."""
    log_dir = Path(copy.log_dir)
    names = {path.name for path in log_dir.iterdir()}
    for name in (".trial", "..trial.partial", ".step_00002.partial", ".step_00006.partial"):
        shutil.copytree(log_dir / "step_00002", log_dir / name)
    for name in (".run.json.partial", ".log.txt.partial", ".progress.txt.partial", ".lock.json"):
        (log_dir / name).write_text("{")
    assert outcome(copy, capsys)[0] == 0
    assert {path.name for path in log_dir.iterdir()} == names
    assert_complete(copy, stopped)


@pytest.mark.parametrize("first", [0, 1, -1])
def test_a_checkpoint_that_was_copied_or_removed_in_part_is_not_used(first, copy, stopped, capsys):
    newest = Path(copy.log_dir) / "step_00004"
    files = sorted(newest.iterdir())
    for path in [files[first]] if first <= 0 else files[first:]:
        path.unlink()
    code, out, _ = outcome(copy, capsys)
    assert code == 0 and f"{newest}: damaged, not used" in out
    assert_complete(copy, stopped)


def test_a_partial_checkpoint_is_not_kept_as_the_best_one(tmp_path):
    """It would stay for ever, and a complete one would be removed in its place."""
    settings = {"after_checkpoint": ""}
    output = RunOutput(tmp_path, True, None, {"settings": settings})
    output.log.val_losses = {2: 0.5, 4: 3.0, 6: 4.0}
    for step in (2, 4, 6):
        directory = checkpoint.step_directory(tmp_path, step)
        checkpoint.write_directory(directory, lambda d: (d / "model").write_text("weights"))
    assert output.find_best() == 2
    (tmp_path / "step_00002" / "model").unlink()
    assert output.find_best() == 4


# -------------------------------------------------------------------------------------------------
# Each file of any instant


@pytest.fixture(scope="module")
def instants(tmp_path_factory):
    """(a run, [its log directory before each change of a file in it, and at its end])."""
    directory = tmp_path_factory.mktemp("instants")
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    config = train_gpt2.Config(
        data=str(directory / "text.txt"), log_dir=str(directory / "log"),
        **SMALL | dict(max_steps=8, checkpoint_every=2, val_every=3, device="cpu"),
    )  # fmt: skip
    finish(start(config, harm=f"copy_at_events {directory / 'at'}"))
    found = [*sorted((directory / "at").iterdir()), directory / "log"]
    assert len(found) > 50
    return config, found


def copy_files(instants: list[Path], to: Path, generator, missing: float) -> None:
    """Copies each file as it was at one of the instants, or not at all.

    So copies any program, in any order, with any number of threads, if it may be interrupted.
    missing: the share of files that it does not reach
    """
    files = {path.relative_to(d) for d in instants for path in d.rglob("*") if path.is_file()}
    at_once = {file.parts[0]: generator.choice(instants) for file in files}  # most of a checkpoint
    for file in sorted(files):
        instant = at_once[file.parts[0]] if generator.random() < 0.97 else None
        source = (instant or generator.choice(instants)) / file
        if source.is_file() and generator.random() >= missing:
            (to / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, to / file)


def copy_entries(instants: list[Path], to: Path, generator) -> None:
    """Copies entry by entry at later and later instants, what is there at the first of them.

    So does a single thread: `rsync` in the order of the names, `cp -r` in that of the directory.
    """
    names = sorted(path.name for path in instants[0].iterdir())
    if generator.random() < 0.5:
        generator.shuffle(names)
    times = sorted(generator.choices(range(len(instants)), k=len(names)))
    for name, time in zip(names, times):
        source = instants[time] / name
        if source.is_dir():
            shutil.copytree(source, to / name, dirs_exist_ok=True)
        elif source.exists():
            shutil.copy(source, to / name)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["by files", "by entries"])
@pytest.mark.parametrize("seed", range(10))
def test_a_copy_of_any_instants_is_continued_or_refused(seed, how, instants, tmp_path, capsys):
    """Half of the copies are made over an earlier one; some are interrupted."""
    uninterrupted, states = instants
    continued = []
    for number in range(12):
        generator = random.Random(1000 * seed + number)
        to = tmp_path / str(number)
        to.mkdir()
        first, last = sorted(generator.sample(range(15, len(states)), 2))
        if generator.random() < 0.5:
            shutil.copytree(states[generator.randrange(first)], to, dirs_exist_ok=True)
        if how == "by files":
            last = min(last, first + generator.choice((3, 10, 100)))
            missing = generator.choice((0, 0, 0.05))
            copy_files(states[first : last + 1], to, generator, missing)
        else:
            copy_entries(states[first : last + 1], to, generator)
        config = train_gpt2.Config(**vars(uninterrupted) | dict(log_dir=str(to)))
        code, out, err = outcome(config, capsys)
        if code == 0:
            assert_complete(config, uninterrupted)
            continued.append("continuing from" in out or "is finished" in out)
        else:
            assert code == 2
            assert_one_line(err, ["log_dir="])
        shutil.rmtree(to)
    assert len(continued) >= 9 and sum(continued) >= 3
