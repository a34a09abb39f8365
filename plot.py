"""The curves of one or more runs as a PNG: loss and HellaSwag over tokens and over training time.

    python plot.py                                    # log/log.txt, drawn to log/curves.png
    python plot.py log_tiny -o tiny.png
    python plot.py log_a log_b theirs/log.txt -o curves.png

A run is a log directory, or a log.txt itself, build-nanogpt's too. What is read of it:

    log.txt       `step stream value`: train, val and hella, any of which may be absent
    progress.txt  `step tokens seconds`: trained on and taken up to the end of that step, the time
                  of evaluations left out; without it the batch is assumed and there is no time
    run.json      which text it trains on

All that is logged at a step was measured before that step's update, and is drawn there.

PyTorch is not imported: the trainer starts this program at each evaluation.
"""

import argparse
import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support import checkpoint
from support.cli import Parser
from support.errors import SettingError, UserError, run_main

# Published results, (label, value). The loss is OpenAI's GPT-2 124M on FineWeb-Edu's validation
# shard as build-nanogpt publishes it (play.ipynb), and means nothing on another text.
PUBLISHED_LOSS = (("GPT-2 124M\nvalidation\n3.2924", 3.2924),)
# acc_norm: GPT-2 124M by build-nanogpt's hellaswag.py, 10,042 examples in the style `completion`;
# GPT-3 Small from Brown et al. 2020, "Language Models are Few-Shot Learners", table H.1, zero-shot.
PUBLISHED_HELLASWAG = (("GPT-2 124M\n0.2955", 0.2955), ("GPT-3 124M\n0.337", 0.337))
NANOGPT_BATCH = 524_288  # build-nanogpt's tokens per step, which its log does not tell

SMOOTHED = 0.02  # of a run's steps: the window of the smoothed line
BUCKETS = 1000  # of the unsmoothed line, which is some 550 pixels wide
MARKERS_SHOWN = 25  # on a line, at most: more run into one another

# (from, divided by, name): the largest that fits the end of the axis
UNITS = {
    "tokens": ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e3, 1e3, "thousands"), (0, 1, "")),
    "seconds": ((3 * 86400, 86400, "days"), (3 * 3600, 3600, "h"), (180, 60, "min"), (0, 1, "s")),
}
DPI = 130  # 1300 pixels for two columns: sharp in a README, and four long runs stay below 300 kB
HEIGHTS = {"loss": 3.6, "hella": 2.2}  # of the rows, in inches; a README shows some 85 pixels each
AXES = {"tokens": "tokens trained on", "seconds": "training time"}

# Okabe and Ito's palette without its yellow, which white paper swallows. 7 colours, 4 dashes and 5
# markers have no common divisor, so that 140 runs differ, and 20 of them in grey too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (6, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^v"
LEGEND = dict(frameon=False, fontsize=10, handlelength=3.2)
DARK, GREY = "#222222", "#666666"


@dataclass
class Run:
    """What the files of one run say."""

    name: str
    streams: dict  # {"train", "val", "hella": (steps, finite values), two float arrays (n,)}
    progress: np.ndarray | None  # (n, 3): step, tokens, seconds, by step; None where there is none
    batch: int  # tokens per step, to be assumed where progress is None
    on_fineweb: bool

    def has(self, column: str) -> bool:
        """Whether something is known of the run over tokens, or over seconds."""
        return column == "tokens" or self.progress is not None

    def place(self, steps: np.ndarray, column: str) -> np.ndarray:
        """Tokens or seconds trained before each of `steps`; NaN beyond what progress.txt knows."""
        if self.progress is None:
            return steps * self.batch
        done = np.append(0, self.progress[:, 0] + 1)  # steps at the end of step s: s + 1
        known = np.append(0, self.progress[:, 1 if column == "tokens" else 2])
        return np.interp(steps, done, known, right=np.nan)

    def points(self, stream: str, column: str, smoothed: bool = False):
        """(x, y) of a stream, two arrays (n,): x in tokens or seconds; None where it has none."""
        if stream not in self.streams or not self.has(column):
            return None
        steps, y = self.streams[stream]
        x = self.place(steps, column)
        y = smooth(y) if smoothed else y
        known = ~np.isnan(x)
        return (x[known], y[known]) if known.any() else None


# -------------------------------------------------------------------------------------------------
# Reading


def read_fields(path: Path) -> list[list[str]]:
    """The three fields of each whole line; a last line without its end is still being written."""
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.split() for line in file if line.endswith("\n")]
    return [fields for fields in lines if len(fields) == 3]


def read_log(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{stream: (steps, values)} by step, of a step logged twice the last value; inf and NaN go.

    Raises UserError where nothing is left, or the file cannot be read.
    """
    found = {"train": {}, "val": {}, "hella": {}}
    try:
        for step, stream, value in read_fields(path):
            if stream in found and step.isdecimal():
                found[stream][int(step)] = float(value)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); give a run's log.txt") from None
    streams = {}
    for stream, values in found.items():
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
    """(n, 3): step, tokens, seconds, by step. None where there is no such file or line."""
    try:
        rows = {int(step): (float(n), float(s)) for step, n, s in read_fields(path)}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); mend or remove it") from None
    return np.array([(step, *row) for step, row in sorted(rows.items())]) if rows else None


def read_settings(path: Path) -> dict | None:
    """The settings in a run.json; {} where it is damaged; None where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def find_log(log: str) -> Path:
    """The log.txt that an argument names. Raises UserError where there is none."""
    path = Path(log)
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(
            f"{log}: no such directory; train one (python train_gpt2.py tiny makes log_tiny), or "
            "name another: python plot.py log_tiny"
        )
    if not (path / "log.txt").exists():
        raise UserError(f"{log}: no log.txt in it; give the log_dir of a run, or a log.txt")
    return path / "log.txt"


def read_run(path: Path, name: str) -> Run:
    """The run whose log.txt is `path`. Raises UserError where a file makes no sense."""
    settings = read_settings(path.parent / "run.json")
    batch = (settings or {}).get("total_batch_size")
    return Run(
        name,
        read_log(path),
        read_progress(path.parent / "progress.txt"),
        batch if isinstance(batch, int) and batch > 0 else NANOGPT_BATCH,
        # build-nanogpt, which writes no run.json, trains on nothing else
        settings is None or "fineweb" in Path(str(settings.get("data", ""))).name.lower(),
    )


def distinct_names(paths: list[Path]) -> list[str]:
    """The last part of each path, and as many before it as no other of the paths ends with."""
    parts = [path.parts for path in paths]

    def name(own: tuple[str, ...]) -> str:
        for count in range(1, len(own) + 1):
            if sum(other[-count:] == own[-count:] for other in parts) == 1:
                break
        return str(Path(*own[-count:]))

    return [name(own) for own in parts]


def read_runs(logs: list[str]) -> list[Run]:
    """The runs that the arguments name, each once, in their order."""
    # what was typed, not what a link points to
    paths = list(dict.fromkeys(Path(os.path.abspath(find_log(log))) for log in logs))
    named = [path.parent if path.name == "log.txt" else path for path in paths]
    return [read_run(path, name) for path, name in zip(paths, distinct_names(named))]


# -------------------------------------------------------------------------------------------------
# Lines


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of the values around each, SMOOTHED of them all; (n,) to (n,).

    The window opens on both sides alike, so that the steep beginning stays where it is. At the end,
    where a loss is flat, it is cut at the last value: a narrower one would show noise.
    """
    n, places = len(values), np.arange(len(values))
    before = np.minimum(int(n * SMOOTHED / 2), places)
    after = np.minimum(before, n - 1 - places)
    sums = np.append(0, np.cumsum(values))
    return (sums[places + after + 1] - sums[places - before]) / (before + 1 + after)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and greatest y of each of BUCKETS stretches: it looks the same, and draws fast."""
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

    The fall from 11 in the first steps would squash all that follows: where the longest run has
    over 2,000 steps, its first 3 % do not count, nor do the same steps of the others, but for the
    end of each run. Shorter runs are seen whole. A loss that explodes leaves at 11.5: an even guess
    among 50,257 has 10.8.
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
            lows.append(np.quantile(values[counted], 0.002))  # a single low outlier may leave
    bottom, top = min(lows), max(highs + published)
    top = max(min(top, 11.5), bottom + 0.1)
    margin = 0.04 * (top - bottom)
    return bottom - margin, top + margin


def choose_unit(column: str, largest: float) -> tuple[float, str]:
    """(what to divide by, the axis's label) for an axis of tokens or seconds up to `largest`."""
    _, divisor, name = next(unit for unit in UNITS[column] if largest >= unit[0])
    return divisor, f"{AXES[column]} ({name})" if name else AXES[column]


# -------------------------------------------------------------------------------------------------
# The picture


def draw(runs: list[Run]):
    """A matplotlib Figure: rows loss and HellaSwag, columns tokens and time, where there are any.

    Each line's label is the run's name and `each step`, `smoothed`, `val` or `hella`.
    Raises UserError where matplotlib is missing.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure  # without pyplot: no window system, whatever is set
    except ImportError as error:
        raise UserError(f"no curves without matplotlib ({error}): pip install matplotlib") from None

    streams = {stream for run in runs for stream in run.streams}
    rows = ["loss"] * bool(streams & {"train", "val"}) + ["hella"] * ("hella" in streams)
    columns = [column for column in UNITS if any(run.has(column) for run in runs)]
    look = {"text.color": DARK, "axes.labelcolor": DARK, "xtick.color": DARK, "ytick.color": DARK}
    with style.context(["default", look]):  # not what a matplotlibrc says
        figure = Figure(
            figsize=(10 if len(columns) > 1 else 7.5, 1 + sum(HEIGHTS[row] for row in rows)),
            layout="constrained",
            facecolor="white",
        )
        grid = figure.subplots(
            len(rows), len(columns), sharex="col", sharey="row", squeeze=False,
            height_ratios=[HEIGHTS[row] for row in rows],
        )  # fmt: skip
        for row, line_of_axes in zip(rows, grid):
            for column, axes in zip(columns, line_of_axes):
                draw_axes(axes, runs, row, column, label=column == columns[-1])
        label_axes(grid, rows, columns, runs)
        draw_names(figure, runs)
        draw_kinds(figure, streams)
        figure.align_ylabels()
    return figure


def extent(runs: list[Run], column: str) -> float:
    """The largest x of the runs, in tokens or seconds."""
    found = [run.points(stream, column) for run in runs for stream in run.streams]
    return max((x.max() for x, _ in filter(None, found)), default=0)


def look_of(number: int) -> tuple[dict, dict]:
    """(line, markers): what tells run `number` from the others, as matplotlib's arguments."""
    line = dict(color=COLOURS[number % len(COLOURS)], linestyle=DASHES[number % len(DASHES)])
    marks = dict(marker=MARKERS[number % len(MARKERS)], markersize=5.5)
    return line, marks | dict(markerfacecolor="white", markeredgewidth=1.3)


def draw_axes(axes, runs: list[Run], row: str, column: str, label: bool) -> None:
    """The runs' lines and the published ones, the latter with their labels if so asked."""
    divisor, _ = choose_unit(column, extent(runs, column))
    for number, run in enumerate(runs):
        line, marks = look_of(number)
        lines = Lines(axes, run, column, divisor)
        if row == "hella":
            lines.draw("hella", "hella", **line, **marks, linewidth=1.5, zorder=4)
            continue
        alpha = 0.3 if len(runs) < 3 else 0.15
        lines.draw("train", "each step", color=line["color"], alpha=alpha, linewidth=0.6, zorder=2)
        lines.draw("train", "smoothed", **line, linewidth=1.8, zorder=3)
        lines.draw("val", "val", color=line["color"], **marks, linewidth=0.7, zorder=4)
    published = PUBLISHED_HELLASWAG if row == "hella" else published_loss(runs)
    for text, value in published:
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1, zorder=1)
        if label:
            label_published(axes, text, value, published)


def label_published(axes, text: str, value: float, published: tuple) -> None:
    """Right of the axes, where no curve is: upwards from the upper line, down from the lower."""
    side = "bottom" if value == max(other for _, other in published) else "top"
    half_line = -5 if side == "bottom" else 5  # in points
    axes.annotate(
        text, (1, value), (6, half_line), xycoords=axes.get_yaxis_transform(),
        textcoords="offset points", va=side, fontsize=9, color=GREY, annotation_clip=False,
    )  # fmt: skip


@dataclass
class Lines:
    """The lines of one run in one of the axes."""

    axes: object
    run: Run
    column: str
    divisor: float  # tokens or seconds in the axis's unit

    def draw(self, stream: str, kind: str, **look) -> None:
        """A line of a stream, if the run has it."""
        points = self.run.points(stream, self.column, smoothed=kind == "smoothed")
        if points is None:
            return
        x, y = thin(*points) if kind == "each step" else points
        if "marker" in look:  # not at each point, but at the last
            every = -(-len(x) // MARKERS_SHOWN)
            look["markevery"] = ((len(x) - 1) % every, every)
        elif len(x) == 1:  # of a point there is no line
            look["marker"] = "."
        self.axes.plot(x / self.divisor, y, label=f"{self.run.name} {kind}", **look)


def published_loss(runs: list[Run]) -> tuple:
    """The published losses, as far as they can be compared with these runs."""
    return PUBLISHED_LOSS if any(run.on_fineweb for run in runs) else ()


def label_axes(grid, rows: list[str], columns: list[str], runs: list[Run]) -> None:
    """Labels, limits and a grid for all axes."""
    for axes in grid.flat:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for row, line_of_axes in zip(rows, grid):
        names = {"loss": "loss (nats per token)", "hella": "HellaSwag (acc_norm)"}
        line_of_axes[0].set_ylabel(names[row])
        if row == "loss":
            published = [value for _, value in published_loss(runs)]
            line_of_axes[0].set_ylim(loss_limits(runs, published))
    for column, axes in zip(columns, grid[-1]):
        largest = extent(runs, column)
        divisor, name = choose_unit(column, largest)
        axes.set_xlabel(name)
        end = largest / divisor or 1
        axes.set_xlim(-0.02 * end, 1.02 * end)


def draw_names(figure, runs: list[Run]) -> None:
    """Above the axes: which run looks how."""
    from matplotlib.lines import Line2D

    handles, labels = [], []
    for number, run in enumerate(runs):
        line, marks = look_of(number)
        handles.append(Line2D([], [], **line, **marks, linewidth=1.8))
        assumed = run.progress is None and max(s[-1] for s, _ in run.streams.values()) > 0
        note = f" ({run.batch:,} tokens a step assumed)" if assumed else ""
        labels.append(shorten(run.name) + note)
    width = int(figure.get_figwidth() * 12)  # in characters, of which a handle takes 10
    columns = max(1, min(width // (max(map(len, labels)) + 10), len(runs)))
    more_lines = -(-len(runs) // columns) - 1
    figure.set_figheight(figure.get_figheight() + 0.21 * more_lines)  # not from the axes
    legend = figure.legend(handles, labels, loc="outside upper left", ncols=columns, **LEGEND)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a name is a $


def draw_kinds(figure, streams: set[str]) -> None:
    """Below the axes: what kinds of lines there are."""
    from matplotlib.lines import Line2D

    kinds = {}
    if "train" in streams:
        kinds["training loss, each step"] = dict(linewidth=0.6, alpha=0.5)
        kinds[f"mean of {SMOOTHED:.0%} of the steps"] = dict(linewidth=1.8)
    if "val" in streams:
        kinds["validation loss"] = dict(linewidth=0.7, **look_of(0)[1])
    if kinds:
        handles = [Line2D([], [], color=GREY, **look) for look in kinds.values()]
        figure.legend(handles, list(kinds), loc="outside lower left", ncols=3, **LEGEND)


def shorten(name: str, most: int = 70) -> str:
    """A name that fits the picture's width: of a longer one its two ends."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 :]}"


def write_png(figure, path: Path) -> None:
    """Writes the PNG beside its place and renames it there.

    Raises UserError where that cannot be, with what was there before still in its place.
    """
    # two programs may draw the same run at once
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, facecolor="white")
    try:
        partial.write_bytes(picture.getvalue())
        checkpoint.flush(partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"out={str(path)!r}: cannot be written ({error.strerror}); choose another file: -o PNG"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# The command line


def parse(arguments: list[str]) -> argparse.Namespace:
    """The settings of a command line. Raises SettingError where it makes no sense."""
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
        raise SettingError(f"out={options.out!r}: no directory {path.parent}; make it first")
    write_png(draw(runs), path)
    print(f"{path}: {', '.join(run.name for run in runs)}")
    return 0


if __name__ == "__main__":
    run_main(main)
