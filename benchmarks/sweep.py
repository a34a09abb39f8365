"""Trains a list of settings with several seeds, and compares their validation losses.

    python benchmarks/sweep.py optimizers.json --out=sweep             # train all that is missing
    python benchmarks/sweep.py optimizers.json --out=sweep --report    # and score text of its own
    python benchmarks/sweep.py optimizers.json --out=sweep --only=muon,adamw

The file holds settings of train_gpt2.py. The first of `runs` is the base of the differences:

    {
        "common": {"data": "corpus", "n_layer": 6, "max_steps": 160},
        "runs": {"adamw": {"max_lr": 4e-3}, "muon": {"optimizer": "muon"}},
        "seeds": [1337, 1, 2],
        "report_data": "other_corpus"
    }

Each run has a log directory `OUT/NAME/SEED`. Started again, the program continues where it was
stopped: a finished run is left alone, and any other one continues from its newest checkpoint. A run
whose settings were changed is refused by the trainer.

Settings are chosen by the validation set of `data`, so a loss on it is too good for the one that is
chosen. With --report the table shows the loss of each final checkpoint on the validation set of
`report_data`, which no choice has seen.
"""

import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.cli import Parser  # noqa: E402
from support.errors import SettingError, UserError, run_main  # noqa: E402
from support.files import write_text  # noqa: E402


@dataclass
class Sweep:
    """The content of a file of settings."""

    common: dict
    runs: dict[str, dict]
    seeds: list[int]
    report_data: str = ""


def read_sweep(path: Path) -> Sweep:
    """The sweep in a JSON file. Raises UserError if the file does not hold one."""
    try:
        sweep = Sweep(**json.loads(path.read_text(encoding="utf-8")))
        if not (sweep.runs and sweep.seeds):
            raise ValueError("it has no runs, or no seeds")
        return sweep
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a sweep ({error}); see benchmarks/sweep.py --help") from None


def call_trainer(settings: dict) -> str:
    """What `train_gpt2.py gpt2` prints with these settings. Raises UserError if it fails."""
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, str(ROOT / "train_gpt2.py"), "gpt2", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if ended.returncode:
        last = (ended.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"log_dir={settings['log_dir']!r}: code {ended.returncode}: {last}")
    return ended.stdout


def train(settings: dict, log_dir: Path) -> float:
    """The final validation loss of a run, which is trained unless it is finished."""
    call_trainer(settings | {"log_dir": log_dir})
    record = (log_dir / "run.json").read_text(encoding="utf-8")
    return json.loads(record)["result"]["val_loss"]


def report(settings: dict, log_dir: Path, data: str) -> float:
    """The loss of a finished run on the validation set of `data`, kept in `report.json`."""
    path = log_dir / "report.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    key = f"{data}, {settings.get('max_steps')} steps, {settings.get('val_tokens')} tokens"
    if key not in found:
        options = dict(log_dir=log_dir, data=data, eval_only=True, hellaswag_every=0)
        output = call_trainer(settings | options | {"sample_every": 0})
        found[key] = float(re.search(r"^val_loss: (\S+)$", output, re.M)[1])
        write_text(path, json.dumps(found))
    return found[key]


def format_table(losses: dict[str, list[float]]) -> str:
    """A Markdown table of the runs: mean, standard deviation, n, and the difference to the first
    one with its standard error (Welch)."""
    rows = ["| run | mean | s | n | - base | standard error |", "| --- |" + " ---: |" * 5]
    base, *_ = losses.values()
    for name, values in losses.items():
        s, s_base = (statistics.stdev(v) if len(v) > 1 else math.nan for v in (values, base))
        error = math.hypot(s / len(values) ** 0.5, s_base / len(base) ** 0.5)
        mean, difference = statistics.mean(values), statistics.mean(values) - statistics.mean(base)
        compared = f"{difference:+.4f} | {error:.4f}" if values is not base else " | "
        rows.append(f"| {name} | {mean:.4f} | {s:.4f} | {len(values)} | {compared} |")
    return "\n".join(rows)


def main() -> int:
    parser = Parser(description="Compares settings of the trainer over several seeds.")
    parser.add_argument("file", type=Path, help="JSON: common, runs, seeds, report_data")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--only", default="", help="names of runs, with commas between [all]")
    parser.add_argument("--report", action="store_true", help="score the text of report_data")
    options = parser.parse_args(sys.argv[1:])
    sweep = read_sweep(options.file)
    names = options.only.split(",") if options.only else list(sweep.runs)
    if unknown := set(names) - set(sweep.runs):
        raise SettingError(f"only={options.only!r}: no run {min(unknown)!r} in {options.file}")
    if options.report and not sweep.report_data:
        raise SettingError(f"{options.file}: --report needs report_data, a directory of shards")
    losses = {}
    for seed in sweep.seeds:  # all runs with the first seed come first
        for name in names:
            log_dir = options.out / name / str(seed)
            settings = sweep.common | sweep.runs[name] | {"seed": seed}
            loss = train(settings, log_dir)
            if options.report:
                loss = report(settings, log_dir, sweep.report_data)
            losses.setdefault(name, []).append(loss)
            print(f"{name}, seed {seed}: {loss:.4f}", flush=True)
    print(f"\n{format_table(losses)}")
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
