"""plot.py: the points, lines, texts and limits of the Figure, and the command.

Oracles are the numbers written to the logs, and plain loops. Pixels are not compared.
"""

import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import plot
from support import files
from support.errors import UserError, run_main

NANOGPT = (
    "0 val 10.9504\n0 hella 0.2463\n0 train 10.955267\n1 train 9.5\n250 val 5.9\n250 hella 0.25\n"
)


FINEWEB = '"settings": {"data": "edu_fineweb10B", "total_batch_size": 2048}'


def write_run(directory: Path, log: str, progress: str | None = None, data: str | None = None):
    """Creates the log directory of a run; `data` is the setting in its run.json."""
    directory.mkdir(parents=True)
    (directory / "log.txt").write_text(log)
    if progress is not None:
        (directory / "progress.txt").write_text(progress)
    if data is not None:
        content = {"data": "a hash", "settings": {"data": data, "total_batch_size": 2048}}
        (directory / "run.json").write_text(json.dumps(content))
    return str(directory)


def stream(name: str, values) -> str:
    """The lines of one stream; values: {step: value}."""
    return "".join(f"{step} {name} {value}\n" for step, value in values.items())


def steady(steps: int, batch: int = 2048, seconds: float = 0.5) -> str:
    """A progress.txt of equal steps."""
    return "".join(f"{i} {(i + 1) * batch} {(i + 1) * seconds}\n" for i in range(steps))


def draw(*logs):
    """(rows of axes, Figure) of some runs, which have the names of their directories."""
    runs = [plot.read_run(str(log)) for log in logs]
    for run in runs:
        run.name = run.directory.name
    figure = plot.draw(plot.group_seeds(runs))
    rows = {}
    for axes in figure.axes:
        rows.setdefault(axes.get_subplotspec().rowspan.start, []).append(axes)
    return list(rows.values()), figure


def find_line(axes, label: str):
    """The line of that label."""
    (found,) = (one for one in axes.get_lines() if one.get_label() == label)
    return found


def line(axes, label: str) -> tuple[list, list]:
    """(x in tokens or seconds, y) of the points that the line of that label shows."""
    (x, y), unit = find_line(axes, label).get_data(), 1e6
    if "time" in axes.figure.axes[-1].get_xlabel() and axes in axes.figure.axes[1::2]:
        unit = 60
    shown = np.isfinite(x)
    return (x[shown] * unit).round(6).tolist(), y[shown].tolist()


def labels(axes) -> list[str]:
    return [one.get_label() for one in axes.get_lines() if not one.get_label().startswith("_child")]


def level_lines(axes) -> list[float]:
    """The values of the published lines."""
    return [one.get_ydata()[0] for one in axes.get_lines() if one.get_color() == plot.GREY]


def legend_names(figure) -> list[str]:
    """The names of the runs in the legend, without the kinds of lines."""
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    return names[: names.index("each step")]


def run(capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, output, errors) of the program, in this process."""
    before, sys.argv = sys.argv, ["plot.py", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            run_main(plot.main)
    finally:
        sys.argv = before
    return stop.value.code, *capsys.readouterr()


# -------------------------------------------------------------------------------------------------
# The points


def test_each_point_is_at_what_was_trained_before_its_step(tmp_path):
    """With a growing batch and steps of unequal length: line s - 1 of progress.txt, 0 at step 0."""
    tokens, seconds = [1000, 3000, 6000, 10_000], [0.5, 1.25, 2.5, 4.0]
    progress = "".join(f"{i} {n} {s}\n" for i, (n, s) in enumerate(zip(tokens, seconds)))
    log = stream("train", {0: 10.8, 1: 9, 2: 8, 3: 7}) + stream("val", {0: 10.9, 2: 8.5, 4: 6})
    log += "4 hella 0.26\n"
    rows, _ = draw(write_run(tmp_path / "a", log, progress, "x.txt"))
    (left, right), (hella, hella_time) = rows
    assert line(left, "a train") == ([0, 1000, 3000, 6000], [10.8, 9, 8, 7])
    assert line(left, "a val") == ([0, 3000, 10_000], [10.9, 8.5, 6])
    assert line(right, "a train") == ([0, 0.5, 1.25, 2.5], [10.8, 9, 8, 7])
    assert line(right, "a val") == ([0, 1.25, 4], [10.9, 8.5, 6])
    assert line(hella, "a hella") == ([10_000], [0.26])
    assert line(hella_time, "a hella") == ([4], [0.26])


def test_a_log_of_build_nanogpt_has_its_batch_and_no_time(tmp_path):
    rows, figure = draw(write_run(tmp_path / "theirs", NANOGPT))
    assert [len(row) for row in rows] == [1, 1]
    assert line(rows[0][0], "theirs val") == ([0, 250 * 524_288], [10.9504, 5.9])
    assert line(rows[1][0], "theirs hella") == ([0, 250 * 524_288], [0.2463, 0.25])
    assert legend_names(figure) == ["theirs (524,288 tokens per step assumed)"]


def test_without_progress_the_batch_is_that_of_run_json(tmp_path):
    rows, figure = draw(write_run(tmp_path / "a", NANOGPT, data="input.txt"))
    assert line(rows[0][0], "a val")[0] == [0, 250 * 2048]
    assert legend_names(figure) == ["a (2,048 tokens per step assumed)"]


@pytest.mark.parametrize("rest", ["", "2 6144", "2 6144 1.", "2"])
def test_what_progress_does_not_know_yet_is_left_out(tmp_path, rest):
    """Two lines, and a third that is incomplete, perhaps in the middle of a number."""
    log = stream("train", {i: 10 - i for i in range(6)})
    ((left, right),), _ = draw(write_run(tmp_path / "a", log, steady(2) + rest, "x.txt"))
    assert line(left, "a train") == ([0, 2048, 4096], [10, 9, 8])
    assert line(right, "a train mean")[0] == [0, 0.5, 1]


def test_a_progress_txt_without_a_line_counts_as_missing(tmp_path):
    rows, _ = draw(write_run(tmp_path / "a", NANOGPT, progress="a 1 2\n0 2048", data="x.txt"))
    assert len(rows[0]) == 1


def test_a_run_without_times_has_no_line_over_time(tmp_path):
    ours = write_run(tmp_path / "ours", NANOGPT, steady(251), "edu_fineweb10B")
    rows, _ = draw(ours, write_run(tmp_path / "theirs", NANOGPT))
    for left, right in rows:
        assert {label.split()[0] for label in labels(left)} == {"ours", "theirs"}
        assert {label.split()[0] for label in labels(right)} == {"ours"}


@pytest.mark.parametrize(
    "end", ["", "3 train 7.", "3 tra", "3", "\n\n", "3 train x\n", "3 train 1 2\n"]
)
def test_only_complete_lines_count(tmp_path, end):
    log = stream("train", {0: 10, 1: 9, 2: 8}) + end
    ((axes,),), _ = draw(write_run(tmp_path / "a", log))
    assert line(axes, "a train")[1] == [10, 9, 8]


def test_bytes_that_are_not_text_are_no_error(tmp_path):
    log = Path(write_run(tmp_path / "a", "")) / "log.txt"
    log.write_bytes(b"0 train 10\n\xff\xfe train 3\n1 \xff 3\n1 train 9\n")
    ((axes,), _), _ = draw(log)  # and a panel of the stream \xff
    assert line(axes, "a train")[1] == [10, 9]


def test_what_is_not_finite_is_left_out(tmp_path):
    """Each stream continues after it; the smoothed line is that of the other values."""
    train = {i: 10 - i / 100 for i in range(300)} | {0: "nan", 7: "inf", 150: "-inf"}
    log = stream("train", train) + stream("val", {0: "inf", 100: 5, 200: "nan"})
    ((axes,),), _ = draw(write_run(tmp_path / "a", log + "9 hella nan\n"))
    kept = [value for value in train.values() if not isinstance(value, str)]
    assert line(axes, "a train")[1] == kept and line(axes, "a val")[1] == [5]
    assert np.isfinite(line(axes, "a train mean")[1]).all() and np.isfinite(axes.get_ylim()).all()


def test_a_step_that_was_logged_twice_has_its_last_value(tmp_path):
    log = "0 train 9\n1 train 8\n2 train 7\n1 train 8.5\n"
    ((axes,),), _ = draw(write_run(tmp_path / "a", log))
    assert line(axes, "a train")[1] == [9, 8.5, 7]


@pytest.mark.parametrize(
    "log", ["0 train 9\n", "0 val 9\n", "5 hella 0.3\n", "0 train 9\n0 val 9\n"]
)
@pytest.mark.parametrize("data", ["x.txt", "edu_fineweb10B"])
def test_a_single_point_is_visible(tmp_path, log, data):
    rows, _ = draw(write_run(tmp_path / "a", log, steady(9), data))
    for axes, _ in rows:
        for one in axes.get_lines():
            if one.get_color() != plot.GREY:
                assert one.get_marker() not in ("", "None", None)
                assert axes.get_ylim()[0] < one.get_ydata()[0] < axes.get_ylim()[1]
                assert axes.get_xlim()[0] < one.get_xdata()[0] < axes.get_xlim()[1]


def test_the_last_of_many_points_has_a_marker(tmp_path):
    log = stream("val", {250 * i: 4 for i in range(80)})
    ((axes,),), _ = draw(write_run(tmp_path / "a", log))
    one = find_line(axes, "a val")
    marked = list(range(80))[one.get_markevery()]
    assert len(one.get_xdata()) == 80 and 15 < len(marked) <= 25 and marked[0] == 79


# -------------------------------------------------------------------------------------------------
# Panels, smoothing, limits


def test_a_second_validation_set_is_in_the_panel_of_the_loss_and_other_streams_have_their_own(
    tmp_path,
):
    log = stream("train", {0: 10.8, 1: 9}) + stream("val", {0: 10.9, 2: 8})
    log += stream("val_books", {0: 10.7, 2: 8.5}) + stream("grad_noise", {0: 3, 1: 2})
    log += stream("hella", {2: 0.26}) + "1 note good\n"
    rows, figure = draw(write_run(tmp_path / "a", log, steady(2), "x.txt"))
    assert [row[0].get_ylabel() for row in rows] == [*plot.LABELS.values(), "grad_noise"]
    (loss, _), _, (noise, noise_time) = rows
    assert labels(loss) == ["a train", "a train mean", "a val", "a val_books"]
    assert line(loss, "a val_books") == ([0, 4096], [10.7, 8.5])
    assert line(noise, "a grad_noise") == ([0, 2048], [3, 2])
    assert line(noise_time, "a grad_noise") == ([0, 0.5], [3, 2])
    markers = {name: find_line(loss, f"a {name}").get_marker() for name in ("val", "val_books")}
    assert len(set(markers.values())) == 2
    (legend,) = figure.legends
    kinds = {text.get_text(): handle.get_marker() for text, handle in
             zip(legend.get_texts(), legend.legend_handles)}  # fmt: skip
    assert [*kinds] == ["a", "each step", "mean of 2% of the steps", "val", "val_books"]
    assert markers.items() <= kinds.items()


@pytest.mark.parametrize("n", [1, 2, 49, 99, 100, 301, 1000])
def test_smoothing_is_the_mean_of_2_percent(n):
    values = np.random.default_rng(n).normal(size=n) + np.linspace(9, 3, n)
    half = n // 100
    windows = [values[max(0, i - half) : i + half + 1] for i in range(n)]
    expected = [sum(window) / len(window) for window in windows]
    np.testing.assert_allclose(plot.smooth(values), expected, rtol=1e-10)


def gpt2_losses(steps: int) -> dict[int, float]:
    return {i: 3 + 8 * math.exp(-i / 300) + 0.05 * math.sin(i * i) for i in range(steps)}


def test_a_short_run_is_visible_from_the_start_and_a_long_one_after_the_first_fall(tmp_path):
    losses = gpt2_losses(20_000)
    long = write_run(tmp_path / "long", stream("train", losses), steady(20_000))
    ((axes, _),), _ = draw(long)
    low, high = axes.get_ylim()
    later = [loss for step, loss in losses.items() if step > 600]
    assert max(later) - 0.3 < high < 5 and min(losses.values()) - 0.2 < low < 3
    short = {i: 10.8 - 7.2 * (i / 299) ** 0.5 for i in range(300)}
    ((axes, _),), _ = draw(write_run(tmp_path / "s", stream("train", short), steady(300), "x.txt"))
    assert axes.get_ylim()[0] < 3.6 and 10.8 < axes.get_ylim()[1] < 11.5
    ((axes, _),), _ = draw(long, str(tmp_path / "s"))  # beside the long run only its end is visible
    assert axes.get_ylim()[1] < 5


def test_a_loss_that_diverges_leaves_room_for_the_rest(tmp_path):
    losses = {i: 10.9 - i / 50 for i in range(200)} | {200: 1e30}
    ((axes,),), _ = draw(write_run(tmp_path / "a", stream("train", losses)))
    assert 10.9 < axes.get_ylim()[1] < 12 and axes.get_ylim()[0] < 6.9


def test_losses_that_are_all_high_are_shown(tmp_path):
    log = "".join(f"{step} train {40 - step / 100}\n" for step in range(300))
    ((axes,),), _ = draw(write_run(tmp_path / "a", log))
    assert axes.get_ylim()[0] < 37.01 and axes.get_ylim()[1] > 39.5


def test_axes_are_labelled(tmp_path):
    progress = steady(251, batch=524_288, seconds=60)
    rows, _ = draw(write_run(tmp_path / "a", NANOGPT, progress, "x.txt"))
    assert [row[0].get_ylabel() for row in rows] == [
        "loss (nats per token)",
        "HellaSwag (acc_norm)",
    ]
    below = [axes.get_xlabel() for axes in rows[-1]]
    assert below == ["tokens (millions)", "training time (minutes)"]
    x, _ = find_line(rows[0][1], "a val").get_data()
    assert list(x) == [0, 250]


def test_without_hellaswag_there_is_no_row_for_it(tmp_path):
    rows, _ = draw(write_run(tmp_path / "a", "0 train 10\n1 train 9\n"))
    assert [len(row) for row in rows] == [1]
    assert rows[0][0].get_ylabel().startswith("loss")


# -------------------------------------------------------------------------------------------------
# Published lines


@pytest.mark.parametrize("data, shown", [
    (None, True), ("edu_fineweb10B", True), ("/data/FineWeb-100B/", True),
    ("input.txt", False), ("/fineweb/shakespeare", False), ("", False),
])  # fmt: skip
def test_the_published_loss_is_drawn_only_for_fineweb(tmp_path, data, shown):
    rows, _ = draw(write_run(tmp_path / "a", NANOGPT, steady(251), data))
    for axes in rows[0]:
        assert level_lines(axes) == [3.2924] * shown
        assert not shown or axes.get_ylim()[0] < 3.2924 < axes.get_ylim()[1]
    for axes in rows[1]:
        assert level_lines(axes) == [0.2955, 0.337]
    texts = [text.get_text() for axes in (rows[0][-1], rows[1][-1]) for text in axes.texts]
    assert any("3.2924" in text for text in texts) == shown
    assert {"GPT-2 124M 0.2955", "GPT-3 124M 0.337"} <= set(texts)
    assert not rows[0][0].texts and not rows[1][0].texts  # once, right of the last column


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"settings": 3}',
        '{"settings": {"data": 3}}',
        "[" * 100_000,
        '{"settings": {"data": "edu_fineweb10B", "total_batch_size": Infinity}}',
        '{"settings": ["data"], "result": {}}',
        f'{{{FINEWEB}, "result": [3]}}',
        f'{{{FINEWEB}, "result": {{"val_loss": "low"}}}}',
        f'{{{FINEWEB}, "result": {{"val_loss": [3]}}}}',
        f'{{{FINEWEB}, "result": {{"val_loss": 1{"0" * 400}}}}}',
    ],
)
def test_a_damaged_run_json_does_not_count_as_fineweb(tmp_path, content):
    log = write_run(tmp_path / "a", NANOGPT)
    (tmp_path / "a/run.json").write_text(content)
    assert level_lines(draw(log)[0][0][0]) == []
    assert plot.read_run(log).results == {"val_loss": 5.9, "hellaswag": 0.25, "steps": 250}


# -------------------------------------------------------------------------------------------------
# Several runs


def test_runs_differ_in_colour_and_then_in_the_kind_of_line(tmp_path):
    logs = [write_run(tmp_path / f"run{i}", NANOGPT) for i in range(28)]
    rows, figure = draw(*logs)
    lines = [find_line(rows[0][0], f"run{i} train mean") for i in range(28)]
    assert len({one.get_color() for one in lines[:7]}) == 7
    assert len({(one.get_color(), one.get_linestyle()) for one in lines}) == 28
    names = [f"run{i} (524,288 tokens per step assumed)" for i in range(28)]
    assert legend_names(figure) == names
    assert [one.get_color() for one in figure.legends[0].legend_handles[:28]] == [
        one.get_color() for one in lines
    ]


def test_the_name_of_a_run_is_what_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["x/log", "y/../y/log", "_a", r"$\frac$", "x/log/log.txt"]
    for name in ("x/log", "y/log", "_a", r"$\frac$"):
        write_run(tmp_path / name, "0 val 10\n", steady(1))
    figure = plot.draw(plot.group_seeds([plot.read_run(name) for name in names]))
    figure.draw_without_rendering()  # a $ in a name starts no formula, which could be wrong
    assert legend_names(figure) == names


@pytest.mark.parametrize("count", [1, 12])
def test_nothing_overlaps(tmp_path, count):
    """Legend, labels and axes, in the layout of the PNG: no two overlap, none is cut off."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    log, progress = NANOGPT + "1 other 2\n", steady(251, 524_288)
    names = [f"{i}_{'name' * (3 * i)}" for i in range(count)]
    logs = [write_run(tmp_path / name, log, progress) for name in names]
    rows, figure = draw(*logs)
    figure.draw_without_rendering()  # lays it out
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert rows[0][0].get_window_extent(renderer).height > 3 * figure.dpi  # however many names
    boxes = [legend.get_window_extent(renderer) for legend in figure.legends]
    for row in rows:
        boxes += [axes.get_window_extent(renderer) for axes in row]
        boxes += [text.get_window_extent(renderer) for axes in row for text in axes.texts]
        boxes.append(row[0].yaxis.get_tightbbox(renderer).padded(-3))
    boxes += [axes.xaxis.label.get_window_extent(renderer) for axes in rows[-1]]
    for number, box in enumerate(boxes):
        if number > 0:  # the legend is below the figure, and the PNG is larger
            assert box.x0 > -1 and box.y0 > -1
            assert box.x1 < figure.bbox.width + 1 and box.y1 < figure.bbox.height + 1
        for other in boxes[:number]:
            wide = min(box.x1, other.x1) - max(box.x0, other.x0)
            high = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert wide < 4 or high < 4, (box, other)


# -------------------------------------------------------------------------------------------------
# The command


def test_20000_steps_make_a_small_picture_with_all_of_the_legend(tmp_path, monkeypatch, capsys):
    """Two such runs in one PNG: opaque, a bit larger than the figure, below 300 kB."""
    noise = np.random.default_rng(0).normal(size=20_000) * 0.05
    losses = {s: v + noise[s] for s, v in gpt2_losses(20_000).items()}
    log = stream("train", losses) + stream("val", {s: losses[s] for s in range(0, 20_000, 250)})
    monkeypatch.chdir(tmp_path)
    names = "a", "b" * 180
    for name in names:
        write_run(Path(name), log)
    code, out, _ = run(capsys, *names)
    picture = Path("a/curves.png").read_bytes()
    assert code == 0 and out.startswith(f"a/curves.png: a, {names[1]}\n")
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and 20_000 < len(picture) < 300_000
    width, height = struct.unpack(">II", picture[16:24])
    assert 1300 < width < 2500 and 500 < height < 900  # as wide as the longest name
    from matplotlib.image import imread

    pixels = imread("a/curves.png")
    assert (pixels[0, 0, :3] == 1).all() and (pixels[..., 3:] == 1).all()


def test_a_dark_matplotlibrc_changes_nothing(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"axes.facecolor": "black", "figure.facecolor": "black"}):
        ((axes,),), figure = draw(write_run(tmp_path / "a", "0 train 10\n1 train 9\n"))
    white = (1, 1, 1, 1)
    assert axes.get_facecolor() == white and figure.get_facecolor() == white
    assert axes.yaxis.label.get_color() == "black"


@pytest.mark.parametrize("arguments, place", [
    ([], "log/curves.png"), (["other"], "other/curves.png"), (["log/log.txt"], "log/curves.png"),
    (["other", "log"], "other/curves.png"), (["log", "-o", "x.png", "other"], "x.png"),
    (["--out=log/y.PNG"], "log/y.PNG"),
])  # fmt: skip
def test_where_the_picture_goes(tmp_path, monkeypatch, capsys, arguments, place):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "log", "0 val 10\n")
    write_run(tmp_path / "other", "0 val 10\n")
    before = {path for path in tmp_path.rglob("*")}
    monkeypatch.setattr(plot, "draw", lambda runs: Blank())
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "") and out.startswith(str(Path(place)))
    assert set(tmp_path.rglob("*")) - before == {tmp_path / place}


class Blank:
    """Replaces a Figure in tests of the file only."""

    def savefig(self, path, **settings):
        path.write_bytes(b"a picture")


def test_a_failed_write_leaves_the_earlier_picture(tmp_path, monkeypatch):
    """If the disk is full, and if the file cannot be renamed."""
    path = tmp_path / "curves.png"
    path.write_bytes(b"earlier")

    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    for module, name in ((files, "sync"), (files.os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, refuse)
            with pytest.raises(UserError, match="curves.png.*No space left on device.*choose"):
                plot.write_png(Blank(), path)
        assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
        assert path.read_bytes() == b"earlier"


def test_help_is_short_and_complete(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and len(out.splitlines()) < 15
    for word in ("-o", "--out", "log directories, or log.txt files [log]", "curves.png"):
        assert word in out


@pytest.mark.parametrize("arguments, message", [
    ([], "log: cannot be read (No such file or directory); give the log directory of a run or its"),
    (["nowhere"], "nowhere: cannot be read (No such file or directory)"),
    (["good", "nowhere"], "nowhere: cannot be read (No such file or directory)"),
    (["empty"], "empty/log.txt: cannot be read (No such file or directory); give the log"),
    (["blank"], "log.txt: has no line `step stream value`"),
    (["partial"], "log.txt: has no line `step stream value`"),
    (["nan"], "log.txt: has no line `step stream value`"),
    (["damaged"], "log.txt: has no line `step stream value`"),
    (["a" * 300], "aaa: cannot be read (File name too long)"),
    (["odd"], "log.txt: cannot be read (Is a directory)"),
    (["good", "-o", "no/where/x.png"], "out='no/where/x.png': cannot be written (No such file or"),
    (["good", "-o", "taken.png"], "out='taken.png': cannot be written (Is a directory); choose"),
    (["good", "-o", "good/log.txt/x.png"], "x.png': cannot be written (Not a directory); choose"),
    (["good", "-o", "x.pdf"], "out='x.pdf': must end in .png"),
    (["good", "--colour=red"], "unrecognized arguments: --colour=red; --help lists"),
    (["good", "-o"], "argument -o/--out: expected one argument; --help lists"),
])  # fmt: skip
def test_wrong_input_is_one_line_and_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    logs = dict(good="0 val 10\n", blank="", partial="0 val 10", nan="0 val nan\n",
                damaged="0 val x\n")  # fmt: skip
    for name, log in logs.items():
        write_run(tmp_path / name, log)
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd/log.txt").mkdir(parents=True)
    (tmp_path / "taken.png").mkdir()
    monkeypatch.setattr(plot, "draw", lambda runs: Blank())
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def unprivileged():
    """The test runs as a user other than root, who may write everywhere."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    yield
    os.seteuid(user)


def test_a_directory_that_may_not_be_written(unprivileged, monkeypatch, capsys):
    monkeypatch.setattr(plot, "draw", lambda runs: Blank())
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are closed to other users
        log = write_run(Path(directory) / "a", "0 val 10\n")
        os.chmod(log, 0o500)
        code, _, err = run(capsys, log)
    assert code == 2 and "cannot be written (Permission denied); choose another file" in err


def test_without_matplotlib_the_error_names_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, write_run(tmp_path / "a", "0 val 10\n"))
    assert code == 2 and err.count("\n") == 1 and err.endswith("pip install matplotlib\n")


def test_the_command_needs_neither_pytorch_nor_a_window_system(tmp_path):
    log = write_run(tmp_path / "a", NANOGPT, steady(251), "edu_fineweb10B")
    code = (
        "import sys, runpy; sys.argv = ['plot.py', *sys.argv[1:]]\n"
        "try: runpy.run_path('plot.py', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'matplotlib.pyplot', 'tkinter'} & set(sys.modules)"
    )
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, log],
        cwd=ROOT, env=os.environ | {"MPLBACKEND": "TkAgg"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, "")
    assert (tmp_path / "a/curves.png").stat().st_size > 10_000
