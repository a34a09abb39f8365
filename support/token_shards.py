"""A directory of token shards: how it is written so that nothing is lost, and read with trust.

`fineweb.py` fills each shard under a hidden name and renames it when it is full. The place reached
is recorded in `manifest.partial.json`; when all is done that becomes `manifest.json`, with the
SHA-256 of each shard. So a directory without a manifest is another program's, or unfinished.
"""

import io
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support import checkpoint, tokenizer
from support.errors import SettingError, UserError

MANIFEST = "manifest.json"
SUFFIXES = (".npy", ".bin")
AGAIN = "run the fineweb.py command that made it again: it makes anew what is not whole"

# -------------------------------------------------------------------------------------------------
# Reading: what a manifest promises


def read_manifest(directory: Path) -> dict | None:
    """The manifest of a directory of shards; None where there is none and none is to be expected.

    Its `shards` are in the order of the stream, each with `file`, `split`, `tokens`, `bytes` and
    `sha256`. Raises SettingError for a directory whose making was not finished, for a damaged
    manifest, and for a shard that is missing, of another size or not listed.
    """
    path = directory / MANIFEST
    if not path.exists():
        if any(directory.glob("manifest*.json")):
            raise SettingError(
                f"data={str(directory)!r}: unfinished, there is no {MANIFEST} yet; run the "
                "fineweb.py command that began it again, which goes on where it stopped"
            )
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        check_entries(manifest["shards"])
    except DAMAGED as error:
        raise damaged(path, error) from None
    promised = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    for name, size in promised.items():
        if not (directory / name).is_file():
            raise SettingError(f"{directory / name}: missing, though {MANIFEST} has it; {AGAIN}")
        if (found := (directory / name).stat().st_size) != size:
            raise SettingError(
                f"{directory / name}: {found:,} bytes, and {size:,} in {MANIFEST}; {AGAIN}"
            )
    for file in sorted(directory.iterdir()):
        if file.suffix in SUFFIXES and file.name not in promised:
            raise SettingError(f"{file}: not a shard of {MANIFEST}; move it elsewhere")
    return manifest


DAMAGED = (OSError, ValueError, KeyError, TypeError, RecursionError)


def damaged(path: Path, error: Exception) -> SettingError:
    """The error to raise for a manifest that is not as `Record` writes it."""
    reason, directory = f"{type(error).__name__}: {str(error)[:100]}", str(path.parent)
    return SettingError(
        f"{path}: damaged ({reason}); remove {directory!r} and run fineweb.py again, or take "
        "another directory"
    )


def check_entries(shards: list[dict]) -> None:
    """Raises one of DAMAGED where something is amiss with a manifest's list of shards."""
    kinds = {"file": str, "split": str, "sha256": str, "tokens": int, "bytes": int}
    for shard in shards:
        if wrong := [key for key, kind in kinds.items() if type(shard[key]) is not kind]:
            raise TypeError(f"{wrong[0]} of a shard is {shard[wrong[0]]!r}")
        if Path(shard["file"]).name != shard["file"] or len(shard["file"]) > 255:
            raise ValueError(f"{shard['file']!r} is no file's name")
    if not shards or len({shard["file"] for shard in shards}) < len(shards):
        raise ValueError("a shard is listed twice" if shards else "no shard")


def are_whole(directory: Path, shards: list[dict]) -> list[bool]:
    """Whether each shard is as its manifest says, after giving those still hidden their names."""

    def is_whole(path: Path, shard: dict) -> bool:
        return (
            path.is_file()
            and path.stat().st_size == shard["bytes"]
            and checkpoint.sha256(path) == shard["sha256"]
        )

    def look(shard: dict) -> bool:
        path = directory / shard["file"]
        if is_whole(hidden(path), shard):  # a kill came between record and renaming
            os.replace(hidden(path), path)
            return True
        return is_whole(path, shard)

    with ThreadPoolExecutor(4) as pool:  # hashing lets other threads run
        return list(pool.map(look, shards))


# -------------------------------------------------------------------------------------------------
# Writing


class Counts(NamedTuple):
    """Documents, nulls (which are none), and documents with bytes that were no UTF-8."""

    documents: int = 0
    nulls: int = 0
    replaced: int = 0

    def plus(self, other: "Counts") -> "Counts":
        """The sums, one by one."""
        return Counts(*(a + b for a, b in zip(self, other)))


class Place(NamedTuple):
    """A place in the stream of tokens: `skip` tokens into the piece of text that begins at `start`
    of file number `file`. counts: of what lies before that piece."""

    file: int = 0
    start: int = 0
    skip: int = 0
    counts: Counts = Counts()

    @classmethod
    def of(cls, values: list) -> "Place":
        """From what JSON makes of one."""
        *numbers, counts = values
        return cls(*numbers, Counts(*counts))


def npy_header(tokens: int) -> bytes:
    """What `numpy.save` writes before the values of a uint16 array, at any size as many bytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)}
    )
    return header.getvalue()


HEADER_BYTES = len(npy_header(0))


def hidden(path: Path) -> Path:
    """The name of a shard while it is being filled."""
    return path.with_name(f".{path.name}.partial")


def no_room(directory: Path) -> UserError:
    """The error to raise where the disk is full."""
    free = shutil.disk_usage(directory).free
    return UserError(
        f"out={str(directory)!r}: the disk is full ({free:,} bytes left); make room and run the "
        "same command again, which goes on from here"
    )


class Shard:
    """A shard that is being filled; `tokens` of it may be on the disk already."""

    def __init__(self, path: Path, capacity: int, tokens: int = 0):
        self.path, self.capacity, self.tokens = path, capacity, tokens
        self.file = open(hidden(path), "r+b" if tokens else "wb")
        self.file.truncate(self.file.seek(HEADER_BYTES + 2 * tokens))

    @property
    def room(self) -> int:
        """Tokens that the shard still takes."""
        return self.capacity - self.tokens

    def write(self, tokens: np.ndarray) -> None:
        """Appends uint16 tokens.

        Raises UserError, before anything is written, where that would touch the last hundredth of
        the disk (at most 1 GiB of it).
        """
        disk = shutil.disk_usage(self.path.parent)
        # Some network file systems tell of no blocks at all.
        if disk.total and disk.free - tokens.nbytes < min(disk.total // 100, 1 << 30):
            raise no_room(self.path.parent)
        self.file.write(tokens.astype("<u2", copy=False).data)
        self.tokens += len(tokens)

    def flush(self) -> None:
        """Waits until all that was written is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self, split: str, place: Place | None) -> dict:
        """Completes the file under its hidden name. Returns its entry in the manifest.

        place: the place at its end
        """
        self.file.seek(0)
        self.file.write(npy_header(self.tokens))
        self.flush()
        self.file.close()
        return {
            "file": self.path.name,
            "split": split,
            "tokens": self.tokens,
            "bytes": HEADER_BYTES + 2 * self.tokens,
            "sha256": checkpoint.sha256(hidden(self.path)),
            "place": place,
        }

    def publish(self) -> None:
        """Gives the file its name."""
        os.replace(hidden(self.path), self.path)
        checkpoint.flush(self.path.parent)

    def discard(self) -> None:
        """Gives up the shard; no file of it is left."""
        self.file.close()
        hidden(self.path).unlink(missing_ok=True)


class Record:
    """What one process has done of its share, and how it goes on.

    directory: of the shards, this process's and others'
    settings: those that decide what the shards hold; `shard_size`, `val_tokens` and `prefix` among
        them
    rank, world: of the process; each has a record of its own
    """

    def __init__(self, directory: Path, settings: dict, rank: int, world: int):
        self.directory, self.settings, self.rank, self.world = directory, settings, rank, world
        self.path = directory / (MANIFEST if world == 1 else f"manifest_{rank:05d}.json")
        self.partial = self.path.with_suffix(".partial.json")
        self.whole = set()  # the numbers of the shards that are known to be as recorded
        self.facts = {}
        self.commit_of_others = None  # of the dataset on the Hub that other processes have begun
        self.unsure = set()  # the numbers of those made of a file that has changed since

    def begin(self, sources: list[dict], source_names: str, commit: str | None) -> None:
        """Starts afresh.

        sources: the files of this process's share
        source_names: a hash of the names of all processes' files
        commit: of a dataset on the Hub
        """
        self.facts = {
            "settings": self.settings,
            "tokenizer": {"name": "gpt2", "sha256": tokenizer.RANKS_SHA256},
            "rank": self.rank,
            "world_size": self.world,
            "source_names": source_names,
            "commit": commit,
            "sources": sources,
            "shards": [],
            "open": None,  # the shard being filled: its number, its tokens on the disk, the place
            "complete": False,  # whether the end of the sources was reached
            "counts": Counts(),
        }

    def load(self) -> bool:
        """Takes up what an earlier process recorded; False where there is nothing.

        Raises UserError where the directory holds anything else: shards of other settings, of
        another number of processes, of another program.
        """
        afresh = "choose another --out"
        paths = sorted(self.directory.glob("manifest*.json"))
        for path in sorted(paths, key=lambda path: path != self.partial):
            try:
                facts = json.loads(path.read_text(encoding="utf-8"))
                settings, world = facts["settings"], facts["world_size"]
                self.commit_of_others = facts["commit"]
                changed = [name for name in self.settings if self.settings[name] != settings[name]]
                if path in (self.partial, self.path) and world == self.world and not self.facts:
                    self.facts = {"open": None, "complete": True} | facts
                    self.check_facts()
            except FileNotFoundError:
                continue  # another process has just finished
            except DAMAGED as error:
                raise damaged(path, error) from None
            if changed:
                name = changed[0]
                raise UserError(
                    f"{name}={self.settings[name]!r}: out={str(self.directory)!r} was begun with "
                    f"{name}={settings[name]!r}; give that to go on with it, or {afresh}"
                )
            if world != self.world:
                raise UserError(
                    f"out={str(self.directory)!r}: begun by {world} processes (WORLD_SIZE), and "
                    f"this is one of {self.world}; start as many to go on with it, or {afresh}"
                )
        if not self.facts:
            name = re.escape(self.settings["prefix"]) + r"_(train|val)_\d{5}_\d{6}\.npy"
            for file in sorted(self.directory.iterdir()):
                others = self.world > 1 and re.fullmatch(name, file.name)
                if file.suffix in SUFFIXES and not others:
                    raise UserError(f"{file}: a shard that no {MANIFEST} tells of; {afresh}")
        return bool(self.facts)

    def check_facts(self) -> None:
        """Raises one of DAMAGED where something is amiss with what was loaded."""
        facts, shards, opened = self.facts, self.facts["shards"][:], self.facts["open"]
        if shards or (self.world == 1 and not self.partial.exists()):
            check_entries(facts["shards"])
        places = [Place.of(shard["place"]) for shard in shards if shard["place"]]
        numbers = [*Counts(*facts["counts"]), *(source["bytes"] for source in facts["sources"])]
        if opened:
            check_entries([opened | dict(split="", sha256="", bytes=0)])
            places.append(Place.of(opened["place"]))
            numbers.append(opened["number"])
        numbers += [number for place in places for number in (*place[:3], *place.counts)]
        texts = [facts["source_names"], *(source["file"] for source in facts["sources"])]
        if not all(type(n) is int for n in numbers) or not all(type(t) is str for t in texts):
            raise TypeError("something else in place of a number or a name")

    def check_sources(self, sources: list[dict], source_names: str) -> None:
        """Raises UserError where the sources are not those of which shards were made.

        A file of which nothing was used yet may have been replaced. One of which something was
        used, mended perhaps, must give the same shards again.
        """
        known = self.facts["sources"]
        names = [source["file"] for source in sources] == [source["file"] for source in known]
        if not names or source_names != self.facts["source_names"]:
            raise UserError(
                f"source: other files than out={str(self.directory)!r} was begun with; "
                "choose another --out"
            )
        changed = [i for i, (now, then) in enumerate(zip(sources, known)) if now != then]
        if changed and self.facts["complete"]:
            raise UserError(
                f"{sources[changed[0]]['file']}: changed since out={str(self.directory)!r} was "
                "made of it; choose another --out"
            )
        first = Place(changed[0] if changed else len(known))
        ends = enumerate(shard["place"] for shard in self.facts["shards"])
        self.unsure = {number for number, end in ends if changed and Place.of(end) > first}
        if changed and self.facts["open"] and Place.of(self.facts["open"]["place"]) > first:
            self.facts["open"] = None
        self.sources = sources
        if not self.unsure:
            self.facts["sources"] = sources

    def verify(self, say) -> None:
        """Finds out which recorded shards are whole; `say(line)` hears of those that are not."""
        shards = self.facts["shards"]
        results = are_whole(self.directory, shards)
        for shard, good in zip(shards, results):
            if not good:
                say(f"{self.directory / shard['file']}: missing or altered; making it anew")
        self.whole = {n for n, good in enumerate(results) if good and n not in self.unsure}
        if len(self.whole) < len(shards) and shards[0]["place"] is None:  # see split_small
            self.whole = set()
            self.facts |= {"shards": [], "open": None, "complete": False, "counts": Counts()}

    @property
    def end(self) -> Place:
        """The place after the last recorded shard."""
        place = self.facts["shards"][-1]["place"] if self.facts["shards"] else None
        return Place.of(place) if place else Place()

    @property
    def tokens(self) -> int:
        """How many are in the recorded shards."""
        return sum(shard["tokens"] for shard in self.facts["shards"])

    def next_missing(self) -> int | None:
        """The number of the first shard that is to be made, or None."""
        count = len(self.facts["shards"])
        missing = [number for number in range(count) if number not in self.whole]
        if missing:
            return missing[0]
        return None if self.facts["complete"] else count

    def is_finished(self) -> bool:
        """Whether there is nothing left to do, not even to write the manifest."""
        return self.next_missing() is None and self.path.exists() and not self.partial.exists()

    def split_of(self, number: int) -> str:
        """The split that shard `number` belongs to."""
        return "val" if number == 0 and self.rank == 0 else "train"

    def open_shard(self, number: int, tokens: int = 0) -> Shard:
        """Shard `number`, to be filled, of which `tokens` are on the disk already."""
        rank = f"_{self.rank:05d}" if self.world > 1 else ""
        split, size = self.split_of(number), self.settings["shard_size"]
        if split == "val" and self.settings["val_tokens"]:
            size = self.settings["val_tokens"]
        name = f"{self.settings['prefix']}_{split}{rank}_{number:06d}.npy"
        return Shard(self.directory / name, size, tokens)

    def resume(self, number: int) -> tuple[Shard, Place]:
        """(shard `number` with what is on the disk of it, the place after that)."""
        shard = self.facts["open"]
        if shard and shard["number"] == number:
            path = self.directory / shard["file"]
            size = HEADER_BYTES + 2 * shard["tokens"]
            if hidden(path).is_file() and hidden(path).stat().st_size >= size:
                return self.open_shard(number, shard["tokens"]), Place.of(shard["place"])
        place = self.facts["shards"][number - 1]["place"] if number else None
        return self.open_shard(number), Place.of(place) if place else Place()

    def save(self) -> None:
        """Writes what is known so far."""
        checkpoint.write_text(self.partial, json.dumps(self.facts, indent=1) + "\n")

    def save_open(self, shard: Shard, number: int, place: Place) -> None:
        """Puts on the disk what is in a shard that is being filled. place: after its last token"""
        shard.flush()
        self.facts["open"] = {
            "number": number,
            "file": shard.path.name,
            "tokens": shard.tokens,
            "place": place,
        }
        self.save()

    def add(self, shard: Shard, number: int, place: Place) -> None:
        """Records a shard that is done, then gives it its name. place: after its last token

        Raises UserError where it was made anew and comes out otherwise.
        """
        shards, entry = self.facts["shards"], shard.finish(self.split_of(number), place)
        if number < len(shards) and entry["sha256"] != shards[number]["sha256"]:
            hidden(shard.path).unlink()
            raise self.otherwise(number)
        if number in self.unsure:
            self.unsure.remove(number)
            if not self.unsure:
                self.facts["sources"] = self.sources
        self.facts["shards"] = [*shards[:number], entry, *shards[number + 1 :]]
        self.facts["open"] = None
        self.whole.add(number)
        self.save()
        shard.publish()

    def otherwise(self, number: int) -> UserError:
        """The error to raise where a shard made again has other tokens."""
        return UserError(
            f"{self.directory / self.facts['shards'][number]['file']}: comes out otherwise than "
            "when it was first made; were the sources changed? choose another --out"
        )

    def complete(self, number: int, counts: Counts) -> None:
        """The end of the sources is reached, with these counts and as many shards.

        Raises UserError where there were more before.
        """
        if number < len(self.facts["shards"]):
            raise self.otherwise(number)
        self.facts |= {"complete": True, "counts": counts, "open": None}
        self.save()

    def split_small(self) -> None:
        """Gives a text of less than two shards both splits: its first tenth becomes `val`.

        Raises UserError where there is nothing left for training.
        """
        shards, size, total = self.facts["shards"], self.settings["shard_size"], self.tokens
        if self.rank or (shards and shards[0]["place"] is None):
            return
        if total < 2 or (self.settings["val_tokens"] and len(shards) < 2):
            for path in (self.partial, *(self.directory / shard["file"] for shard in shards)):
                path.unlink(missing_ok=True)  # so that the same --out will do
            raise UserError(
                f"source: only {total:,} tokens in all{' of the first rank' * (self.world > 1)}, "
                "which leaves none to train on; give more text or fewer --val_tokens"
            )
        if self.settings["val_tokens"] or total >= 2 * size:
            return
        files = [np.load(self.directory / shard["file"], mmap_mode="r") for shard in shards]
        tokens = np.concatenate(files)
        val = max(1, total // 10)
        parts = [tokens[:val], *(tokens[i : i + size] for i in range(val, total, size))]
        written, entries = [], []
        for number, part in enumerate(parts):
            written.append(self.open_shard(number))
            written[-1].write(part)
            entries.append(written[-1].finish(self.split_of(number), None))
        self.facts["shards"] = entries
        self.whole = set(range(len(entries)))
        self.save()
        for shard in written:
            shard.publish()

    def close(self) -> None:
        """Writes this process's manifest, and that of all if it was the last."""
        counts, shards = Counts(*self.facts["counts"])._asdict(), self.facts["shards"]
        for split in ("train", "val"):
            in_split = [shard["tokens"] for shard in shards if shard["split"] == split]
            counts[f"{split}_tokens"] = sum(in_split)
        facts = {key: value for key, value in self.facts.items() if key not in ("open", "complete")}
        facts["totals"] = counts
        checkpoint.write_text(self.path, json.dumps(facts, indent=1) + "\n")
        self.partial.unlink(missing_ok=True)

    def merge(self) -> bool:
        """Whether the manifest of all processes is there; written now if this one was the last.

        Raises UserError where their sources differ.
        """
        if self.world == 1:
            return True
        parts = []
        for rank in range(self.world):
            try:
                path = self.directory / f"manifest_{rank:05d}.json"
                parts.append(json.loads(path.read_text(encoding="utf-8")))
            except FileNotFoundError:
                return False
        first = parts[0]
        for part in parts:
            if any(part[key] != first[key] for key in ("source_names", "commit", "settings")):
                raise UserError(
                    f"out={str(self.directory)!r}: ranks 0 and {part['rank']} found different "
                    "sources; run all again with another --out"
                )
        whole = {key: first[key] for key in ("settings", "tokenizer", "world_size", "commit")}
        whole["sources"] = [source for part in parts for source in part["sources"]]
        whole["shards"] = [
            {key: value for key, value in shard.items() if key != "place"}
            for part in parts
            for shard in part["shards"]
        ]
        names = first["totals"]
        whole["totals"] = {name: sum(part["totals"][name] for part in parts) for name in names}
        mine = self.directory / f".{MANIFEST}.{self.rank:05d}"  # others may be writing it, too
        checkpoint.write_text(mine, json.dumps(whole, indent=1) + "\n")
        os.replace(mine, self.directory / MANIFEST)
        return True
