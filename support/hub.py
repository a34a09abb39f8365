"""The files of a dataset on the Hugging Face Hub: listed once, fetched ahead of their use.

`datasets` knows which files a dataset's configuration means, `huggingface_hub` fetches them (with
HF_TOKEN where it is set), resumes what was cut off and waits as a 429's Retry-After asks. What they
leave, 5xx and files that arrive short or altered, is tried again here.
"""

import errno
import json
import math
import shutil
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from support import checkpoint
from support.errors import UserError

AHEAD = 3  # files that are fetched or lie ready at a time, the one in use among them
TRIES = 10  # of a file, 1, 2, 4, ... and at most 60 seconds apart: four minutes of waiting in all
LISTING_TRIES = 3
LISTING_S = 20  # after which a listing that failed is not tried again, unless the Hub asks for that
SILENCE_S = 30  # without an answer, where `huggingface_hub` would wait for ever


def list_files(dataset: str, name: str, commit: str | None, say) -> tuple[str, list[dict]]:
    """(commit, files in dataset order) of the train split of a dataset's configuration.

    name: of the configuration; "" for the only one. commit: None for the newest. Each file is
    {"file": path in the repository, "bytes", "sha256" (None where the Hub does not tell)}.
    """
    from datasets import load_dataset_builder
    from datasets.utils.logging import disable_progress_bar
    from huggingface_hub import HfFileSystem, get_session

    disable_progress_bar()

    def limit(request):
        timeouts = request.extensions.get("timeout", {})
        timeouts |= {what: SILENCE_S for what, seconds in timeouts.items() if seconds is None}

    def ask():
        if limit not in (hooks := get_session().event_hooks["request"]):
            hooks.append(limit)
        # What `datasets` may have made of it here before has no files; so it may not find that.
        with tempfile.TemporaryDirectory() as empty:
            builder = load_dataset_builder(dataset, name or None, revision=commit, cache_dir=empty)
        splits = builder.config.data_files or {}
        if "train" not in splits:
            raise UserError(f"source={dataset!r}: no train split, only {', '.join(splits)}")
        hub = HfFileSystem()  # knows all this from the search for the files
        infos = [hub.info(url) for url in splits["train"]]
        return hub.resolve_path(splits["train"][0]).revision, [
            {
                "file": hub.resolve_path(info["name"]).path_in_repo,
                "bytes": info["size"],
                "sha256": info["lfs"].sha256 if info["lfs"] else None,
            }
            for info in infos
        ]

    named = f"source={dataset!r}" + f", name={name!r}" * bool(name)
    return patiently(named, ask, LISTING_TRIES, say, LISTING_S)


class Downloads:
    """Fetches the files of a dataset into `directory`, a few ahead of the one asked for."""

    def __init__(self, dataset: str, commit: str, files: list[dict], directory: Path, say):
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        self.dataset, self.commit, self.files = dataset, commit, files
        self.directory, self.futures = directory, {}
        self.dropped, self.closed = 0, False
        self.say = lambda line: None if self.closed else say(line)
        for path in directory.rglob("*.incomplete"):  # of a process that was killed
            path.unlink()

    def start(self, index: int) -> None:
        """Begins to fetch file `index` and the next ones."""
        for i in range(index, min(index + AHEAD, len(self.files))):
            if i not in self.futures:
                self.futures[i] = begin(self.fetch, i)

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
            try:
                found = hf_hub_download(
                    self.dataset,
                    file["file"],
                    repo_type="dataset",
                    revision=self.commit,
                    local_dir=self.directory,
                    force_download=again,
                )
            except RuntimeError as error:  # by which hf_xet says everything
                raise OSError(str(error)) from None
            path = Path(found)
            again = True  # whatever goes wrong from here on, the file is not what it should be
            if path.stat().st_size != file["bytes"]:
                raise OSError(f"{path.stat().st_size:,} of {file['bytes']:,} bytes arrived")
            if file["sha256"] and checkpoint.sha256(path) != file["sha256"]:
                raise OSError("arrived altered (SHA-256)")
            return path

        return patiently(file["file"], attempt, TRIES, self.say)

    def drop_before(self, index: int) -> None:
        """Removes the files before number `index`, which are not needed any more."""
        for i in range(self.dropped, index):
            (self.directory / self.files[i]["file"]).unlink(missing_ok=True)
            self.futures.pop(i, None)
        self.dropped = max(self.dropped, index)

    def remove(self) -> None:
        """Removes all files."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        self.closed = True


def begin(action, *arguments) -> Future:
    """What the action returns, later. Its thread ends with the process, whatever it waits for."""

    def run():
        try:
            future.set_result(action(*arguments))
        except BaseException as error:
            future.set_exception(error)

    future = Future()
    threading.Thread(target=run, daemon=True).start()
    return future


def patiently(what: str, action, tries: int, say, patience_s: float = math.inf):
    """What `action()` returns, tried again after what may pass: no answer, 408, 429, 5xx, a cut.

    Raises UserError at once for what will not pass, after `tries` attempts, and after `patience_s`
    unless the Hub says how long to wait.
    """
    began = time.monotonic()
    for attempt in range(1, tries + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            reason, wait = judge(error)
            if wait is None:
                raise UserError(f"{what}: {reason}") from None
            if attempt == tries or (not wait and time.monotonic() - began > patience_s):
                raise UserError(
                    f"{what}: {reason}; gave up after {attempt} attempts; run the same command "
                    "again to go on from here"
                ) from None
            wait = max(wait, min(60, 2 ** (attempt - 1)))
            say(f"{what}: {reason}; trying again in {wait:.0f} s")
            time.sleep(wait)


def judge(error: Exception) -> tuple[str, float | None]:
    """(what went wrong in a few words, the least seconds to wait; None where waiting is no use)."""
    from huggingface_hub.constants import ENDPOINT

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    for cause in causes:
        full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "(os error 28)" in str(cause):  # as hf_xet says it
            return "no room on the disk; make some and run the same command again", None
        # `datasets` keeps no more of it than the name.
        if "OfflineModeIsEnabled" in f"{type(cause).__name__} {cause}":
            return "not here, and HF_HUB_OFFLINE forbids to fetch it; unset that", None
        if (response := getattr(cause, "response", None)) is not None:
            status, headers = response.status_code, response.headers
            site = str(response.request.url).startswith(ENDPOINT) or "x-error-code" in headers
            if status == 403 and not site:
                return "the address of the file expired (HTTP 403)", 0  # the next one is new
            if status in (401, 403):
                return f"{no_access()} (HTTP {status})", None
            if status == 404 and cause is error:
                return "not on the Hub (HTTP 404); check its name", None
            if status == 404:
                continue  # how `datasets` finds out which files there are, long before
            if status in (408, 416, 429) or status >= 500:
                after = headers.get("retry-after", "")
                return f"HTTP {status} from the Hub", float(after) if after.isdigit() else 0
            return f"HTTP {status} from the Hub, which refuses this", None
    reason = " ".join(str(error).split()) or type(error).__name__
    for cause in causes:
        if type(cause).__module__.startswith("httpx") and not hasattr(cause, "response"):
            return f"no answer from the Hub ({cause}); check the network", 0
    if type(error).__name__ == "DatasetNotFoundError":
        return no_access() if "doesn't exist" in reason else f"{reason} {no_access()}", None
    if isinstance(error, json.JSONDecodeError):
        return "an answer that is not the Hub's; check the network", 0
    if reason.startswith(("BuilderConfig ", "Config name is missing")):
        return f"{reason.split(' Example of usage')[0]}; choose one by --name", None
    if isinstance(error, OSError) and error.filename:  # a file here, not on the Hub
        return f"{error.filename}: {error.strerror}", None
    lasting = type(error) is FileNotFoundError or type(error).__module__.startswith("datasets.")
    if isinstance(error, OSError) and not lasting:
        return f"{reason}; check the network", 0
    return reason, None  # `datasets` cannot make sense of it: its words are the best there are


def no_access() -> str:
    """What to say where the Hub refuses a dataset."""
    from huggingface_hub import get_token

    known = "the HF_TOKEN given" if get_token() else "no HF_TOKEN"
    return (
        f"no such dataset on the Hub, or no access to it with {known}; check its name, accept its "
        "terms there, set HF_TOKEN"
    )
