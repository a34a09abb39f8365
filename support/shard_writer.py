"""Writing a directory of token shards so that a kill at any instant loses no finished shard.

A shard is filled under a hidden name and renamed when it is full. `manifest.partial.json` lists the
finished shards, with the position in the sources after each; at the end it becomes `manifest.json`.
Several ranks have a manifest each, `manifest_NNNNN.json`, and the last one to finish merges them.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support import tokenizer
from support.errors import UserError
from support.files import partial_path, sha256, sync, write_text
from support.launch import print_rank
from support.shards import (
    MANIFEST,
    MANIFEST_ERRORS,
    SUFFIXES,
    find_intact,
    is_intact,
    manifest_error,
    validate_entries,
)

HEADER_BYTES = 128  # of the header that `numpy.save` writes for an array of any length


class Counts(NamedTuple):
    """Documents, nulls (which are not documents), and pieces of text with invalid UTF-8."""

    documents: int = 0
    nulls: int = 0
    replaced: int = 0


class Position(NamedTuple):
    """A position in the stream of tokens: `skip` tokens into the piece of text that begins at
    `start` (a row or byte) of file number `file`. counts: of what comes before that piece."""

    file: int = 0
    start: int = 0
    skip: int = 0
    counts: Counts = Counts()


def disk_full_error(directory: Path) -> UserError:
    """The error to raise if the disk is full."""
    free = shutil.disk_usage(directory).free
    return UserError(
        f"out={str(directory)!r}: the disk is full ({free:,} bytes left); make room and run the "
        "same command again, which continues after the last finished shard"
    )


class ShardWriter:
    """A shard that is being filled, under its hidden name.

    number: of the shard within its rank, from 0; capacity: tokens when it is full
    position: after its last token; None after `ShardDirectory.split_small_text`
    """

    def __init__(
        self, path: Path, split: str, number: int, capacity: int, position: Position | None
    ):
        self.path, self.split, self.number, self.capacity = path, split, number, capacity
        self.position, self.tokens = position, 0
        self.file = open(partial_path(path), "wb")
        self.file.seek(HEADER_BYTES)

    def write(self, tokens: np.ndarray) -> None:
        """Appends uint16 tokens.

        Raises UserError, before it writes, if that would touch the last hundredth of the disk (at
        most 1 GiB of it), which the manifest may need.
        """
        disk = shutil.disk_usage(self.path.parent)
        # Some network file systems report no blocks at all.
        if disk.total and disk.free - tokens.nbytes < min(disk.total // 100, 1 << 30):
            raise disk_full_error(self.path.parent)
        self.file.write(tokens.astype("<u2", copy=False).data)
        self.tokens += len(tokens)

    def finish(self) -> dict:
        """Completes the file under its hidden name. Returns its entry in the manifest."""
        self.file.seek(0)
        header = {"descr": "<u2", "fortran_order": False, "shape": (self.tokens,)}
        np.lib.format.write_array_header_1_0(self.file, header)
        self.file.close()
        sync(partial_path(self.path))
        return {
            "file": self.path.name,
            "split": self.split,
            "tokens": self.tokens,
            "bytes": HEADER_BYTES + 2 * self.tokens,
            "sha256": sha256(partial_path(self.path)),
            "place": self.position,
        }

    def publish(self) -> None:
        """Renames the finished file to its final name."""
        os.replace(partial_path(self.path), self.path)
        sync(self.path.parent)


class ShardDirectory:
    """The shards of one rank in a directory, and its manifest.

    settings: those that the content of the shards depends on, with shard_size, val_tokens, prefix
    """

    def __init__(self, directory: Path, settings: dict, rank: int, world_size: int):
        self.directory, self.settings = directory, settings
        self.rank, self.world_size = rank, world_size
        self.path = directory / (MANIFEST if world_size == 1 else f"manifest_{rank:05d}.json")
        self.partial = self.path.with_suffix(".partial.json")
        self.downloads = directory / f".downloads_{rank:05d}"  # of sources on the Hub
        self.manifest = {}
        self.shard = None  # the ShardWriter of the shard that is being filled
        self.verified = set()  # numbers of the shards that are known to be intact
        self.commit = None  # of the dataset on the Hub, if any rank has begun

    def begin(self, sources: list[dict], source_names: str, commit: str | None) -> None:
        """Starts a new manifest.

        sources: the files of this rank; source_names: a hash of the names of all ranks' files
        commit: of a dataset on the Hub
        """
        self.manifest = {
            "settings": self.settings,
            "tokenizer": {"name": "gpt2", "sha256": tokenizer.RANKS_SHA256},
            "rank": self.rank,
            "world_size": self.world_size,
            "source_names": source_names,
            "commit": commit,
            "sources": sources,
            "shards": [],
            "complete": False,  # whether the end of the sources was reached
            "counts": Counts(),
        }

    def load(self) -> bool:
        """Loads the manifest of an earlier process. Returns False if there is none.

        Raises UserError if the directory holds shards of other settings, of another number of
        ranks, or of another program.
        """
        paths = self.directory.glob("manifest*.json")
        for path in sorted(paths, key=lambda path: path != self.partial):
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
                self.commit = manifest["commit"]
                self._validate_same_run(manifest["settings"], manifest["world_size"])
                if path in (self.partial, self.path) and not self.manifest:
                    self.manifest = {"complete": True} | manifest
                    self._validate_manifest()
            except FileNotFoundError:
                continue  # another rank has just finished
            except MANIFEST_ERRORS as error:
                raise manifest_error(path, error) from None
        if not self.manifest:
            self._validate_no_other_shards()
        return bool(self.manifest)

    def _validate_same_run(self, settings: dict, world_size: int) -> None:
        """Raises UserError if a manifest here has other settings or another number of ranks."""
        before = settings | {"WORLD_SIZE": world_size}
        for name, value in (self.settings | {"WORLD_SIZE": self.world_size}).items():
            if before[name] != value:
                raise UserError(
                    f"{name}={value!r}: out={str(self.directory)!r} was begun with "
                    f"{name}={before[name]!r}; use that value to continue, or choose another --out"
                )

    def _validate_no_other_shards(self) -> None:
        """Raises UserError for a shard that no manifest lists, unless it is another rank's."""
        name = re.escape(self.settings["prefix"]) + r"_(train|val)_\d{5}_\d{6}\.npy"
        for file in sorted(self.directory.iterdir()):
            of_rank = self.world_size > 1 and re.fullmatch(name, file.name)
            if file.suffix in SUFFIXES and not of_rank:
                raise UserError(f"{file}: not listed in a {MANIFEST}; choose another --out")

    def _validate_manifest(self) -> None:
        """Raises one of MANIFEST_ERRORS if the loaded manifest is not valid."""
        validate_entries(self.manifest["shards"])
        for number in range(len(self.manifest["shards"]) + 1):
            self.start_of(number)
        Counts(*self.manifest["counts"])
        for source in self.manifest["sources"]:
            if type(source["file"]) is not str or type(source["bytes"]) is not int:
                raise TypeError(f"a source is {source!r}")

    def validate_sources(self, sources: list[dict], source_names: str) -> None:
        """Raises UserError if the files are others, or if one that was used has changed since."""
        out, manifest = f"out={str(self.directory)!r}", self.manifest
        if source_names != manifest["source_names"]:
            raise UserError(f"source: other files than {out} was begun with; choose another --out")
        count = len(manifest["shards"])
        used = len(sources) if manifest["complete"] else self.start_of(count).file + (count > 0)
        for source, before in zip(sources[:used], manifest["sources"]):
            if source != before:
                name = source["file"]
                raise UserError(f"{name}: changed since {out} was begun; choose another --out")
        manifest["sources"] = sources

    def verify(self) -> None:
        """Finds out which recorded shards are intact, and prints those that are not."""
        shards = self.manifest["shards"]
        for shard in shards:
            path = self.directory / shard["file"]
            if is_intact(partial_path(path), shard):  # killed between the record and the renaming
                os.replace(partial_path(path), path)
        for number, intact in enumerate(find_intact(self.directory, shards)):
            if intact:
                self.verified.add(number)
            else:
                path = self.directory / shards[number]["file"]
                print_rank(f"{path}: missing or altered; rebuilding it")
        if len(self.verified) < len(shards) and shards[0]["place"] is None:
            # Shards that split_small_text made can only be built together.
            self.verified = set()
            self.manifest |= {"shards": [], "complete": False, "counts": Counts()}

    @property
    def tokens(self) -> int:
        """Tokens in the recorded shards."""
        return sum(shard["tokens"] for shard in self.manifest["shards"])

    def start_of(self, number: int) -> Position:
        """The position in the sources where a shard begins."""
        place = self.manifest["shards"][number - 1]["place"] if number else None
        return Position(*place[:3], Counts(*place[3])) if place else Position()

    def next_missing(self) -> int | None:
        """The number of the first shard to be written, or None."""
        count = len(self.manifest["shards"]) + (not self.manifest["complete"])
        return min(set(range(count)) - self.verified, default=None)

    def open_shard(self, number: int, position: Position | None) -> ShardWriter:
        """Opens a new shard, which begins at a position. The first one of rank 0 is `val`."""
        split, size = "train", self.settings["shard_size"]
        if number == self.rank == 0:
            split, size = "val", self.settings["val_tokens"] or size
        rank = f"_{self.rank:05d}" if self.world_size > 1 else ""
        name = f"{self.settings['prefix']}_{split}{rank}_{number:06d}.npy"
        self.shard = ShardWriter(self.directory / name, split, number, size, position)
        return self.shard

    def write_piece(self, file: int, start: int, stop: int, tokens, counts: Counts) -> bool:
        """Appends the tokens of a piece of text, from the current position on.

        file, start, stop: of the piece; tokens: uint16, all of them; counts: of this piece
        Returns False if it reached a shard that is there already.
        """
        _, _, skip, before = self.shard.position
        end = Position(file, stop, 0, Counts(*map(sum, zip(before, counts))))
        while skip < len(tokens):
            part = tokens[skip : skip + self.shard.capacity - self.shard.tokens]
            self.shard.write(part)
            skip += len(part)
            position = Position(file, start, skip, before) if skip < len(tokens) else end
            self.shard.position = position
            if self.shard.tokens == self.shard.capacity:
                number = self.shard.number + 1
                self._finish_shard()
                if number in self.verified:
                    return False
                self.open_shard(number, position)
        self.shard.position = end
        return True

    def _finish_shard(self) -> None:
        """Records the open shard, then gives its file the final name."""
        shard, number, shards = self.shard, self.shard.number, self.manifest["shards"]
        entry = shard.finish()
        if number < len(shards) and entry["sha256"] != shards[number]["sha256"]:
            raise UserError(
                f"{shard.path}: the content differs from the first time; if the sources have "
                "changed, choose another --out"
            )
        self.shard = None
        shards[number : number + 1] = [entry]
        self.verified.add(number)
        self._save()
        shard.publish()

    def finish(self) -> None:
        """Closes the last shard at the end of the sources."""
        shard = self.shard
        if shard.tokens or shard.number < len(self.manifest["shards"]):
            self._finish_shard()
        self.manifest |= {"complete": True, "counts": shard.position.counts}
        self._save()

    def discard(self) -> None:
        """Removes the open shard, if there is one."""
        if self.shard:
            self.shard.file.close()
            partial_path(self.shard.path).unlink(missing_ok=True)

    def _save(self) -> None:
        write_text(self.partial, json.dumps(self.manifest, indent=1) + "\n")

    def split_small_text(self) -> None:
        """Divides a text of less than two shards: its first tenth becomes `val`.

        Raises UserError if no token is left for training.
        """
        shards, size, total = self.manifest["shards"], self.settings["shard_size"], self.tokens
        val_tokens = self.settings["val_tokens"]
        if self.rank or (shards and shards[0]["place"] is None):
            return
        if total < 2 or (val_tokens and len(shards) < 2):
            for path in (self.partial, *(self.directory / shard["file"] for shard in shards)):
                path.unlink(missing_ok=True)  # so that the same --out can be used again
            raise UserError(
                f"source: only {total:,} tokens{' on rank 0' * (self.world_size > 1)}, "
                "which leaves none to train on; provide more text or fewer --val_tokens"
            )
        if val_tokens or total >= 2 * size:
            return
        files = [np.load(self.directory / shard["file"], mmap_mode="r") for shard in shards]
        tokens, val = np.concatenate(files), max(1, total // 10)
        writers = []
        for number, start in enumerate([0, *range(val, total, size)]):
            writers.append(self.open_shard(number, None))
            writers[-1].write(tokens[start : start + size if number else val])
        self.manifest["shards"] = [writer.finish() for writer in writers]
        self.verified = set(range(len(writers)))
        self._save()
        for writer in writers:
            writer.publish()

    def close(self) -> None:
        """Writes the manifest of this rank."""
        totals, shards = Counts(*self.manifest["counts"])._asdict(), self.manifest["shards"]
        for split in ("train", "val"):
            in_split = [shard["tokens"] for shard in shards if shard["split"] == split]
            totals[f"{split}_tokens"] = sum(in_split)
        kept = {k: v for k, v in self.manifest.items() if k != "complete"}
        write_text(self.path, json.dumps(kept | {"totals": totals}, indent=1) + "\n")
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
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        first = parts[0]
        for part in parts:
            if any(part[key] != first[key] for key in ("source_names", "commit", "settings")):
                raise UserError(
                    f"out={str(self.directory)!r}: ranks 0 and {part['rank']} found different "
                    "sources; run all ranks again with another --out"
                )
        merged = {key: first[key] for key in ("settings", "tokenizer", "world_size", "commit")}
        merged["sources"] = [source for part in parts for source in part["sources"]]
        shards = [shard for part in parts for shard in part["shards"]]
        merged["shards"] = [{k: v for k, v in s.items() if k != "place"} for s in shards]
        names = first["totals"]
        merged["totals"] = {name: sum(part["totals"][name] for part in parts) for name in names}
        # Several ranks may find that they are the last and write it at the same time.
        path, text = self.directory / MANIFEST, json.dumps(merged, indent=1) + "\n"
        write_text(path, text, writer=f"{self.rank:05d}")
        return True
