"""Writing a directory of token shards so that a kill at any instant loses no recorded shard.

The tokens of a shard are collected in memory, then written to a file that is renamed when it is
complete. `manifest.partial.json` lists the shards, with the position in the sources after each; at
the end it becomes `manifest.json`. Several ranks have a manifest each, `manifest_NNNNN.json`, and
the last one to finish merges them.
"""

import errno
import json
import re
import shutil
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support import tokenizer
from support.errors import UserError
from support.files import replacing, sha256, write_text
from support.launch import print_rank
from support.shards import (
    MANIFEST,
    MANIFEST_ERRORS,
    find_intact,
    is_shard,
    manifest_error,
    validate_entries,
)

PREFIX = "edufineweb"  # of the names of the shards, as in build-nanogpt


class Position(NamedTuple):
    """A position in the stream of tokens: `skip` tokens into the piece of text that begins at
    `start` (a row or byte) of file number `file`. COUNTS are those of what comes before that piece.
    """

    file: int = 0
    start: int = 0
    skip: int = 0
    documents: int = 0
    nulls: int = 0  # in a column; they are not documents
    replaced: int = 0  # texts with U+FFFD, as for invalid UTF-8


COUNTS = Position._fields[3:]


def write_shard(path: Path, parts: list[np.ndarray]) -> dict:
    """Writes uint16 tokens as a `.npy` shard. Returns its name, tokens, bytes and SHA-256."""
    count = sum(map(len, parts))
    with replacing(path) as partial:
        with open(partial, "wb") as file:
            header = {"descr": "<u2", "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(part.astype("<u2", copy=False).data)
        size, digest = partial.stat().st_size, sha256(partial)
    return {"file": path.name, "tokens": count, "bytes": size, "sha256": digest}


class ShardDirectory:
    """The shards of one rank in a directory, and its manifest.

    settings: those that the content of the shards depends on, with shard_size and val_tokens
    """

    def __init__(self, directory: Path, settings: dict, rank: int, world_size: int):
        self.directory, self.settings = directory, settings | {"WORLD_SIZE": world_size}
        self.rank, self.world_size = rank, world_size
        self.path = directory / (MANIFEST if world_size == 1 else f"manifest_{rank:05d}.json")
        self.partial = self.path.with_suffix(".partial.json")
        self.downloads = directory / f".downloads_{rank:05d}"  # of sources on the Hub
        self.manifest = {}
        self.position = Position()  # after the last token of `pending`
        self.pending = deque()  # (position, tokens from it on, position after them)
        self.pending_tokens = 0
        self.commit = None  # of the dataset on the Hub, if any rank has begun

    def begin(self, sources: list[dict], source_names: str, commit: str | None) -> None:
        """Starts a new manifest.

        sources: the files of this rank; source_names: a hash of the names of all ranks' files
        commit: of a dataset on the Hub
        """
        self.manifest = {
            "settings": self.settings,
            "tokenizer": {"name": "gpt2", "sha256": tokenizer.RANKS_SHA256},
            "source_names": source_names,
            "commit": commit,
            "sources": sources,
            "shards": [],
        }  # and "totals", if the end of the sources was reached

    def load(self) -> bool:
        """Loads the manifest of an earlier process. Returns whether it exists.

        Raises UserError if the directory holds shards of other settings, of another number of
        ranks, or of another program.
        """
        for path in sorted(self.directory.glob("manifest*.json"), key=lambda p: p != self.partial):
            if not re.fullmatch(r"manifest(_\d{5})?(\.partial)?\.json", path.name):
                continue
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
                self.commit = manifest["commit"]
                changed = [n for n, v in self.settings.items() if manifest["settings"][n] != v]
                if path in (self.partial, self.path) and not self.manifest:
                    self.manifest = manifest
                    self._validate_manifest()
            except FileNotFoundError:
                continue  # another rank has just finished
            except MANIFEST_ERRORS as error:
                raise manifest_error(path, error) from None
            if changed:
                name = changed[0]
                raise UserError(
                    f"{name}={self.settings[name]!r}: out={str(self.directory)!r} was begun with "
                    f"{name}={manifest['settings'][name]!r}; use that value to continue, or choose "
                    "another --out"
                )
        for file in [] if self.manifest else sorted(self.directory.iterdir()):
            of_rank = self.world_size > 1 and file.match(f"{PREFIX}_*_?????_??????.npy")
            if is_shard(file) and not of_rank:
                raise UserError(f"{file}: not listed in a {MANIFEST}; choose another --out")
        return bool(self.manifest)

    def _validate_manifest(self) -> None:
        """Raises one of MANIFEST_ERRORS if a key is missing in the manifest or has another type."""
        validate_entries(self.manifest["shards"])
        for shard in self.manifest["shards"]:
            sum(Position(*shard["place"]))
        if "totals" in self.manifest:
            sum(self.manifest["totals"][name] for name in COUNTS)
        names = (source["file"] for source in self.manifest["sources"])
        "".join((self.manifest["source_names"], *names))
        sum(source["bytes"] for source in self.manifest["sources"])

    def validate_sources(self, sources: list[dict], source_names: str) -> None:
        """Raises UserError if the files are others, or if one that was used has changed since."""
        out, manifest = f"out={str(self.directory)!r}", self.manifest
        if source_names != manifest["source_names"]:
            raise UserError(f"source: other files than {out} was begun with; choose another --out")
        used = len(sources) if "totals" in manifest else self.recorded.file + 1
        pairs = zip(sources[:used], manifest["sources"])
        if changed := [source["file"] for source, before in pairs if source != before]:
            raise UserError(f"{changed[0]}: changed since {out} was begun; choose another --out")
        manifest["sources"] = sources

    @property
    def recorded(self) -> Position:
        """The position in the sources after the last recorded shard."""
        shards = self.manifest["shards"]
        return Position(*shards[-1]["place"]) if shards else Position()

    @property
    def tokens(self) -> int:
        """Tokens in the recorded shards."""
        return sum(shard["tokens"] for shard in self.manifest["shards"])

    def verify(self) -> None:
        """Discards from the manifest the first shard that is missing or altered, and all later
        ones: the work continues from there."""
        shards = self.manifest["shards"]
        intact = find_intact(self.directory, shards)
        if not all(intact):
            path = self.directory / shards[intact.index(False)]["file"]
            print_rank(f"{path}: missing or altered; rebuilding it and all later shards")
            del shards[intact.index(False) :]
            self.manifest.pop("totals", None)
        self.position = self.recorded

    def write_piece(self, piece, tokens: np.ndarray, counts: tuple) -> None:
        """Adds the tokens of a `text_files.Piece`, from the current position on.

        tokens: uint16, all of the piece; counts: of the piece, as in COUNTS
        """
        _, _, skip, *before = self.position
        self.position = Position(piece.file, piece.stop, 0, *map(sum, zip(before, counts)))
        begin = Position(piece.file, piece.start, skip, *before)
        self.pending.append((begin, tokens[skip:], self.position))
        self.pending_tokens += len(tokens) - skip
        size, val_tokens = self.settings["shard_size"], self.settings["val_tokens"]
        if self._writes_val():
            # Less than this is for `finish` to divide, or to refuse.
            if self.pending_tokens < (val_tokens + 1 if val_tokens else 2 * size):
                return
            self._write_shard(val_tokens or size)
        while self.pending_tokens >= size:
            self._write_shard(size)

    def _writes_val(self) -> bool:
        """Whether the next shard is `val`: the first one of rank 0."""
        return self.rank == 0 and not self.manifest["shards"]

    def _write_shard(self, size: int) -> None:
        """Writes a shard of `size` tokens, or of all that are left, and records it.

        Raises OSError, before it writes, if the disk is almost full.
        """
        number, split = len(self.manifest["shards"]), "val" if self._writes_val() else "train"
        # The last hundredth of the disk (at most 1 GiB) is left, which the manifest may need. Some
        # network file systems report no blocks at all.
        disk, size = shutil.disk_usage(self.directory), min(size, self.pending_tokens)
        if disk.total and disk.free - 2 * size < min(disk.total // 100, 1 << 30):
            raise OSError(errno.ENOSPC, "the disk is full")
        if not self.partial.exists():  # a directory with a shard must have a manifest
            self._save(self.partial, self.manifest)
        rank = f"_{self.rank:05d}" if self.world_size > 1 else ""
        path = self.directory / f"{PREFIX}_{split}{rank}_{number:06d}.npy"
        parts, place = self._take(size)
        entry = write_shard(path, parts) | {"split": split, "place": place}
        self.manifest["shards"].append(entry)
        self._save(self.partial, self.manifest)

    def _take(self, size: int) -> tuple[list[np.ndarray], Position]:
        """Removes `size` pending tokens, or all. Returns them and the position after them."""
        parts, place = [], self.position
        while self.pending and size > 0:
            start, tokens, end = self.pending.popleft()
            part, rest, place = tokens[:size], tokens[size:], end
            if len(rest):
                place = start._replace(skip=start.skip + size)
                self.pending.appendleft((place, rest, end))
            parts.append(part)
            size -= len(part)
            self.pending_tokens -= len(part)
        return parts, place

    def _save(self, path: Path, manifest: dict) -> None:
        # Several ranks may find that they are the last and write the same file at the same time.
        write_text(path, json.dumps(manifest, indent=1) + "\n", writer=f"{self.rank:05d}")

    def finish(self) -> None:
        """Writes the rest and the manifest of this rank at the end of the sources.

        Of a text of less than two shards the first tenth becomes `val`. Raises UserError if no
        token is left for training.
        """
        if self._writes_val():
            total, where = self.pending_tokens, " on rank 0" if self.world_size > 1 else ""
            if total < 2 or self.settings["val_tokens"]:
                raise UserError(
                    f"source: only {total:,} tokens{where}, which leaves none to train on; provide "
                    "more text or fewer --val_tokens"
                )
            self._write_shard(max(1, total // 10))
        while self.pending_tokens:
            self._write_shard(self.settings["shard_size"])
        self.manifest["totals"] = dict(zip(COUNTS, self.position[3:]))
        for split in ("train", "val"):
            tokens = [s["tokens"] for s in self.manifest["shards"] if s["split"] == split]
            self.manifest["totals"][f"{split}_tokens"] = sum(tokens)
        self._save(self.path, self.manifest)
        self.partial.unlink(missing_ok=True)

    def merge(self) -> bool:
        """Writes the manifest of all ranks if all have finished. Returns whether it is there.

        Raises UserError if their sources differ.
        """
        if self.world_size == 1:
            return True
        paths = [self.directory / f"manifest_{rank:05d}.json" for rank in range(self.world_size)]
        if not all(path.exists() for path in paths):
            return False
        merged, *others = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
        for rank, part in enumerate(others, start=1):
            if any(part[key] != merged[key] for key in ("source_names", "commit", "settings")):
                raise UserError(
                    f"out={str(self.directory)!r}: ranks 0 and {rank} found different sources; "
                    "run all ranks again with another --out"
                )
            merged["sources"] += part["sources"]
            merged["shards"] += part["shards"]
            for name, count in part["totals"].items():
                merged["totals"][name] += count
        self._save(self.directory / MANIFEST, merged)
        return True
