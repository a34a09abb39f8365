"""The files of a dataset on the Hugging Face Hub: listed once, downloaded ahead of their use.

`datasets` finds the files of a dataset's configuration. `huggingface_hub` downloads them (with
HF_TOKEN if it is set), resumes an interrupted download and waits as a 429's Retry-After asks. This
module retries what they do not: 5xx, and files that arrive incomplete or altered.
"""

import contextlib
import errno
import json
import tempfile
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

from support.errors import UserError
from support.files import sha256
from support.launch import print_rank

AHEAD = 3  # files in use or on their way at a time, beside the earlier ones of the open shard
TRIES = 10  # of a file, 1, 2, 4, ... and at most 60 seconds apart: four minutes of waiting in all
LISTING_S = 20  # after which a failed listing is not tried again, unless the Hub asks for that
SILENCE_S = 30  # to wait for an answer; `huggingface_hub` has no limit
NO_ACCESS = (
    "not on the Hub, or no access to it; check its name, accept its terms on the Hub, set HF_TOKEN"
)


def list_files(dataset: str, name: str, commit: str | None) -> tuple[str, list[dict]]:
    """(commit, files in dataset order) of the train split of a dataset's configuration.

    name: of the configuration, "" for the only one; commit: None for the newest
    Each file is {"file": path in the repository, "bytes", "sha256" (None if the Hub has none)}.
    Raises UserError if the dataset cannot be listed.
    """
    from datasets import load_dataset_builder
    from datasets.utils.logging import disable_progress_bar
    from huggingface_hub import HfFileSystem

    disable_progress_bar()
    limit_silence()

    def attempt() -> tuple[str, list[dict]]:
        # A dataset that `datasets` has prepared in its cache has no list of files.
        with tempfile.TemporaryDirectory() as cache:
            builder = load_dataset_builder(dataset, name or None, revision=commit, cache_dir=cache)
        splits = builder.config.data_files or {}
        if "train" not in splits:
            raise UserError(f"source={dataset!r}: no train split, only {', '.join(splits)}")
        hub, files = HfFileSystem(), []  # which has cached the answers to the search for the files
        for info in map(hub.info, splits["train"]):
            path, lfs = hub.resolve_path(info["name"]).path_in_repo, info["lfs"]
            digest = lfs.sha256 if lfs else None
            files.append({"file": path, "bytes": info["size"], "sha256": digest})
        return hub.resolve_path(splits["train"][0]).revision, files

    return retry(f"source={dataset!r}" + f", name={name!r}" * bool(name), attempt, LISTING_S)


def limit_silence() -> None:
    """Gives all requests of `huggingface_hub` a timeout, also those of its later clients.

    It replaces its client after some errors.
    """
    from huggingface_hub import get_session, set_client_factory

    client, hooks = type(get_session()), get_session().event_hooks
    if _set_timeout not in hooks["request"]:
        hooks = hooks | {"request": [*hooks["request"], _set_timeout]}
        set_client_factory(lambda: client(event_hooks=hooks, follow_redirects=True, timeout=None))


def _set_timeout(request) -> None:
    timeouts = request.extensions.get("timeout", {})
    timeouts |= {phase: SILENCE_S for phase, seconds in timeouts.items() if seconds is None}


class Downloads:
    """Downloads the files of a dataset into `directory`, a few ahead of the one in use.

    files: as `list_files` returns them
    """

    def __init__(self, dataset: str, commit: str, files: list[dict], directory: Path):
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        self.dataset, self.commit, self.files = dataset, commit, files
        self.directory, self.results = directory, {}
        self.threads = ThreadPool(AHEAD)  # which end with the process, whatever they wait for

    def __getitem__(self, index: int) -> Path:
        """The local path of file `index`, after waiting for it if needed. Starts the next ones."""
        for i in range(index, min(index + AHEAD, len(self.files))):
            if i not in self.results:
                self.results[i] = self.threads.apply_async(self._download, (self.files[i],))
        return self.results[index].get()

    def _download(self, file: dict) -> Path:
        """The local path of a file when it is here and intact."""
        from huggingface_hub import hf_hub_download

        name, path = file["file"], self.directory / file["file"]
        options = dict(repo_type="dataset", revision=self.commit, local_dir=self.directory)

        def attempt() -> Path:
            try:
                hf_hub_download(self.dataset, name, **options)
            except RuntimeError as error:  # by which hf_xet reports all errors
                raise OSError(str(error)) from None
            altered = file["sha256"] and sha256(path) != file["sha256"]
            if altered or path.stat().st_size != file["bytes"]:
                path.unlink()
                raise OSError("arrived incomplete or altered (size or SHA-256)")
            return path

        return retry(name, attempt)

    def remove_before(self, index: int) -> None:
        """Removes the files before number `index`, which are not needed any more."""
        for i in [i for i in self.results if i < index]:
            with contextlib.suppress(PermissionError):  # Windows, while a worker has it open
                (self.directory / self.files[i]["file"]).unlink(missing_ok=True)
                self.results.pop(i)


def retry(described: str, action, limit_s: float = float("inf")):
    """The result of `action()`, which is repeated after temporary errors.

    described: the beginning of the messages
    limit_s: after which it is not repeated, unless the Hub's answer says how long to wait
    Raises UserError for a permanent error, and after TRIES attempts.
    """
    start = time.monotonic()
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            reason, wait = classify_error(error)
        if wait is None:
            raise UserError(f"{described}: {reason}")
        if attempt == TRIES or (not wait and time.monotonic() - start > limit_s):
            raise UserError(
                f"{described}: {reason}; stopped after {attempt} attempts; run the same command "
                "again to continue after the last finished shard"
            )
        wait = max(wait, min(60, 2 ** (attempt - 1)))
        print_rank(f"{described}: {reason}; trying again in {wait:.0f} s")
        time.sleep(wait)


def classify_error(error: Exception) -> tuple[str, float | None]:
    """(reason in a few words, minimum seconds before another attempt; None if it is permanent)."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    words = " ".join(f"{type(cause).__name__}: {cause}" for cause in causes)
    disk_full = any(getattr(c, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for c in causes)
    if disk_full or "(os error 28)" in words:  # hf_xet's words for it
        return "the disk is full; make room and run the same command again", None
    if "OfflineModeIsEnabled" in words:
        return "not on this machine, and HF_HUB_OFFLINE forbids to download it; unset it", None
    for cause in causes:
        response = getattr(cause, "response", None)
        # `datasets` asks for optional files, and finds out by a 404 that they are not there.
        if response is not None and (response.status_code != 404 or cause is error):
            return _classify_response(response)
    reason = " ".join(str(error).split()) or type(error).__name__
    # `datasets` and `huggingface_hub` raise FileNotFoundError for what is not on the Hub.
    # JSONDecodeError: a network that wants a login answers in the place of the Hub.
    of_file = isinstance(error, FileNotFoundError) or getattr(error, "filename", None)
    of_network = isinstance(error, OSError | json.JSONDecodeError) and not of_file
    if of_network or any(type(cause).__module__.startswith("httpx") for cause in causes):
        return f"no valid answer from the Hub ({reason}); check the network", 0
    if type(error).__name__ == "DatasetNotFoundError":
        return NO_ACCESS, None
    if reason.startswith(("BuilderConfig ", "Config name is missing")):
        return f"{reason.split(' Example of usage')[0]}; choose one with --name", None
    return reason, None


def _classify_response(response) -> tuple[str, float | None]:
    """`classify_error` of an HTTP response."""
    status, after = response.status_code, response.headers.get("retry-after", "")
    # A file's address expires with a 403 of the storage, and each attempt asks for a new one.
    expired = status == 403 and "x-error-code" not in response.headers
    if status in (408, 416, 429) or status >= 500 or expired:
        return f"HTTP {status} from the Hub", float(after) if after.isdigit() else 0
    return f"{NO_ACCESS} (HTTP {status})", None
