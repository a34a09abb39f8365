"""What a log directory says of its run: `log.txt`, `run.json`, and whether it may be continued."""

import dataclasses
import json
import platform
import subprocess
import sys
from pathlib import Path

from support import checkpoint
from support.errors import SettingError, UserError

AFRESH = "give that to continue it, or another --log_dir to start afresh"


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error to raise when a file of the log directory cannot be written."""
    return UserError(
        f"{path}: cannot be written ({error.strerror}); make room and run the same command again, "
        "or choose another --log_dir"
    )


def whole_lines(path: Path) -> list[list[str]]:
    """The three fields of each line; a kill may have left the last one without its end."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    fields = [line.split() for line in lines if line.endswith("\n")]
    return [f for f in fields if len(f) == 3]


def append(path: Path, line: str) -> None:
    """Adds a line to a file. Raises UserError where there is no room."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(line)
    except OSError as error:
        raise cannot_write(path, error) from None


def replace(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it there. Raises UserError as `append` does."""
    try:
        checkpoint.write_text(path, text)
    except OSError as error:
        raise cannot_write(path, error) from None


class RunLog:
    """`log.txt`: a line `step stream value` for each value of each step, appended at once."""

    def __init__(self, log_dir: Path):
        self.path = log_dir / "log.txt"

    def read(self) -> list[tuple[int, str, float]]:
        """The whole lines so far."""
        return [(int(f[0]), f[1], float(f[2])) for f in whole_lines(self.path)]

    def cut(self, step: int) -> None:
        """Forgets what a killed run logged from `step` on, which is about to be done again."""
        kept = [self.line(*values) for values in self.read() if values[0] < step]
        replace(self.path, "".join(kept))

    def write(self, step: int, stream: str, value: float) -> None:
        """Appends the value of a step. Raises UserError where there is no room."""
        append(self.path, self.line(step, stream, value))

    @staticmethod
    def line(step: int, stream: str, value: float) -> str:
        """A line of the file."""
        return f"{step} {stream} {value:.6f}\n"

    def best(self, steps) -> int | None:
        """The step among `steps` with the lowest validation loss so far."""
        losses = {step: value for step, stream, value in self.read() if stream == "val"}
        return min((s for s in steps if s in losses), key=losses.get, default=None)


class Progress:
    """`progress.txt`: a line `step tokens seconds` for each step, of what the run had trained on
    and taken for that at its end. Evaluations, and what a kill undid, do not count.

    Apart from `log.txt`, which has nothing in it that two equal runs do not have in common.
    """

    def __init__(self, log_dir: Path):
        self.path, self.seconds = log_dir / "progress.txt", 0.0

    def cut(self, step: int) -> None:
        """Forgets what a killed run wrote from `step` on."""
        kept = [fields for fields in whole_lines(self.path) if int(fields[0]) < step]
        self.seconds = float(kept[-1][2]) if kept else 0.0
        replace(self.path, "".join(" ".join(fields) + "\n" for fields in kept))

    def write(self, step: int, tokens: int, seconds: float) -> None:
        """seconds: of this step"""
        self.seconds += seconds
        append(self.path, f"{step} {tokens} {self.seconds:.3f}\n")


class Curves:
    """`curves.png`, drawn by `plot.py` in a process of its own, for which no step waits.

    A picture that cannot be drawn is told, once, and harms nothing.
    """

    def __init__(self, log_dir: Path, say):
        self.log_dir, self.say = log_dir, say
        self.drawing, self.failed = None, False

    def refresh(self) -> None:
        """Draws the log as it is now, unless the last picture is still being drawn."""
        if self.drawing is None or self.drawing.poll() is not None:
            self.wait(0)
            program = Path(__file__).resolve().parent.parent / "plot.py"
            try:
                self.drawing = subprocess.Popen(
                    [sys.executable, str(program), str(self.log_dir)],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                    text=True, errors="replace", start_new_session=True,  # ^C is for the run
                )  # fmt: skip
            except OSError as error:
                self.tell(error.strerror)

    def wait(self, timeout_s: float) -> None:
        """Returns when the last picture is drawn, or after so many seconds."""
        if self.drawing is None:
            return
        try:
            errors = self.drawing.communicate(timeout=timeout_s)[1].strip()
        except subprocess.TimeoutExpired:
            return
        if self.drawing.returncode:
            self.tell(errors.splitlines()[-1] if errors else f"code {self.drawing.returncode}")
        self.drawing = None

    def finish(self) -> None:
        """Draws the whole log, and waits for that."""
        self.wait(60)
        self.refresh()
        self.wait(60)

    def tell(self, problem: str) -> None:
        """Says what went wrong, the first time."""
        if not self.failed:
            self.say(f"{self.log_dir / 'curves.png'}: not drawn ({problem}); the run goes on")
        self.failed = True


def read_facts(log_dir: Path, resume: bool) -> dict:
    """`run.json` of the run in `log_dir`, or {} where there is no run.

    Raises SettingError where there is one and `resume` is False, or it is damaged, or the directory
    is another program's.
    """
    path, log = log_dir / "run.json", log_dir / "log.txt"
    checkpoints = checkpoint.list_checkpoints(log_dir)
    if not resume and (path.exists() or log.exists() or checkpoints):
        raise SettingError(
            f"resume=False: log_dir={str(log_dir)!r} holds a run; choose another --log_dir, or "
            "leave resume out to continue it"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or "data" not in facts:
            raise ValueError("no record of a run")
        if "max_steps" not in facts.get("settings", {}):
            raise ValueError("no setting max_steps")
        return facts
    except FileNotFoundError:
        if log.exists() and not checkpoints:
            raise SettingError(
                f"log_dir={str(log_dir)!r}: holds a log.txt but no run.json, so it is another "
                "program's; choose another --log_dir"
            ) from None
        return {}
    except NotADirectoryError:
        raise SettingError(
            f"log_dir={str(log_dir)!r}: no directory; choose another --log_dir"
        ) from None
    except OSError as error:
        raise SettingError(f"{path}: {error.strerror}; choose another --log_dir") from None
    except (ValueError, TypeError) as error:
        remedy = "remove it to continue this run" if checkpoints else "choose another --log_dir"
        raise SettingError(f"{path}: damaged ({error}); {remedy}") from None


def check_same_run(config, earlier: dict, names, log_dir: Path) -> None:
    """Raises SettingError where one of the settings `names` contradicts the run in `log_dir`.

    earlier: that run's settings; its max_steps may grow. One that this program did not have yet
    when the run began was what is the default now.
    """
    where = f"log_dir={str(log_dir)!r} holds a run with"
    earlier = {field.name: field.default for field in dataclasses.fields(config)} | earlier
    for name in names:
        if earlier[name] != getattr(config, name):
            raise SettingError(
                f"{name}={getattr(config, name)!r}: {where} {name}={earlier[name]!r}; {AFRESH}"
            )
    if config.max_steps < earlier["max_steps"]:
        raise SettingError(
            f"max_steps={config.max_steps}: {where} max_steps={earlier['max_steps']}, which may "
            f"only grow; {AFRESH}"
        )


def check_same_data(data: str, fingerprint: str, earlier: str, log_dir: Path) -> None:
    """Raises SettingError where the training tokens are not those that the run began with."""
    if fingerprint != earlier:
        raise SettingError(
            f"data={data!r}: other tokens than the run in log_dir={str(log_dir)!r} trains on; "
            f"{AFRESH}"
        )


def write_facts(log_dir: Path, facts: dict) -> None:
    """Makes `log_dir`, if need be, and writes `run.json`."""
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(log_dir / "run.json", json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise cannot_write(log_dir / "run.json", error) from None


def facts_of(config, **facts) -> dict:
    """What `run.json` records: the settings, versions and commit, and the facts given."""
    import numpy
    import torch

    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here), "rev-parse", "--verify", "--quiet", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        commit = None
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
    }
    return {
        "settings": dataclasses.asdict(config),
        **facts,
        "versions": versions,
        "commit": commit,
    }
