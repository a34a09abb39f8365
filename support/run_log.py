"""The files of a log directory (`log.txt`, `progress.txt`, `run.json`, `curves.png`), and whether
its run may be continued."""

import contextlib
import json
import platform
import subprocess
import sys
from pathlib import Path

from support.checkpoint import list_checkpoints
from support.errors import SettingError, UserError
from support.files import write_text
from support.launch import print0
from support.log_files import read_fields

ROOT = Path(__file__).resolve().parent.parent
REMEDY = "give that value to continue it, or another --log_dir to start a new run"


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error for a file of the log directory that cannot be written."""
    return UserError(
        f"{path}: cannot be written ({error.strerror}); make room and run the same command again, "
        "or choose another --log_dir"
    )


def append(path: Path, line: str) -> None:
    """Adds a line to a file. Raises UserError if it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(line)
    except OSError as error:
        raise cannot_write(path, error) from None


def replace(path: Path, text: str) -> None:
    """Writes a text file and its directory. Raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise cannot_write(path, error) from None


def remove_steps(path: Path, step: int) -> None:
    """Removes the lines of `step` and later ones, which the run repeats.

    A line begins with its step; any other complete line stays as it is.
    """
    lines = []
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = list(file)
    kept = []
    for line in lines:
        first = line.split(maxsplit=1)[:1]
        repeated = first and first[0].isdecimal() and int(first[0]) >= step
        if line.endswith("\n") and not repeated:
            kept.append(line)
    replace(path, "".join(kept))


class RunLog:
    """`log.txt` and `progress.txt`, to which each step appends its lines.

    `log.txt` has a line `step stream value` for each value of a step; it is equal for two equal
    runs. `progress.txt` has a line `step tokens seconds` for each step: what the run had trained on
    at its end, and the time of the training steps so far, without those that a kill undid.
    """

    def __init__(self, log_dir: Path):
        self.path, self.progress_path = log_dir / "log.txt", log_dir / "progress.txt"
        self.seconds = 0.0

    def read(self) -> list[tuple[int, str, float]]:
        """The complete lines of `log.txt` so far; lines of another form are skipped."""
        values = []
        for step, stream, value in read_fields(self.path):
            with contextlib.suppress(ValueError):
                values.append((int(step), stream, float(value)))
        return values

    def write(self, step: int, stream: str, value: float) -> None:
        """Appends the value of a step. Raises UserError if it cannot be written."""
        append(self.path, f"{step} {stream} {value:.6f}\n")

    def write_progress(self, step: int, tokens: int, dt_s: float) -> None:
        """tokens: trained on so far; dt_s: seconds that this step took"""
        self.seconds += dt_s
        append(self.progress_path, f"{step} {tokens} {self.seconds:.3f}\n")

    def remove_steps(self, step: int) -> None:
        """Removes what a killed run wrote for `step` and later ones."""
        remove_steps(self.path, step)
        remove_steps(self.progress_path, step)
        with contextlib.suppress(IndexError, ValueError):
            self.seconds = float(read_fields(self.progress_path)[-1][2])

    def best(self, steps) -> int | None:
        """The step among `steps` with the lowest validation loss so far."""
        losses = {step: value for step, stream, value in self.read() if stream == "val"}
        return min((s for s in steps if s in losses), key=losses.get, default=None)


class Curves:
    """`curves.png`, drawn by `plot.py` in a separate process, so that no step waits for it.

    A picture that cannot be drawn is reported once and does not stop the run.
    """

    def __init__(self, log_dir: Path):
        self.log_dir, self.process, self.failed = log_dir, None, False

    def draw(self, wait: bool) -> None:
        """Starts to draw the current log, unless the last picture is still being drawn.

        wait: first wait for the last picture, and then for this one (60 s each at most)
        """
        self.collect(60 if wait else 0)
        if self.process is None:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, str(ROOT / "plot.py"), str(self.log_dir)],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                    text=True, errors="replace", start_new_session=True,  # ^C is for the run
                )  # fmt: skip
            except OSError as error:
                self.report_failure(error.strerror)
        if wait:
            self.collect(60)

    def collect(self, timeout_s: float) -> None:
        """Waits for the process, so many seconds at most, and reports its first failure."""
        if self.process is None:
            return
        try:
            errors = self.process.communicate(timeout=timeout_s)[1].strip()
        except subprocess.TimeoutExpired:
            return
        if self.process.returncode:
            lines = (errors or f"exit code {self.process.returncode}").splitlines()
            self.report_failure(lines[-1])
        self.process = None

    def report_failure(self, reason: str) -> None:
        """Prints why the picture was not drawn, the first time."""
        if not self.failed:
            print0(f"{self.log_dir / 'curves.png'}: not drawn ({reason}); the run continues")
        self.failed = True


# -------------------------------------------------------------------------------------------------
# run.json, and whether the run that it describes may be continued


def read_run_json(log_dir: Path, resume: bool) -> dict:
    """The content of `run.json` of the run in `log_dir`; {} if there is no run.

    Raises SettingError if there is one and `resume` is False, if it is damaged, or if the directory
    belongs to another program.
    """
    path, log = log_dir / "run.json", log_dir / "log.txt"
    checkpoints = list_checkpoints(log_dir)
    if not resume and (path.exists() or log.exists() or checkpoints):
        raise SettingError(
            f"resume=False: log_dir={str(log_dir)!r} holds a run; choose another --log_dir, or "
            "omit resume=False to continue it"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "data" not in content:
            raise ValueError("not a description of a run")
        if "max_steps" not in content.get("settings", {}):
            raise ValueError("no setting max_steps")
        return content
    except FileNotFoundError:
        if log.exists() and not checkpoints:
            raise SettingError(
                f"log_dir={str(log_dir)!r}: holds a log.txt but no run.json, so it belongs to "
                "another program; choose another --log_dir"
            ) from None
        return {}
    except NotADirectoryError:
        raise SettingError(
            f"log_dir={str(log_dir)!r}: not a directory; choose another --log_dir"
        ) from None
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror}; choose another --log_dir") from None
    except (ValueError, TypeError) as error:
        remedy = "remove it to continue this run" if checkpoints else "choose another --log_dir"
        raise SettingError(f"{path}: damaged ({error}); {remedy}") from None


def write_run_json(log_dir: Path, content: dict) -> None:
    """Writes `run.json`: `content`, the versions in use, and the commit of this repository."""
    import numpy
    import torch

    try:
        git = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
    }
    content = content | {"versions": versions, "commit": commit}
    replace(log_dir / "run.json", json.dumps(content, indent=2) + "\n")


def check_resume(
    settings: dict, data: str | None, earlier: dict, may_change: set[str], log_dir: Path
) -> None:
    """Raises SettingError if the run in `log_dir` cannot continue with these settings or data.

    data: fingerprint of the training tokens; None: not known yet
    earlier: content of run.json or of a checkpoint: at least its `settings` and `data`
    may_change: names of the settings that need not match; max_steps may only grow
    """
    where = f"log_dir={str(log_dir)!r} holds a run with"
    before = earlier["settings"]
    for name in settings:
        if name not in may_change and settings[name] != before.get(name):
            raise SettingError(
                f"{name}={settings[name]!r}: {where} {name}={before.get(name)!r}; {REMEDY}"
            )
    if settings["max_steps"] < before["max_steps"]:
        raise SettingError(
            f"max_steps={settings['max_steps']}: {where} max_steps={before['max_steps']}, which "
            f"may only grow; {REMEDY}"
        )
    if data is not None and data != earlier["data"]:
        raise SettingError(
            f"data={settings['data']!r}: not the tokens that the run in log_dir={str(log_dir)!r} "
            f"trains on; {REMEDY}"
        )
