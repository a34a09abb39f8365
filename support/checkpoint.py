"""Checkpoint directories that are either whole or not there.

A directory is filled under a hidden name, the size and SHA-256 of each file go into `files.json`,
everything is flushed to the disk, and only then it is renamed to its final name: a kill at any
instant leaves the earlier checkpoints as they were.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from support.errors import UserError

MANIFEST = "files.json"
STEP_NAME = re.compile(r"step_(\d{5,})")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Waits until a file or directory is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot flush a directory
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a small file beside its place and renames it there."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        flush(partial)
        os.replace(partial, path)
    except OSError:  # a full disk is not to be kept full
        partial.unlink(missing_ok=True)
        raise


def write_directory(target: Path, fill) -> None:
    """Makes `target` with what `fill(directory)` writes: all of it, or nothing.

    Raises OSError (a full disk, say) with `target` as it was and no partial files left.
    """
    partial = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(partial.iterdir())
        }
        (partial / MANIFEST).write_text(json.dumps(files, indent=2), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            flush(path)
        if target.exists():  # a damaged one that a restarted run writes again
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        partial.rename(target)
        flush(target.parent)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint directory, in a few words, or None if it is whole."""
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
            if sha256(path) != expected["sha256"]:
                return f"{name} was altered (SHA-256)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def list_checkpoints(log_dir: Path) -> dict[int, Path]:
    """{step: directory} of the checkpoints in `log_dir`, oldest first, whole or not."""
    found = {}
    if log_dir.is_dir():
        for path in log_dir.iterdir():
            if (match := STEP_NAME.fullmatch(path.name)) and path.is_dir():
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def newest_whole(log_dir: Path, say=print) -> Path | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    `say(line)` hears of each damaged one that was passed over. Raises UserError where there are
    checkpoints and all are damaged: starting afresh must be the user's decision.
    """
    checkpoints = list_checkpoints(log_dir)
    for path in reversed(checkpoints.values()):
        if (reason := damage(path)) is None:
            return path
        say(f"{path}: damaged, not used: {reason}")
    if checkpoints:
        raise UserError(
            f"log_dir={str(log_dir)!r}: every checkpoint in it is damaged; "
            "remove them to start again, or choose another --log_dir"
        )
    return None


def prune(log_dir: Path, newest: int, keep: int, best: int | None) -> None:
    """Removes all checkpoints but the last `keep` up to step `newest`, and the one of step `best`.

    newest: the step just written. What is above it was passed over as damaged, and goes too, as do
    the partial ones of killed runs. A directory that cannot be removed stays.
    """
    checkpoints = list_checkpoints(log_dir)
    kept = [step for step in checkpoints if step <= newest][-keep:]
    for step, path in checkpoints.items():
        if step not in (*kept, best):
            shutil.rmtree(path, ignore_errors=True)
    for path in (*log_dir.glob(".step_*.partial"), *log_dir.glob(".step_*.replaced")):
        shutil.rmtree(path, ignore_errors=True)
