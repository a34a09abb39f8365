"""plot.py: runs that differ only in their seed, and the table of results. The oracle is numpy."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import read_log
from matplotlib.colors import to_rgb
from test_plot import NANOGPT, draw, find_line, legend_names, line, run, stream, write_run

import plot
import train_gpt2


def write_seed(directory: Path, seed: int, log: str, progress=None, others=None, **settings) -> str:
    """Creates the log directory of a run of recipe tiny; others: content of run.json."""
    settings = train_gpt2.RECIPES["tiny"] | dict(seed=seed, log_dir=str(directory)) | settings
    settings = vars(train_gpt2.Config(**settings))
    record = dict(settings=settings, data="a hash", dtype="bfloat16", commit="1f", changes=None)
    log_dir = write_run(directory, log, progress)
    (directory / "run.json").write_text(json.dumps(record | (others or {})))
    return log_dir


def names_of(*logs) -> list[str]:
    """The names of the lines that these runs form."""
    groups = plot.group_seeds([plot.read_run(str(log)) for log in logs])
    return [group.name.replace(str(Path(logs[0]).parent) + "/", "") for group in groups]


def table(*logs) -> dict[str, dict[str, str]]:
    """{first cell: {name: cell}} of the table of these runs."""
    text = plot.format_table(plot.group_seeds([plot.read_run(str(log)) for log in logs]))
    assert len({len(line) for line in text.splitlines()}) == 1
    head, *rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    rows = [[row[0], *[""] * (len(head) - len(row)), *row[1:]] for row in rows]  # n of a difference
    return {Path(row[0]).name: dict(zip(head[1:], row[1:])) for row in rows}


def test_seeds_are_one_line_with_their_mean_and_a_band(tmp_path):
    """Of 3 runs of 200 steps and 5 validations, one of which lacks a value at two steps."""
    random = np.random.default_rng(0)
    train, val = random.normal(5, 1, (3, 200)), random.normal(6, 1, (3, 5))
    seconds = np.cumsum(random.uniform(1, 2, (3, 200)), axis=1)
    logs = []
    for i in range(3):
        losses = dict(enumerate(train[i])) | ({7: "nan"} if i == 1 else {})
        vals = dict(zip(range(0, 250, 50), val[i])) | ({100: "inf"} if i == 1 else {})
        progress = "".join(f"{s} {(s + 1) * 2048} {t}\n" for s, t in enumerate(seconds[i]))
        log = stream("train", losses) + stream("val", vals) + stream("hella", {200: 0.25 + i / 100})
        logs.append(write_seed(tmp_path / f"a{i}", i, log, progress))
    alone = write_seed(tmp_path / "b", 0, stream("val", {0: 9, 200: 8}), max_lr=1)
    rows, figure = draw(*logs, alone)
    assert legend_names(figure)[0] == "a0 (3 seeds)"
    (loss, time), (hella, _) = rows

    val, train = np.delete(val, 2, axis=1), np.delete(train, 7, axis=1)
    tokens = np.array([0, 50, 150, 200]) * 2048
    x, y = line(loss, "a0 (3 seeds) val")
    assert x == tokens.tolist()
    np.testing.assert_allclose(y, val.sum(0) / 3)
    np.testing.assert_allclose(line(loss, "a0 (3 seeds) train")[1], train.sum(0) / 3)
    before = np.append(0, seconds.sum(0) / 3)[[0, 50, 150, 200]]
    np.testing.assert_allclose(line(time, "a0 (3 seeds) val")[0], before, atol=1e-5)
    assert line(hella, "a0 (3 seeds) hella") == ([200 * 2048], [pytest.approx(0.26)])

    check_band(loss, "a0 (3 seeds) val band", val, tokens / 1e6)
    smoothed = np.array([plot.smooth(y) for y in train])
    check_band(loss, "a0 (3 seeds) train band", smoothed)
    np.testing.assert_allclose(line(loss, "a0 (3 seeds) train mean")[1], smoothed.mean(0))
    assert [band.get_label() for band in loss.collections] == [
        "a0 (3 seeds) train band", "a0 (3 seeds) val band",
    ]  # fmt: skip
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[-1] == "standard deviation of the seeds"


def check_band(axes, label: str, values, x=None) -> None:
    """The band must be the mean -+ the deviation (n - 1) of the values, (runs, n), at these x."""
    (band,) = [one for one in axes.collections if one.get_label() == label]
    deviations = (((values - values.mean(0)) ** 2).sum(0) / (len(values) - 1)) ** 0.5
    (path,) = band.get_paths()
    corners = {tuple(corner) for corner in path.vertices.round(9).tolist()}
    x = find_line(axes, label.replace(" band", "")).get_xdata() if x is None else x
    for sign in (-1, 1):
        edge = zip(x.round(9).tolist(), (values.mean(0) + sign * deviations).round(9).tolist())
        assert corners >= {*edge}
    line_colour = find_line(axes, label.replace(" band", "")).get_color()
    assert to_rgb(line_colour) == tuple(band.get_facecolor()[0, :3])


SAME = dict(B=2, log_dir="x", device="cuda:1", compile=True, tracker="wandb", val_every=7)


@pytest.mark.parametrize(
    "change",
    [
        {"max_lr": 1e-3}, {"max_steps": 301}, {"val_tokens": 1}, {"hellaswag_examples": 3},
        {"dtype": "float32"}, {"data": "other.txt"}, {"total_batch_size": 4096}, {"seed": 0},
        {"init_from": "gpt2"}, {"others": {"data": "other"}}, {"others": {"dtype": "float32"}},
        {"others": {"commit": "2e"}}, {"others": {"changes": "3d"}}, {"log": "0 val 9\n"},
    ],
    ids=str,
)  # fmt: skip
def test_only_equal_runs_with_another_seed_are_one_line(tmp_path, change):
    """The code too: two variants of it, with a few seeds each, have the same settings."""
    log = "0 val 9\n300 val 4\n"
    first = write_seed(tmp_path / "first", 0, log)
    same = write_seed(tmp_path / "same", 1, log, **SAME)
    other = write_seed(tmp_path / "other", **dict(seed=2, log=log) | change)
    assert names_of(first, same) == ["first (2 seeds)"]
    assert names_of(first, other, same) == ["first (2 seeds)", "other"]


def test_runs_without_run_json_and_repeated_seeds_stay_apart(tmp_path):
    theirs = [write_run(tmp_path / f"theirs{i}", NANOGPT) for i in range(2)]
    assert names_of(*theirs, theirs[0]) == ["theirs0", "theirs1", "theirs0"]
    logs = [write_seed(tmp_path / f"{n}{i}", i, "0 val 9\n") for n in "ab" for i in (3, 4)]
    assert names_of(*logs) == ["a3 (2 seeds)", "b3 (2 seeds)"]


def test_settings_that_may_differ_are_those_that_may_change():
    assert plot.MAY_DIFFER - train_gpt2.MAY_CHANGE == {"seed"}
    defining = {"data", "max_steps", "val_tokens", "hellaswag_examples", "dtype"}
    assert not plot.MAY_DIFFER & defining


def test_the_table_has_the_results_of_finished_runs_and_what_others_have_logged(tmp_path):
    result = dict(
        val_loss=3.52, val_bpb=1.25, hellaswag=None, tokens=614400, steps=300, seconds=98.5,
        tokens_per_second=6237.4, peak_memory_mib=951, mfu=None,
    )  # fmt: skip
    log = stream("train", {0: 9, 299: 5}) + "0 val 9.9\n300 val 3.6\n"
    done = write_seed(tmp_path / "done", 1, log, others={"result": result})
    begun = write_seed(tmp_path / "begun", 1, NANOGPT.replace("250", "150") + "150 val_b 7\n")
    assert table(done, begun) == {
        "done": dict(n="1", val_loss="3.5200", val_bpb="1.2500", tokens="614,400", steps="300",
                     seconds="98.5000", tokens_per_second="6,237", peak_memory_mib="951",
                     hellaswag="-", val_b_loss="-"),
        "begun": dict(n="1", val_loss="5.9000", val_bpb="-", tokens="-", steps="150", seconds="-",
                      tokens_per_second="-", peak_memory_mib="-", hellaswag="0.2500",
                      val_b_loss="7"),
    }  # fmt: skip
    only_train = write_seed(tmp_path / "train", 1, stream("train", {0: 9, 1: 8}))
    assert table(only_train) == {"train": dict(n="1", steps="2")}


def test_two_groups_of_seeds_are_compared(tmp_path):
    """Means, standard deviations, and Welch's standard error of the difference, by numpy."""
    random = np.random.default_rng(1)
    values = {"a": random.normal(3.5, 0.01, 3), "b": random.normal(3.45, 0.03, 5)}
    logs = {name: [] for name in values}
    for name, losses in values.items():
        for seed, loss in enumerate(losses):
            result = dict(val_loss=loss, tokens=614400, steps=300, seconds=100 + 50 * loss)
            log = f"0 val 9\n300 val {loss}\n"
            more = dict(others={"result": result}, max_lr=dict(a=1e-3, b=3e-3)[name])
            logs[name].append(write_seed(tmp_path / f"{name}{seed}", seed, log, **more))
    rows = table(*logs["a"], *logs["b"])
    assert [*rows] == ["a0 (3 seeds)", "b0 (5 seeds)", "second - first"]
    for row, losses in zip(rows.values(), values.values()):
        assert row["n"] == str(len(losses)) and row["tokens"] == "614,400"
        assert row["val_loss"] == f"{np.mean(losses):.4f} +- {np.std(losses, ddof=1):.4f}"
    a, b = values.values()
    error = np.sqrt(np.var(a, ddof=1) / 3 + np.var(b, ddof=1) / 5)
    difference = rows["second - first"]
    assert difference["val_loss"] == f"{np.mean(b) - np.mean(a):.4f} +- {error:.4f}"
    assert difference["seconds"] == f"{50 * (np.mean(b) - np.mean(a)):.4f} +- {50 * error:.4f}"
    assert difference["tokens"] == "0" and difference["n"] == ""
    single = write_seed(tmp_path / "c", 1, "0 val 9\n", max_lr=1)
    assert "second - first" in table(*logs["a"], single, *logs["b"])
    assert "second - first" not in table(*logs["a"], single)
    third = [write_seed(tmp_path / f"d{i}", i, "0 val 9\n", max_lr=2) for i in range(2)]
    assert "second - first" not in table(*logs["a"], *logs["b"], *third)


def test_runs_of_the_trainer_with_two_seeds_are_one_line(small, tmp_path, capsys):
    losses = []
    for seed in (1, 2):
        config = small(seed=seed, val_every=4, log_dir=str(tmp_path / f"log{seed}"), B=seed)
        assert train_gpt2.train(config) == 0
        losses.append(float(read_log(config)[-1].removeprefix("4 val ")))
    capsys.readouterr()
    code, out, _ = run(capsys, tmp_path / "log1", tmp_path / "log2")
    assert code == 0 and out.startswith(f"{tmp_path}/log1/curves.png: {tmp_path}/log1 (2 seeds)\n")
    assert f"{np.mean(losses):.4f} +- {np.std(losses, ddof=1):.4f}" in out
