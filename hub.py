"""The files of a dataset on the Hugging Face Hub: listed once, fetched ahead of their use.

`datasets` knows which files a dataset's configuration means, `huggingface_hub` fetches them (with
HF_TOKEN where it is set), resumes what was cut off and waits as a 429's Retry-After asks. What they
leave, 5xx and files that arrive short or altered, is tried again here.
"""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoint
from errors import UserError

AHEAD = 3  # files that are fetched or lie ready at a time, the one in use among them
TRIES = 10  # of a file, 1, 2, 4, ... and at most 60 seconds apart: seven minutes in all
LISTING_TRIES = 3


def list_files(dataset: str, name: str, say) -> tuple[str, list[dict]]:
    """(commit, files in dataset order) of the train split of a dataset's configuration.

    name: of the configuration; "" for the only one. Each file is {"file": path in the repository,
    "bytes", "sha256" (None where the Hub does not tell)}.
    """
    from datasets import load_dataset_builder
    from datasets.utils.logging import disable_progress_bar
    from huggingface_hub import HfApi, HfFileSystem

    disable_progress_bar()

    def ask():
        builder = load_dataset_builder(dataset, name or None)
        splits = builder.config.data_files or {}
        if "train" not in splits:
            raise UserError(f"source={dataset!r}: no train split, only {', '.join(splits)}")
        found = [HfFileSystem().resolve_path(url) for url in splits["train"]]
        commit, paths = found[0].revision, [place.path_in_repo for place in found]
        infos = {}
        for i in range(0, len(paths), 500):
            some = paths[i : i + 500]
            for info in HfApi().get_paths_info(dataset, some, revision=commit, repo_type="dataset"):
                infos[info.path] = info
        return commit, [
            {
                "file": path,
                "bytes": infos[path].size,
                "sha256": infos[path].lfs.sha256 if infos[path].lfs else None,
            }
            for path in paths
        ]

    return patiently(f"source={dataset!r}", ask, LISTING_TRIES, say)


class Downloads:
    """Fetches the files of a dataset into `directory`, a few ahead of the one asked for."""

    def __init__(self, dataset: str, commit: str, files: list[dict], directory: Path, say):
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        self.dataset, self.commit, self.files = dataset, commit, files
        self.directory, self.say = directory, say
        self.pool, self.futures = ThreadPoolExecutor(AHEAD), {}

    def start(self, index: int) -> None:
        """Begins to fetch file `index` and the next ones."""
        for i in range(index, min(index + AHEAD, len(self.files))):
            if i not in self.futures:
                self.futures[i] = self.pool.submit(self.fetch, i)

    def is_ready(self, index: int) -> bool:
        self.start(index)
        return self.futures[index].done()

    def get(self, index: int) -> Path:
        """The local path of file `index`, waiting for it if need be."""
        self.start(index)
        return self.futures[index].result()

    def fetch(self, index: int) -> Path:
        from huggingface_hub import hf_hub_download

        file, again = self.files[index], False

        def attempt():
            nonlocal again
            path = Path(
                hf_hub_download(
                    self.dataset,
                    file["file"],
                    repo_type="dataset",
                    revision=self.commit,
                    local_dir=self.directory,
                    force_download=again,
                )
            )
            again = True  # whatever goes wrong from here on, the file is not what it should be
            if path.stat().st_size != file["bytes"]:
                raise OSError(f"{path.stat().st_size:,} of {file['bytes']:,} bytes arrived")
            if file["sha256"] and checkpoint.sha256(path) != file["sha256"]:
                raise OSError("arrived altered (SHA-256)")
            return path

        return patiently(file["file"], attempt, TRIES, self.say)

    def drop_before(self, index: int) -> None:
        """Removes the files before number `index`, which are not needed any more."""
        for i in [i for i in self.futures if i < index]:
            (self.directory / self.files[i]["file"]).unlink(missing_ok=True)
            del self.futures[i]

    def close(self) -> None:
        """Ends the threads, after the files they are at."""
        self.pool.shutdown(cancel_futures=True)


def patiently(what: str, action, tries: int, say):
    """What `action()` returns, tried again after what may pass: no answer, 408, 429, 5xx, a cut.

    Raises UserError at once for what will not pass, and after `tries` attempts.
    """
    for attempt in range(1, tries + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            reason, wait = judge(error)
            if wait is None:
                raise UserError(f"{what}: {reason}") from None
            if attempt == tries:
                raise UserError(
                    f"{what}: {reason}; gave up after {tries} attempts; run the same command "
                    "again to go on from here"
                ) from None
            wait = max(wait, min(60, 2 ** (attempt - 1)))
            say(f"{what}: {reason}; trying again in {wait:.0f} s")
            time.sleep(wait)


def judge(error: Exception) -> tuple[str, float | None]:
    """(what went wrong in a few words, the least seconds to wait; None where waiting is no use)."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    for cause in causes:
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return "no room on the disk; make some and run the same command again", None
        if type(cause).__name__ == "OfflineModeIsEnabled":
            return "not here, and HF_HUB_OFFLINE forbids to fetch it; unset that", None
        if (response := getattr(cause, "response", None)) is not None:
            status = response.status_code
            if status in (401, 403):
                known = "the HF_TOKEN given" if os.environ.get("HF_TOKEN") else "no HF_TOKEN"
                return (
                    f"no such dataset on the Hub, or no access to it with {known} (HTTP {status}); "
                    "check its name, accept its terms there, set HF_TOKEN"
                ), None
            if status == 404:
                return "not on the Hub (HTTP 404); check its name", None
            after = response.headers.get("retry-after", "")
            if status in (408, 429) or status >= 500:
                return f"HTTP {status} from the Hub", float(after) if after.isdigit() else 0
    reason = " ".join(str(error).split()) or type(error).__name__
    if any(type(cause).__module__.startswith("httpx") for cause in causes):
        return "no answer from the Hub", 0
    if type(error).__module__.startswith("datasets.") or isinstance(error, ValueError):
        return reason, None  # an unknown dataset or configuration: `datasets` says which there are
    if isinstance(error, OSError):
        return reason, 0
    raise error
