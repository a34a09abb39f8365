"""Checkpoint directories that are either complete or not there, and what a kill leaves of them.

A directory is filled under a hidden name, the size and SHA-256 of each file go into `files.json`,
everything is synced to the disk, and only then is it renamed to its final name. A kill at any
instant leaves the earlier checkpoints as they were.

On a GPU a thread writes it, from a copy in the memory of the host, while the next steps run.
"""

import json
import re
import shutil
import threading
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.utils._pytree import tree_map_only

from support.device_clock import Instant
from support.errors import SettingError, UserError
from support.files import replacing, sha256, sync
from support.launch import print0

MANIFEST = "files.json"


def step_directory(log_dir, step: int) -> Path:
    """The directory of the checkpoint after `step` steps."""
    return Path(log_dir) / f"step_{step:05d}"


def step_of(directory: Path) -> int:
    """The step in a checkpoint's name; 0 for any other directory."""
    match = re.fullmatch(r"step_(\d{5,})", directory.name)
    return int(match[1]) if match else 0


def write_directory(target: Path, fill) -> None:
    """Creates `target` with the files that `fill(directory)` writes: all of them, or none.

    An existing `target` is a damaged checkpoint that a restarted run writes again.
    Raises OSError (e.g. a full disk) with no partial files left.
    """
    with replacing(target) as partial:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed run
        partial.mkdir(parents=True)
        fill(partial)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(partial.iterdir())
        }
        (partial / MANIFEST).write_text(json.dumps(files, indent=2), encoding="utf-8")
        for path in partial.iterdir():
            sync(path)
        if target.exists():
            shutil.rmtree(target)
    sync(target.parent)


def try_directory(log_dir: Path) -> None:
    """Writes a small checkpoint and removes it. Raises UserError if that is not possible."""
    trial = log_dir / ".trial"
    try:
        write_directory(trial, lambda directory: (directory / "file").write_text("content"))
        shutil.rmtree(trial)
    except OSError as error:
        raise UserError(
            f"log_dir={str(log_dir)!r}: checkpoints cannot be written there ({error}); make room, "
            "or choose a --log_dir on another file system"
        ) from None


def save(log_dir: Path, step: int, fill) -> None:
    """Writes the checkpoint after `step` steps. Raises UserError if the disk is full."""
    directory = step_directory(log_dir, step)
    try:
        write_directory(directory, fill)
    except (OSError, SafetensorError, RuntimeError) as error:  # a full disk raises all three
        raise UserError(
            f"log_dir={str(log_dir)!r}: the checkpoint of step {step} could not be written "
            f"({str(error).strip()}); {describe_newest(log_dir)}; make room and run the same "
            "command again"
        ) from None
    print0(f"step {step:5d} | saved {directory}")


def copy_to_host(value, asynchronous: bool):
    """`value` with all tensors in its dicts, lists and tuples on the CPU.

    asynchronous: whether the device is a GPU: then they are copies, in pinned memory, that the next
        steps do not change; else those of a CPU are returned as they are
    """

    def copy(tensor):
        return tensor.detach().to("cpu", non_blocking=asynchronous, copy=asynchronous)

    copied = tree_map_only(torch.Tensor, copy, value)
    Instant(asynchronous).wait()
    return copied


class Writer:
    """Makes one call at a time, each in a thread if `background`.

    What a call raises is raised by the next `check`, `wait` or `start`.
    """

    def __init__(self, background: bool):
        self.background, self.thread, self.error = background, None, None

    def start(self, write) -> None:
        """Calls `write()` when the last call has ended."""
        self.wait()
        if not self.background:
            return write()
        # A daemon, for which the interpreter does not wait when ^C interrupts the run.
        self.thread = threading.Thread(target=self._run, args=(write,), daemon=True)
        self.thread.start()

    def _run(self, write) -> None:
        try:
            write()
        except BaseException as error:
            self.error = error

    def check(self) -> None:
        """Raises the error of a call that has failed."""
        if error := self.error:
            self.error = None
            raise error

    def wait(self) -> None:
        """Returns when the last call has ended. Raises its error."""
        if self.thread:
            self.thread.join()
        self.check()


def check_finite(name: str | None, log_dir: Path, step: int, max_lr: float) -> None:
    """Raises SettingError if `name` is that of a parameter that is not finite after `step` steps.

    name: None: all are
    """
    if name:
        raise SettingError(
            f"max_lr={max_lr}: {name} is not finite after step {step - 1}, so it is not saved; "
            f"{describe_newest(log_dir)}; try a lower one in another --log_dir"
        )


def find_problem(directory: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint directory, in a few words; None if it is valid.

    hashes: False: only look for missing files and wrong sizes, which takes no time
    """
    try:
        files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if not files:
            return f"{MANIFEST} lists no file"
        for name, expected in files.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {expected['bytes']:,}"
            if hashes and sha256(path) != expected["sha256"]:
                return f"{name} was altered (SHA-256)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def list_checkpoints(log_dir: Path) -> dict[int, Path]:
    """{step: directory} of the checkpoints in `log_dir`, oldest first, valid or not."""
    found = {step_of(path): path for path in log_dir.glob("step_*") if path.is_dir()}
    found.pop(0, None)  # other directories
    return dict(sorted(found.items()))


def newest_valid(log_dir: Path, file=None) -> Path | None:
    """The newest valid checkpoint in `log_dir`; None if it holds no checkpoint.

    Prints a line for each damaged checkpoint that it skips (to `file`, default standard output).
    Raises UserError if all are damaged: starting over must be the user's decision.
    """
    checkpoints = list_checkpoints(log_dir)
    for path in reversed(checkpoints.values()):
        if (problem := find_problem(path)) is None:
            return path
        print0(f"{path}: damaged, not used: {problem}", file=file)
    if checkpoints:
        raise UserError(
            f"log_dir={str(log_dir)!r}: every checkpoint in it is damaged; "
            "remove them to start over, or choose another --log_dir"
        )
    return None


def is_finished(newest: Path | None, record: dict, max_steps: int) -> bool:
    """Whether the newest checkpoint is the end, at `max_steps`, of a run that `record` calls ended.

    record: content of run.json. In a copy of a directory that changed meanwhile, `log.txt` may be
    the older one: then the run is not finished.
    """
    if not newest or not step_of(newest) == record.get("finished_step") == max_steps:
        return False
    log = newest.parent / "log.txt"
    return log.exists() and log.stat().st_size >= record.get("log_bytes", 0)


def require_newest(log_dir: Path) -> Path:
    """The newest valid checkpoint in `log_dir`. Raises SettingError if there is none."""
    if (newest := newest_valid(log_dir)) is None:
        raise SettingError(
            f"log_dir={str(log_dir)!r}: no checkpoint in it; choose another, or name a model by "
            "--init_from"
        )
    return newest


def describe_newest(log_dir: Path) -> str:
    """A few words on the newest checkpoint, for an error message."""
    steps = list(list_checkpoints(log_dir))
    return f"the last good checkpoint is {f'step_{steps[-1]:05d}' if steps else 'none'}"


def load_state(path: Path) -> dict:
    """The content of a `train_state.pt`, loaded without running code that may be in it.

    Raises UserError if it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: cannot be read ({reason}); remove {path.parent}") from None


def prune(log_dir: Path, newest: int, keep: int, *others: int | None) -> None:
    """Removes all checkpoints but the last `keep` up to step `newest` and those of steps `others`.

    newest: the step written last. Later ones are damaged checkpoints that the run skipped, and are
    removed, as are the partial directories of killed runs. What cannot be removed stays.
    """
    checkpoints = list_checkpoints(log_dir)
    kept = [step for step in checkpoints if step <= newest][-keep:]
    for step, path in checkpoints.items():
        if step not in (*kept, *others):
            shutil.rmtree(path, ignore_errors=True)
    for path in log_dir.glob(".step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)
