"""The files of a log directory (`log.txt`, `progress.txt`, `run.json`, `curves.png`), and whether
its run may be continued."""

import contextlib
import hashlib
import json
import math
import platform
import subprocess
import sys
import threading
from pathlib import Path

from support.errors import SettingError, UserError
from support.files import write_text
from support.launch import print0

ROOT = Path(__file__).resolve().parent.parent
LOG_TYPES = (int, str, float)  # step, stream, value
PROGRESS_TYPES = (int, int, float)  # step, tokens, seconds
REMEDY = "give that value to continue it, or another --log_dir to start a new run"


@contextlib.contextmanager
def writing(path: Path):
    """A context that raises UserError if a file of the log directory cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); make room and run the same command "
            "again, or choose another --log_dir"
        ) from None


def replace(path: Path, text: str) -> None:
    """Writes a text file and its directory. Raises UserError if it cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def read_lines(path: Path) -> list[str]:
    """The complete lines of a file: without a last one that is being written, or that a kill cut.

    Raises OSError.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        return [line for line in file if line.endswith("\n")]


def read_rows(path: Path, types: tuple[type, ...]) -> list[tuple]:
    """The fields of each complete line of `log.txt` or `progress.txt`, as values of `types`.

    Lines of another form are skipped. Raises OSError.
    """
    rows = []
    for line in read_lines(path):
        with contextlib.suppress(ValueError):
            fields = zip(types, line.split(), strict=True)
            rows.append(tuple(convert(field) for convert, field in fields))
    return rows


def lines_before(step: int, text: str) -> list[str]:
    """The lines of a text, without those that begin with the number of `step` or a later one."""
    kept = []
    for line in text.split("\n")[:-1]:
        first, *_ = line.split(maxsplit=1) or [""]
        if not first.isdecimal() or int(first) < step:
            kept.append(line + "\n")
    return kept


class RunLog:
    """`log.txt` and `progress.txt`, to which each step appends its lines.

    `log.txt` has a line `step stream value` for each value of a step; it is equal for two equal
    runs. `progress.txt` has a line `step tokens seconds` for each step: what the run had trained on
    at its end, and the time of the training steps so far, without those that a kill undid.
    """

    def __init__(self, log_dir: Path):
        self.path, self.progress_path = log_dir / "log.txt", log_dir / "progress.txt"
        self.seconds = 0.0
        self.val_losses = {}  # {step: validation loss} so far
        self.saved = {}  # `texts` in the checkpoint that is continued

    def write(self, step: int, stream: str, value: float) -> None:
        """Appends the value of a step. Raises UserError if it cannot be written."""
        if stream == "val":
            self.val_losses[step] = round(value, 6)  # as a resumed run reads it
        self.append(self.path, f"{step} {stream} {value:.6f}\n")

    def write_progress(self, step: int, tokens: int, dt_s: float) -> None:
        """tokens: trained on so far; dt_s: seconds that this step took"""
        self.seconds += dt_s
        self.append(self.progress_path, f"{step} {tokens} {self.seconds:.3f}\n")

    def append(self, path: Path, line: str) -> None:
        """Adds a line to one of the files. Raises UserError if it cannot be written."""
        with writing(path), open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(line)

    def texts(self) -> dict[str, str]:
        """{file name: content}, of which a checkpoint contains a copy."""
        files = self.path, self.progress_path
        return {path.name: "".join(read_lines(path)) for path in files if path.exists()}

    def remove_steps(self, step: int) -> None:
        """Removes the lines of `step` and later ones, which the run repeats, and reads the others.

        A line begins with its step; any other complete line stays as it is.
        A file that lacks a line of the checkpoint's copy was itself copied before the checkpoint,
        or a power cut took its end: it is replaced.
        """
        now = self.texts()
        for path in (self.path, self.progress_path):
            lines, expected = (lines_before(step, t.get(path.name, "")) for t in (now, self.saved))
            replace(path, "".join(lines if set(expected) <= set(lines) else expected))
        for *_, seconds in read_rows(self.progress_path, PROGRESS_TYPES):
            self.seconds = seconds
        rows = read_rows(self.path, LOG_TYPES)
        self.val_losses = {step: value for step, stream, value in rows if stream == "val"}

    def best(self, steps) -> int | None:
        """The step among `steps` with the lowest validation loss so far."""
        steps = [step for step in steps if math.isfinite(self.val_losses.get(step, math.nan))]
        return min(steps, key=self.val_losses.get, default=None)


class Curves:
    """`curves.png`, drawn by `plot.py` in a separate process, so that no step waits for it.

    A picture that cannot be drawn is reported once and does not stop the run.
    """

    timeout_s = 60  # for one picture

    def __init__(self, log_dir: Path):
        self.log_dir, self.thread, self.failed = log_dir, None, False

    def draw(self, wait: bool) -> None:
        """Starts to draw the current log, unless the last picture is still being drawn.

        wait: first wait for the last picture, and then for this one
        """
        if self.thread and wait:
            self.thread.join()
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self.run_plot, daemon=True)
            self.thread.start()
        if wait:
            self.thread.join()

    def run_plot(self) -> None:
        """Runs `plot.py`, and prints why there is no picture, the first time."""
        try:
            done = subprocess.run(
                [sys.executable, str(ROOT / "plot.py"), str(self.log_dir)],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                timeout=self.timeout_s, start_new_session=True,  # ^C is for the run
            )  # fmt: skip
            code, errors = done.returncode, done.stderr
        except (OSError, subprocess.TimeoutExpired) as error:
            code, errors = 1, str(error)
        if code and not self.failed:
            self.failed = True
            reason = (errors.strip() or f"exit code {code}").splitlines()[-1]
            print0(f"{self.log_dir / 'curves.png'}: not drawn ({reason}); the run continues")


# -------------------------------------------------------------------------------------------------
# run.json, and whether the run that it describes may be continued


def read_run_json(log_dir: Path, resume: bool) -> dict:
    """The content of `run.json` of the run in `log_dir`; {} if there is no run.

    Raises SettingError if there is one and `resume` is False, if it is damaged, or if the directory
    belongs to another program.
    """
    from support.checkpoint import list_checkpoints  # imports torch, which plot.py does not need

    path, log = log_dir / "run.json", log_dir / "log.txt"
    where, checkpoints = f"log_dir={str(log_dir)!r}", list_checkpoints(log_dir)
    if not resume and (path.exists() or log.exists() or checkpoints):
        raise SettingError(
            f"resume=False: {where} holds a run; choose another --log_dir, or omit resume=False to "
            "continue it"
        )
    try:
        for file in (log, log_dir / "progress.txt"):
            if file.exists():
                open(file, "rb").close()  # what cannot be read is reported before a file changes
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = content["settings"]
        is_run = isinstance(settings, dict) and type(settings["max_steps"]) is int
        if not is_run or "data" not in content:
            raise ValueError("not a description of a run")
        return content
    except FileNotFoundError:
        if log.exists() and not checkpoints:
            raise SettingError(
                f"{where}: holds a log.txt but no run.json, so it belongs to another program; "
                "choose another --log_dir"
            ) from None
        return {}
    except OSError as error:  # log_dir is a file, or may not be read
        reason = f"{error.filename}: {error.strerror}"
        raise SettingError(f"{where}: {reason}; choose another --log_dir") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = "remove it to continue this run" if checkpoints else "choose another --log_dir"
        raise SettingError(f"{path}: damaged ({error}); {remedy}") from None


def describe_software() -> dict:
    """The versions in use, the commit of this repository, and `changes` to it (None: unknown).

    changes: the first 16 hexadecimal digits of the SHA-256 of `git diff HEAD`; None if it is empty
    """
    import numpy
    import torch

    from support.devices import cudnn_version

    def git(*arguments: str) -> bytes:
        try:
            options = ["-c", f"safe.directory={ROOT}", "-C", ROOT]  # another user may own it
            return subprocess.run(["git", *options, *arguments], capture_output=True).stdout
        except OSError:  # git is not installed
            return b""

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn_version(),
    }
    commit = git("rev-parse", "--verify", "--quiet", "HEAD").decode().strip()
    diff = git("diff", "HEAD")
    changes = hashlib.sha256(diff).hexdigest()[:16] if diff else None
    return {"versions": versions, "commit": commit or None, "changes": changes}


def write_run_json(log_dir: Path, content: dict) -> None:
    """Writes `run.json`. Raises UserError if it cannot be written."""
    replace(log_dir / "run.json", json.dumps(content, indent=2) + "\n")


def check_resume(
    settings: dict, may_change: set[str], earlier: dict, data: str | None = None
) -> None:
    """Raises SettingError if the run in `log_dir` cannot continue with these settings or data.

    may_change: names of the settings that need not match; max_steps may only grow
    earlier: content of run.json or of a checkpoint: at least its `settings` and `data`; {}: no run
    data: fingerprint of the training tokens; None: not known yet
    """
    if not earlier:
        return
    if settings["init_from"] != "scratch":  # the model decides its shape
        may_change = may_change | {"n_layer", "n_head", "n_embd"}
    where, before = f"log_dir={settings['log_dir']!r}", earlier["settings"]
    for name in settings | before:  # also those that only one of the two has
        value, old, grows = settings.get(name), before.get(name), name == "max_steps"
        if value != old and (name not in may_change or (grows and value < old)):
            if name not in before:
                raise SettingError(f"{name}={value!r}: {where} holds a run of a version without it")
            raise SettingError(
                f"{name}={value!r}: {where} holds a run with {name}={old!r}"
                f"{', which may only grow' if grows else ''}; {REMEDY}"
            )
    if data is not None and data != earlier["data"]:
        raise SettingError(
            f"data={settings['data']!r}: not the tokens that the run in {where} trains on; {REMEDY}"
        )
