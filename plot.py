"""Draws the curves of one or more runs as a PNG: loss and HellaSwag over tokens and training time.

    python plot.py                                    # log/log.txt, drawn to log/curves.png
    python plot.py log_tiny -o tiny.png
    python plot.py log_a log_b theirs/log.txt -o curves.png

A run is a log directory, or a log.txt, also one of build-nanogpt. Three files are read:

    log.txt       `step stream value` with the streams train, val and hella, each optional
    progress.txt  `step tokens seconds`: the totals at the end of that step, without evaluations;
                  if it is missing, a batch size is assumed and no time is shown
    run.json      the data set and the batch size

Every value is drawn at the tokens and the time before the update of its step.

The trainer starts this program at each evaluation, so it does not import PyTorch.
"""

import argparse
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support import files
from support.cli import Parser
from support.errors import SettingError, UserError, run_main
from support.log_files import read_fields

# Published results, (label, value). The loss is that of OpenAI's GPT-2 124M on the validation shard
# of FineWeb-Edu, from build-nanogpt's play.ipynb. It cannot be compared with losses on other data.
PUBLISHED_LOSS = (("GPT-2 124M\nvalidation\n3.2924", 3.2924),)
# acc_norm. GPT-2 124M: build-nanogpt's hellaswag.py, 10,042 examples, style `completion`. GPT-3
# Small: Brown et al. 2020, "Language Models are Few-Shot Learners", table H.1, zero-shot.
PUBLISHED_HELLASWAG = (("GPT-2 124M\n0.2955", 0.2955), ("GPT-3 124M\n0.337", 0.337))
NANOGPT_BATCH = 524_288  # tokens per step of build-nanogpt, which writes no run.json

SMOOTHED = 0.02  # window of the smoothed line, as a share of the run's steps
BUCKETS = 1000  # of the line of all steps, which is about 550 pixels wide
MARKERS_SHOWN = 25  # at most on one line, so that they do not touch

# (smallest value at the end of the axis, divisor, name)
UNITS = {
    "tokens": ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e3, 1e3, "thousands"), (0, 1, "")),
    "seconds": ((3 * 86400, 86400, "days"), (3 * 3600, 3600, "h"), (180, 60, "min"), (0, 1, "s")),
}
AXES = {"tokens": "tokens trained on", "seconds": "training time"}
DPI = 130  # 1300 pixels for two columns; a picture of four long runs stays below 300 kB
HEIGHTS = {"loss": 3.6, "hella": 2.2}  # of the rows, in inches

# Okabe and Ito's palette without yellow, which is hard to see on white. 7 colours, 4 dashes and 5
# markers have no common divisor: 140 runs look different, and 20 of them also in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (6, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^v"
LEGEND = dict(frameon=False, fontsize=10, handlelength=3.2)
DARK, GREY = "#222222", "#666666"


@dataclass
class Run:
    """The content of one run's files."""

    name: str
    streams: dict  # {"train", "val", "hella": (steps, finite values), two float arrays (n,)}
    progress: np.ndarray | None  # (n, 3): step, tokens, seconds, sorted by step; None if unknown
    batch: int  # tokens per step, assumed if progress is None
    on_fineweb: bool

    def points(self, stream: str, column: str, smoothed: bool = False):
        """(x, y) of a stream, two float arrays (n,); None if there are no points.

        column: tokens or seconds. Points beyond the end of progress.txt are left out.
        """
        if stream not in self.streams or (column == "seconds" and self.progress is None):
            return None
        steps, y = self.streams[stream]
        if self.progress is None:
            x = steps * self.batch
        else:
            done = np.append(0, self.progress[:, 0] + 1)  # steps at the end of step s: s + 1
            total = np.append(0, self.progress[:, 1 if column == "tokens" else 2])
            x = np.interp(steps, done, total, right=np.nan)
        y = smooth(y) if smoothed else y
        known = ~np.isnan(x)
        return (x[known], y[known]) if known.any() else None


# -------------------------------------------------------------------------------------------------
# Reading


def unreadable(path: Path, error: Exception, remedy: str) -> UserError:
    """The error to raise if a file cannot be read or has a wrong number in it."""
    return UserError(f"{path}: cannot be read ({getattr(error, 'strerror', 0) or error}); {remedy}")


def read_log(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{stream: (steps, values)}, sorted by step, two float arrays (n,).

    Of a step that was logged twice the last value counts; values that are not finite are left out.
    Raises UserError if the file cannot be read or has no value.
    """
    logged = {"train": {}, "val": {}, "hella": {}}
    try:
        for step, stream, value in read_fields(path):
            if stream in logged and step.isdecimal():
                logged[stream][int(step)] = float(value)
    except (OSError, ValueError) as error:
        raise unreadable(path, error, "give a run's log.txt") from None
    streams = {}
    for stream, values in logged.items():
        finite = [(step, value) for step, value in sorted(values.items()) if np.isfinite(value)]
        if finite:
            streams[stream] = tuple(np.array(finite, dtype=float).T)
    if not streams:
        raise UserError(
            f"{path}: has no line `step stream value` of train, val or hella with a finite value; "
            "let the run make a step, or give another log"
        )
    return streams


def read_progress(path: Path) -> np.ndarray | None:
    """float (n, 3): step, tokens, seconds, sorted by step; None if there is no line."""
    try:
        rows = {int(step): (float(n), float(s)) for step, n, s in read_fields(path)}
    except (OSError, ValueError) as error:
        raise unreadable(path, error, "correct or remove it") from None
    return np.array([(step, *row) for step, row in sorted(rows.items())]) if rows else None


def read_settings(path: Path) -> dict | None:
    """The settings in a run.json; {} if it is damaged; None if there is no such file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def find_log(log: str) -> Path:
    """The log.txt that an argument names. Raises UserError if there is no such file."""
    path = Path(log)
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(
            f"{log}: no such directory; train a model (python train_gpt2.py tiny creates log_tiny),"
            " or name another log directory: python plot.py log_tiny"
        )
    if not (path / "log.txt").exists():
        raise UserError(f"{log}: no log.txt in it; give the log_dir of a run, or a log.txt")
    return path / "log.txt"


def read_run(path: Path, name: str) -> Run:
    """The run whose log.txt is `path`. Raises UserError if a file cannot be understood."""
    settings = read_settings(path.parent / "run.json")
    batch = (settings or {}).get("total_batch_size")
    return Run(
        name,
        read_log(path),
        read_progress(path.parent / "progress.txt"),
        batch if isinstance(batch, int) and batch > 0 else NANOGPT_BATCH,
        # build-nanogpt, which writes no run.json, always trains on FineWeb-Edu
        settings is None or "fineweb" in Path(str(settings.get("data", ""))).name.lower(),
    )


def distinct_names(paths: list[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as make it unique."""
    parts, names = [path.parts for path in paths], []
    for own in parts:
        for count in range(1, len(own) + 1):
            if sum(other[-count:] == own[-count:] for other in parts) == 1:
                break
        names.append(str(Path(*own[-count:])))
    return names


def read_runs(logs: list[str]) -> list[Run]:
    """The runs that the arguments name, without duplicates, in their order."""
    # abspath and not resolve(): a run has the name that was typed, not that of a link's target
    paths = list(dict.fromkeys(Path(os.path.abspath(find_log(log))) for log in logs))
    named = [path.parent if path.name == "log.txt" else path for path in paths]
    return [read_run(path, name) for path, name in zip(paths, distinct_names(named))]


# -------------------------------------------------------------------------------------------------
# Lines and axes


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of the values around each, in a window of SMOOTHED of their number; (n,) to (n,).

    At the beginning the window is narrower on both sides, so that a steep loss does not move. At
    the end, where a loss is flat, only its right side is cut: a narrow window would show noise.
    """
    n, places = len(values), np.arange(len(values))
    before = np.minimum(int(n * SMOOTHED / 2), places)
    after = np.minimum(before, n - 1 - places)
    sums = np.append(0, np.cumsum(values))
    return (sums[places + after + 1] - sums[places - before]) / (before + 1 + after)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and largest y of each of BUCKETS stretches: looks the same, and draws fast."""
    size = -(-len(y) // BUCKETS)
    if size <= 2:
        return x, y
    starts = np.arange(0, len(y), size)
    rows = np.pad(y, (0, len(starts) * size - len(y)), mode="edge").reshape(-1, size)
    kept = np.append(starts + rows.argmin(axis=1), starts + rows.argmax(axis=1))
    kept = np.unique(np.minimum(kept, len(y) - 1))
    return x[kept], y[kept]


def loss_limits(runs: list[Run], published: list[float]) -> tuple[float, float]:
    """(bottom, top) of the loss axis.

    The fall from 11 in the first steps would leave no room for the rest. So if the longest run has
    more than 2,000 steps, its first 3 % may leave the axis, as may the same steps of other runs,
    except for the last value of each. A loss that diverges leaves at 11.5: a uniform guess among
    50,257 tokens has 10.8.
    """
    longest = max(steps[-1] for run in runs for steps, _ in run.streams.values())
    first = 0.03 * longest if longest > 2000 else 0
    highs, lows = [], published[:]
    for run in runs:
        for stream in run.streams.keys() & {"train", "val"}:
            steps, values = run.streams[stream]
            line = smooth(values) if stream == "train" else values
            counted = steps >= min(first, steps[-1])
            highs.append(line[counted].max())
            lows.append(np.quantile(values[counted], 0.002))  # a single outlier may leave the axis
    bottom, top = min(lows), max(highs + published)
    top = max(min(top, 11.5), bottom + 0.1)
    margin = 0.04 * (top - bottom)
    return bottom - margin, top + margin


def find_end(runs: list[Run], column: str) -> float:
    """The largest x of the runs, in tokens or seconds."""
    points = [run.points(stream, column) for run in runs for stream in run.streams]
    return max((x.max() for x, _ in filter(None, points)), default=0)


def choose_unit(column: str, largest: float) -> tuple[float, str]:
    """(divisor, label) of an axis of tokens or seconds up to `largest`."""
    _, divisor, name = next(unit for unit in UNITS[column] if largest >= unit[0])
    return divisor, f"{AXES[column]} ({name})" if name else AXES[column]


# -------------------------------------------------------------------------------------------------
# The picture


def draw(runs: list[Run]):
    """A matplotlib Figure with rows loss and HellaSwag, columns tokens and time, if there are any.

    The label of each line is the run's name and `each step`, `smoothed`, `val` or `hella`.
    Raises UserError if matplotlib is missing.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure  # not pyplot, which may look for a window system
    except ImportError as error:
        raise UserError(f"no curves without matplotlib ({error}): pip install matplotlib") from None

    streams = {stream for run in runs for stream in run.streams}
    rows = ["loss"] * bool(streams & {"train", "val"}) + ["hella"] * ("hella" in streams)
    columns = ["tokens"] + ["seconds"] * any(run.progress is not None for run in runs)
    dark = {"text.color": DARK, "axes.labelcolor": DARK, "xtick.color": DARK, "ytick.color": DARK}
    with style.context(["default", dark]):  # independent of the user's matplotlibrc
        figure = Figure(
            figsize=(10 if len(columns) > 1 else 7.5, 1 + sum(HEIGHTS[row] for row in rows)),
            layout="constrained",
            facecolor="white",
        )
        grid = figure.subplots(
            len(rows), len(columns), sharex="col", sharey="row", squeeze=False,
            height_ratios=[HEIGHTS[row] for row in rows],
        )  # fmt: skip
        for row, row_axes in zip(rows, grid):
            for column, axes in zip(columns, row_axes):
                draw_runs(axes, runs, row, column)
                draw_published(axes, choose_published(runs, row), column == columns[-1])
        label_axes(grid, rows, columns, runs)
        draw_run_legend(figure, runs)
        draw_line_legend(figure, streams)
        figure.align_ylabels()
    return figure


def choose_style(number: int) -> tuple[dict, dict]:
    """(line, marker): matplotlib's arguments that distinguish run `number` from the others."""
    line = dict(color=COLOURS[number % len(COLOURS)], linestyle=DASHES[number % len(DASHES)])
    marker = dict(marker=MARKERS[number % len(MARKERS)], markersize=5.5)
    return line, marker | dict(markerfacecolor="white", markeredgewidth=1.3)


def draw_runs(axes, runs: list[Run], row: str, column: str) -> None:
    """Draws the lines of all runs. row: loss or hella; column: tokens or seconds"""
    divisor, _ = choose_unit(column, find_end(runs, column))
    alpha = 0.3 if len(runs) < 3 else 0.15
    for number, run in enumerate(runs):
        line, marker = choose_style(number)
        colour = line["color"]
        kinds = {
            "each step": ("train", dict(color=colour, alpha=alpha, linewidth=0.6, zorder=2)),
            "smoothed": ("train", dict(**line, linewidth=1.8, zorder=3)),
            "val": ("val", dict(color=colour, **marker, linewidth=0.7, zorder=4)),
        }
        if row == "hella":
            kinds = {"hella": ("hella", dict(**line, **marker, linewidth=1.5, zorder=4))}
        for kind, (stream, style) in kinds.items():
            points = run.points(stream, column, smoothed=kind == "smoothed")
            if points is None:
                continue
            x, y = thin(*points) if kind == "each step" else points
            if "marker" in style:  # on some of the points, the last one included
                every = -(-len(x) // MARKERS_SHOWN)
                style["markevery"] = ((len(x) - 1) % every, every)
            elif len(x) == 1:  # a line through one point is invisible
                style["marker"] = "."
            axes.plot(x / divisor, y, label=f"{run.name} {kind}", **style)


def choose_published(runs: list[Run], row: str) -> tuple:
    """The published results of a row, ((text, value), ...), that apply to these runs."""
    if row == "hella":
        return PUBLISHED_HELLASWAG
    return PUBLISHED_LOSS if any(run.on_fineweb for run in runs) else ()


def draw_published(axes, published: tuple, labelled: bool) -> None:
    """Draws a horizontal line for each (text, value), with the texts right of the axes."""
    for text, value in published:
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1, zorder=1)
        if labelled:  # above the upper line and below the lower one, half a line (5 points) off
            upper = value == max(other for _, other in published)
            axes.annotate(
                text, (1, value), (6, -5 if upper else 5), xycoords=axes.get_yaxis_transform(),
                textcoords="offset points", va="bottom" if upper else "top", fontsize=9,
                color=GREY, annotation_clip=False,
            )  # fmt: skip


def label_axes(grid, rows: list[str], columns: list[str], runs: list[Run]) -> None:
    """Sets labels, limits and grid lines of all axes."""
    for axes in grid.flat:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for row, (axes, *_) in zip(rows, grid):
        axes.set_ylabel({"loss": "loss (nats per token)", "hella": "HellaSwag (acc_norm)"}[row])
        if row == "loss":
            axes.set_ylim(loss_limits(runs, [value for _, value in choose_published(runs, row)]))
    for column, axes in zip(columns, grid[-1]):
        largest = find_end(runs, column)
        divisor, label = choose_unit(column, largest)
        axes.set_xlabel(label)
        end = largest / divisor or 1
        axes.set_xlim(-0.02 * end, 1.02 * end)


def draw_run_legend(figure, runs: list[Run]) -> None:
    """Draws the names and styles of the runs above the axes."""
    from matplotlib.lines import Line2D

    handles, labels = [], []
    for number, run in enumerate(runs):
        line, marker = choose_style(number)
        handles.append(Line2D([], [], **line, **marker, linewidth=1.8))
        assumed = run.progress is None and max(s[-1] for s, _ in run.streams.values()) > 0
        note = f" ({run.batch:,} tokens a step assumed)" if assumed else ""
        labels.append(shorten(run.name) + note)
    width = int(figure.get_figwidth() * 12)  # in characters, of which a handle takes 10
    columns = max(1, min(width // (max(map(len, labels)) + 10), len(runs)))
    more_lines = -(-len(runs) // columns) - 1
    figure.set_figheight(figure.get_figheight() + 0.21 * more_lines)  # the axes keep their height
    legend = figure.legend(handles, labels, loc="outside upper left", ncols=columns, **LEGEND)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a name starts no formula


def draw_line_legend(figure, streams: set[str]) -> None:
    """Draws the kinds of lines of the loss below the axes."""
    from matplotlib.lines import Line2D

    kinds = {}
    if "train" in streams:
        kinds["training loss, each step"] = dict(linewidth=0.6, alpha=0.5)
        kinds[f"mean of {SMOOTHED:.0%} of the steps"] = dict(linewidth=1.8)
    if "val" in streams:
        kinds["validation loss"] = dict(linewidth=0.7, **choose_style(0)[1])
    if kinds:
        handles = [Line2D([], [], color=GREY, **style) for style in kinds.values()]
        figure.legend(handles, list(kinds), loc="outside lower left", ncols=3, **LEGEND)


def shorten(name: str, most: int = 70) -> str:
    """The two ends of a name that is longer than `most` characters."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 :]}"


def write_png(figure, path: Path) -> None:
    """Writes the PNG. Raises UserError if that fails; an earlier picture is then unchanged."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, facecolor="white")
    try:  # two programs may draw the same run at the same time
        with files.replacing(path, writer=str(os.getpid())) as partial:
            partial.write_bytes(picture.getvalue())
    except OSError as error:
        raise UserError(
            f"out={str(path)!r}: cannot be written ({error.strerror}); choose another file: -o PNG"
        ) from None


# -------------------------------------------------------------------------------------------------
# The command line


def parse(arguments: list[str]) -> argparse.Namespace:
    """The settings of a command line. Raises SettingError if they are not valid."""
    parser = Parser(description="Draws the curves of one or more runs.", allow_abbrev=False)
    add = parser.add_argument
    add("logs", nargs="*", metavar="log", help="log directories, or log.txt files [log]")
    add("-o", "--out", metavar="PNG", help="the picture [curves.png beside the first log.txt]")
    options = parser.parse_intermixed_args(arguments)
    if options.out is not None and not options.out.lower().endswith(".png"):
        raise SettingError(f"out={options.out!r}: must end in .png")
    options.logs = options.logs or ["log"]
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    path = Path(options.out) if options.out else find_log(options.logs[0]).parent / "curves.png"
    runs = read_runs(options.logs)
    if not path.parent.is_dir():
        raise SettingError(f"out={options.out!r}: no directory {path.parent}; create it first")
    write_png(draw(runs), path)
    print(f"{path}: {', '.join(run.name for run in runs)}")
    return 0


if __name__ == "__main__":
    run_main(main)
