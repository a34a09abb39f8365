"""Draws the curves of one or more runs as a PNG: loss and HellaSwag over tokens and training time.
Prints a table of the results.

    python plot.py                                    # log/log.txt, drawn to log/curves.png
    python plot.py log_tiny -o tiny.png
    python plot.py log_a log_b theirs/log.txt -o curves.png
    python plot.py log_a_* log_b_*                    # the seeds of two kinds of run

A run is a log directory, or a log.txt, also one of build-nanogpt. Three files are read:

    log.txt       `step stream value`: train and the validation sets, whose names begin with val,
                  are drawn in one panel, hella and every other stream in a panel of its own
    progress.txt  `step tokens seconds`: the totals at the end of that step, without evaluations;
                  if it is missing, a batch size is assumed and no time is shown
    run.json      the settings, and the results of a finished run; the table shows the last values
                  of log.txt for any other

Every value is drawn at the tokens and the time before the update of its step.

Runs that differ only in `seed`, and have made the same number of steps, are drawn as their mean
in a band of one standard deviation, and are one row of the table: mean +- standard deviation. If
there are exactly two such groups, the table has the difference +- its standard error (Welch), too.

The trainer starts this program at each evaluation, so it does not import PyTorch.
"""

import argparse
import functools
import itertools
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from support import files
from support.cli import Parser
from support.errors import SettingError, UserError, run_main
from support.run_log import LOG_TYPES, PROGRESS_TYPES, read_rows

# Published results by panel. The loss is that of OpenAI's GPT-2 124M on the validation shard of
# FineWeb-Edu, from build-nanogpt's play.ipynb; it cannot be compared with losses on other data.
# HellaSwag is acc_norm. GPT-2 124M: build-nanogpt's hellaswag.py, 10,042 examples, style
# `completion`. GPT-3 Small: Brown et al. 2020, "Language Models are Few-Shot Learners", table H.1,
# zero-shot.
PUBLISHED = {
    "loss": {"GPT-2 124M 3.2924": 3.2924},
    "hella": {"GPT-2 124M 0.2955": 0.2955, "GPT-3 124M 0.337": 0.337},
}
NANOGPT_BATCH = 524_288  # tokens per step of build-nanogpt, which writes no run.json
SMOOTHED = 0.02  # window of the mean, as a share of the values

LABELS = {"loss": "loss (nats per token)", "hella": "HellaSwag (acc_norm)"}
COLUMNS = {"tokens": (1e6, "tokens (millions)"), "seconds": (60, "training time (minutes)")}

# Settings that need not be equal in a group of seeds. All others must be, also new ones, and so
# must the data, the precision and the code.
MAY_DIFFER = {
    "seed", "log_dir", "check_data", "B", "device", "compile", "timeout_s", "val_every", "curves",
    "hellaswag_every", "sample_every", "checkpoint_every", "keep_checkpoints", "tracker",
    "after_checkpoint", "eval_only",
}  # fmt: skip

# Each run has a colour, and another line style if the colours are used up: Okabe and Ito's palette
# without yellow, which is hard to see on white. Each stream of a panel has a marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RUN_STYLES = [dict(linestyle=line, color=c) for line in ("-", "--", ":", "-.") for c in COLOURS]
MARKERS = "soD^v"
EACH_STEP = dict(linewidth=0.6, alpha=0.25, linestyle="-", zorder=2)
MEAN = dict(linewidth=1.8, zorder=3)
EVALUATION = dict(linewidth=0.8, markerfacecolor="white", markeredgewidth=1.3, zorder=4)
BAND = dict(linewidth=0, alpha=0.2, zorder=1)
GREY = "#666666"
SETTINGS = {  # of matplotlib
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.xmargin": 0.02,
    "figure.constrained_layout.use": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "lines.markersize": 5.5,
    "savefig.bbox": "tight",  # includes the legend, which is outside of the figure
    "savefig.dpi": 130,
    "text.parse_math": False,  # a $ in a name starts no formula
}


@dataclass
class Run:
    """The content of one run's files."""

    name: str  # as given on the command line
    directory: Path
    streams: dict  # {name: (steps, finite values)}, two float arrays (n,), sorted by step
    progress: np.ndarray | None  # (n, 3): step, tokens, seconds, sorted by step; None if unknown
    on_fineweb: bool = False
    batch: int = NANOGPT_BATCH  # tokens per step, assumed if progress is None
    compared: str = ""  # equal for runs that differ only in `seed`; "": unknown
    seed: str = ""
    results: dict = field(default_factory=dict)  # {name: number}, by the names in run.json

    def x_of(self, steps: np.ndarray, column: str) -> np.ndarray:
        """The tokens or seconds before these steps; nan if progress.txt does not know them yet."""
        if self.progress is None:
            return steps * (self.batch if column == "tokens" else np.nan)
        done = np.append(0, self.progress[:, 0] + 1)  # steps at the end of step s: s + 1
        total = np.append(0, self.progress[:, 1 if column == "tokens" else 2])
        return np.interp(steps, done, total, right=np.nan)


# -------------------------------------------------------------------------------------------------
# Reading


def read_run(name: str) -> Run:
    """The run of a log directory or a log.txt. Raises UserError if it cannot be read."""
    path = Path(name) / "log.txt" if os.path.isdir(name) else Path(name)
    try:
        streams = read_streams(path)
        progress = read_progress(path.parent / "progress.txt")
        record = read_record(path.parent / "run.json")
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}); give the log directory of a run "
            "or its log.txt (python train_gpt2.py tiny creates log_tiny)"
        ) from None
    if not streams:
        raise UserError(
            f"{path}: has no line `step stream value` with a finite value; let the run make a "
            "step, or give another log"
        )
    run = Run(name, path.parent, streams, progress, **record)
    run.results = run.results | last_values(streams) | run.results  # the order of run.json
    return run


def read_streams(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`Run.streams` of a log.txt. Of a step that was logged twice the last value counts."""
    values = {}
    for step, stream, value in read_rows(path, LOG_TYPES):
        if np.isfinite(value):
            values.setdefault(stream, {})[step] = value
    return {stream: tuple(np.array(sorted(v.items()), float).T) for stream, v in values.items()}


def last_values(streams: dict) -> dict[str, float]:
    """`Run.results`, as far as log.txt has them."""
    names = {s: f"{s}_loss" for s in streams if s.startswith("val")} | {"hella": "hellaswag"}
    last = {names[s]: values[-1] for s, (_, values) in streams.items() if s in names}
    return last | {"steps": max(steps[-1] + (s == "train") for s, (steps, _) in streams.items())}


def read_progress(path: Path) -> np.ndarray | None:
    """`Run.progress` of a progress.txt; None if there is no such file, or no line in it."""
    rows = {row[0]: row for row in read_rows(path, PROGRESS_TYPES)} if path.exists() else {}
    return np.array(sorted(rows.values()), float) if rows else None


def read_record(path: Path) -> dict:
    """The fields of `Run` that a run.json has.

    build-nanogpt, which has no such file, trains on FineWeb-Edu. A damaged file has no effect.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        settings, results = record["settings"], record.get("result") or {}
        equal = {name: value for name, value in settings.items() if name not in MAY_DIFFER}
        others = [record.get(name) for name in ("data", "dtype", "commit", "changes")]
        return dict(
            on_fineweb="fineweb" in Path(settings["data"]).name.lower(),
            batch=int(settings["total_batch_size"]),
            compared=json.dumps([equal, others], sort_keys=True),
            seed=str(settings.get("seed")),
            results={name: float(x) for name, x in results.items() if x is not None},
        )
    except FileNotFoundError:
        return dict(on_fineweb=True)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


# -------------------------------------------------------------------------------------------------
# Groups of seeds and the table


class Group(list):
    """The runs of one line: a single one, or several that differ only in `seed`."""

    @property
    def name(self) -> str:
        return self[0].name + (f" ({len(self)} seeds)" if len(self) > 1 else "")

    def series(self, stream: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps (n,), values (runs, n)) of a stream, at the steps that all runs have."""
        parts = [run.streams.get(stream, np.empty((2, 0))) for run in self]
        common = functools.reduce(np.intersect1d, [steps for steps, _ in parts])
        return common, np.array([values[np.isin(steps, common)] for steps, values in parts])


def group_seeds(runs: list[Run]) -> list[Group]:
    """The runs in groups. A seed that its group already has begins another group."""
    groups, earlier = {}, Counter()
    for run in runs:
        key = run.compared, run.results["steps"]
        groups.setdefault((key, earlier[key, run.seed]), Group()).append(run)
        earlier[key, run.seed] += 1
    return [*groups.values()]


def deviation(values: np.ndarray) -> np.ndarray:
    """The sample standard deviation over the runs, (runs, n) to (n,); 0 for a single run."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(values[0])


def format_table(groups: list[Group]) -> str:
    """The results: a line for each group, and one for the difference of exactly two of seeds."""
    names = [*dict.fromkeys(name for group in groups for run in group for name in run.results)]
    results = [np.array([[r.results.get(k, np.nan) for k in names] for r in g]) for g in groups]
    rows = [(g.name, len(g), r.mean(0), deviation(r)) for g, r in zip(groups, results)]
    seeds = [values for values in results if len(values) > 1]
    if len(seeds) == 2:
        error = np.hypot(*(deviation(values) / len(values) ** 0.5 for values in seeds))
        rows.append(("second - first", "", seeds[1].mean(0) - seeds[0].mean(0), error))
    table = [["run", "n", *names]]
    table += [[name, str(n), *map(format_cell, means, errors)] for name, n, means, errors in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in table)


def format_cell(value: float, error: float) -> str:
    """A value, +- its error if it has one; "-" if it is unknown."""
    digits = 0 if abs(value) >= 100 or value % 1 == 0 else 4
    text = f"{value:,.{digits}f}" + (f" +- {error:,.{digits}f}" if error else "")
    return text if np.isfinite(value) else "-"


# -------------------------------------------------------------------------------------------------
# The picture


def draw(groups: list[Group]):
    """A matplotlib Figure with a row for each panel, and columns tokens and, if known, time."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which may look for a window system

    matplotlib.rcdefaults()  # independent of the user's matplotlibrc
    matplotlib.rcParams.update(SETTINGS)
    runs = [run for group in groups for run in group]
    panels = group_streams(runs)
    columns = ["tokens"] + ["seconds"] * any(run.progress is not None for run in runs)
    heights = [3.6 if panel == "loss" else 2.2 for panel in panels]
    figure = Figure(figsize=(10 if len(columns) > 1 else 7.5, 0.6 + sum(heights)))
    grid = figure.subplots(
        len(panels), len(columns), sharex="col", sharey="row", squeeze=False, height_ratios=heights
    )
    for (panel, streams), row in zip(panels.items(), grid):
        row[0].set_ylabel(LABELS.get(panel, panel))
        for column, axes in zip(columns, row):
            for group, style in zip(groups, itertools.cycle(RUN_STYLES)):
                draw_group(axes, group, streams, column, style)
        on_fineweb = any(run.on_fineweb for run in runs)
        published = PUBLISHED.get(panel, {}) if panel != "loss" or on_fineweb else {}
        draw_published(row, published)
        if panel == "loss":
            row[0].set_ylim(loss_limits(runs, streams, list(published.values())))
    for column, axes in zip(columns, grid[-1]):
        axes.set_xlabel(COLUMNS[column][1])
    figure.align_ylabels()
    draw_legend(figure, groups, panels)
    return figure


def group_streams(runs: list[Run]) -> dict[str, dict[str, str]]:
    """{panel: {stream: marker}}: loss, hella, and the others in alphabetical order.

    The marker is "" for streams that have a value at each step.
    """
    panels = {"loss": {}, "hella": {}}
    for stream in sorted({stream for run in runs for stream in run.streams}):
        is_loss = stream == "train" or stream.startswith("val")
        streams = panels.setdefault("loss" if is_loss else stream, {})
        is_evaluation = stream.startswith(("val", "hella"))
        streams[stream] = MARKERS[len(streams) % len(MARKERS)] if is_evaluation else ""
    return {panel: streams for panel, streams in panels.items() if streams}


def draw_group(axes, group: Group, streams: dict[str, str], column: str, style: dict) -> None:
    """Draws the streams of a panel, by the labels "NAME STREAM", and that with "mean" or "band"."""
    for stream, marker in streams.items():
        steps, values = group.series(stream)
        x = np.mean([run.x_of(steps, column) for run in group], axis=0) / COLUMNS[column][0]
        label = f"{group.name} {stream}"
        if not np.isfinite(x).any():
            continue
        if marker:  # at most 25 on a line, so that they do not touch
            every = slice(None, None, -(len(x) // 25 + 1))  # from the last point backwards
            look = style | EVALUATION | dict(marker=marker, markevery=every)
            axes.plot(x, values.mean(0), label=label, **look)
        else:
            look = style | dict(marker="." if len(x) == 1 else "")  # one point makes no line
            axes.plot(x, values.mean(0), label=label, **look | EACH_STEP)
            values = np.array([smooth(y) for y in values])
            axes.plot(x, values.mean(0), label=f"{label} mean", **look | MEAN)
        if len(group) > 1:
            low, high = values.mean(0) + np.outer((-1, 1), deviation(values))
            axes.fill_between(x, low, high, color=style["color"], label=f"{label} band", **BAND)


def draw_published(row, published: dict[str, float]) -> None:
    """Draws published results as horizontal lines, with their texts right of the last axes."""
    for text, value in published.items():
        for axes in row:
            axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
        place = dict(transform=axes.get_yaxis_transform(), va="center")
        axes.text(1.01, value, text, color=GREY, fontsize=9, **place)


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of the values around each, in a window of SMOOTHED of their number, (n,) to (n,)."""
    window = np.ones(2 * int(len(values) * SMOOTHED / 2) + 1)
    sums, counts = (np.convolve(a, window, "same") for a in (values, np.ones(len(values))))
    return sums / counts


def loss_limits(runs: list[Run], streams, published: list[float]) -> tuple[float, float]:
    """(bottom, top) of the loss axis.

    If the longest run has more than 2,000 steps, the first 3 % of them may leave the axis, since
    the fall from 11 would leave no room for the rest, but the last value of each run may not. A
    loss that diverges leaves at 11.5: a uniform guess among 50,257 tokens has 10.8. If no loss is
    below 11, the axis has them all.
    """
    lines = [run.streams[stream] for run in runs for stream in streams if stream in run.streams]
    longest = max(steps[-1] for steps, _ in lines)
    first = 0.03 * longest if longest > 2000 else 0
    lows, highs = [], published[:]
    for steps, values in lines:
        shown = steps >= min(first, steps[-1])
        lows.append(values[shown].min())
        highs.append(max(values[shown][0], smooth(values)[shown].max()))
    bottom = min(lows + published)
    top = max(min(max(highs), 11.5) if min(lows) < 11 else max(highs), bottom + 0.1)
    margin = 0.04 * (top - bottom)
    return bottom - margin, top + margin


def draw_legend(figure, groups: list[Group], panels: dict[str, dict[str, str]]) -> None:
    """Draws the names of the runs and the kinds of lines below the figure."""
    from matplotlib.lines import Line2D

    handles = []
    for group, style in zip(groups, itertools.cycle(RUN_STYLES)):
        assumed = any(run.progress is None for run in group)
        note = f" ({group[0].batch:,} tokens per step assumed)" if assumed else ""
        handles.append(Line2D([], [], label=group.name + note, **style | MEAN))
    kinds = {"each step": EACH_STEP | dict(alpha=1), f"mean of {SMOOTHED:.0%} of the steps": MEAN}
    evaluations = {stream: marker for stream, marker in panels.get("loss", {}).items() if marker}
    kinds |= {stream: EVALUATION | dict(marker=marker) for stream, marker in evaluations.items()}
    if any(len(group) > 1 for group in groups):
        kinds["standard deviation of the seeds"] = BAND | dict(linewidth=8)
    handles += [Line2D([], [], color=GREY, label=kind, **look) for kind, look in kinds.items()]
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, 110 // (longest + 9))  # the figure is about 110 characters wide
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 0), ncols=columns)


def write_png(figure, path: Path) -> None:
    """Writes the PNG. Raises UserError if that fails; an earlier picture is then unchanged."""
    try:  # two programs may draw the same run at the same time
        with files.replacing(path, writer=str(os.getpid())) as partial:
            figure.savefig(partial, format="png")
    except OSError as error:
        raise UserError(
            f"out={str(path)!r}: cannot be written ({error.strerror or error}); choose another "
            "file: -o PNG"
        ) from None


# -------------------------------------------------------------------------------------------------
# The command line


def parse(arguments: list[str]) -> argparse.Namespace:
    """The settings of a command line. Raises SettingError if they are not valid."""
    parser = Parser(description="Draws curves and prints results of runs.", allow_abbrev=False)
    add = parser.add_argument
    add("logs", nargs="*", metavar="log", help="log directories, or log.txt files [log]")
    add("-o", "--out", metavar="PNG", help="the picture [curves.png beside the first log.txt]")
    options = parser.parse_intermixed_args(arguments)
    if options.out is not None and not options.out.lower().endswith(".png"):
        raise SettingError(f"out={options.out!r}: must end in .png")
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    groups = group_seeds([read_run(name) for name in options.logs or ["log"]])
    path = Path(options.out or groups[0][0].directory / "curves.png")
    write_png(draw(groups), path)
    print(f"{path}: {', '.join(group.name for group in groups)}\n\n{format_table(groups)}")
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
