"""Files that are either complete or not there: written under a temporary name, then renamed."""

import contextlib
import errno
import hashlib
import os
import shutil
from pathlib import Path


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# What file systems answer that have no fsync, or none for a directory (some of FUSE and SMB).
NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


def sync(path: Path) -> None:
    """Returns when the content of a file or directory is on the disk (fsync), if that is possible.

    Raises OSError if it is possible and fails.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    except OSError:
        if path.is_dir():  # which Windows and some file systems do not open
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, writer: str = ""):
    """A context that yields a temporary path, and renames it to `path` at the end.

    The block writes a file or directory at the temporary path. If it raises, `path` is as it was
    and nothing temporary is left. Raises OSError, e.g. for a full disk.
    writer: a name of the process, if several may write the same file at the same time
    """
    partial = path.with_name(f".{path.name}{f'.{writer}' if writer else ''}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # if it is a directory
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, writer: str = "") -> None:
    """Writes a small UTF-8 text file through `replacing`, with \\n line ends on every system."""
    with replacing(path, writer) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
