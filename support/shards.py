"""Reading token shards: one stream of tokens per split, the manifest, a permutation of an epoch.

A directory of shards holds `.npy` files (numpy's, as fineweb.py writes them) and `.bin` files
(llm.c's), with `train` or `val` in each name. fineweb.py adds `manifest.json`, which lists the
shards with their sizes and SHA-256 hashes; a directory that other programs wrote has none.
"""

import functools
import hashlib
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from support import text_encoding, tokenizer
from support.errors import SettingError, UserError
from support.files import sha256
from support.launch import print0

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "manifest.json"
SUFFIXES = (".npy", ".bin")
MAPPED = 128  # files mapped at a time, each of which counts as an open file
# What reading a manifest raises if it is damaged or another program's file of that name.
MANIFEST_ERRORS = (OSError, ValueError, KeyError, TypeError, RecursionError)
REBUILD = "run the same fineweb.py command again: it rebuilds missing and altered shards"
GET_DATA = (
    'run "python fineweb.py" for the real data, or "python train_gpt2.py tiny" to see a GPT learn'
)

# -------------------------------------------------------------------------------------------------
# Streams of tokens


class ShardFile:
    """The tokens of a shard's file, of which slices are uint16 arrays (tokens,).

    map_file: `np.memmap`, cached, so that a limited number of files is mapped and open at a time
    """

    def __init__(self, path: Path, offset: int, length: int, map_file=np.memmap):
        self.path, self.offset, self.length, self.map_file = path, offset, length, map_file

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> np.ndarray:
        """Raises UserError if the file is missing or shorter than when it was opened."""
        found = os.path.getsize(self.path) if os.path.isfile(self.path) else None
        if found is None or found < (size := self.offset + 2 * self.length):
            problem = "No such file" if found is None else f"{found:,} bytes, but {size:,}"
            raise UserError(
                f"{self.path}: {problem} when the run began; put it back and run the same command "
                "again"
            )  # reading what is mapped would end in SIGBUS
        try:
            return self.map_file(self.path, "<u2", "r", self.offset, (self.length,))[part]
        except OSError:  # some network file systems cannot map files
            count, offset = part.stop - part.start, self.offset + 2 * int(part.start)
            return np.fromfile(self.path, "<u2", count, offset=offset)


class TokenStream:
    """The tokens of one split as if its shards were one array.

    shards: `ShardFile`s or uint16 arrays in the order of the stream; names: the file of each
    """

    def __init__(self, shards: list, names: list[str]):
        self.shards, self.names = shards, names
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _shard_of(self, position: int) -> int:
        """The index of the shard that holds token `position`."""
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), uint16, which may lie in several shards."""
        index, pieces = self._shard_of(start), []
        while start < stop:
            shard, first = self.shards[index], self.starts[index]
            end = min(stop, int(self.starts[index + 1]))
            pieces.append(shard[start - first : end - first])
            start, index = end, index + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def read_window(self, index: int, T: int, vocab_size: int) -> np.ndarray:
        """Window `index` of T tokens, and the next token: uint16 (T + 1,).

        Raises UserError for a token id that the model does not have.
        """
        row = self.read(index * T, (index + 1) * T + 1)
        if row.max() >= vocab_size:
            at = index * T + int(row.argmax())
            name = self.names[self._shard_of(at)]
            raise UserError(
                f"{name}: token id {row.max()} at token {at} of the split, but the "
                f"model has {vocab_size} ids; tokenize with GPT-2's tokenizer"
            )
        return row

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the length and of 16 M tokens in 1,024 places, or of all if there are fewer."""
        digest = hashlib.sha256(str(len(self)).encode())
        distance = math.ceil(len(self) / 1024)
        for start in range(0, len(self), max(1, distance)):
            stop = min(start + min(distance, 16384), len(self))
            digest.update(self.read(start, stop).astype("<u2").tobytes())
        return digest.hexdigest()[:16]


def open_splits(data: str) -> dict[str, TokenStream]:
    """{"train": stream, "val": stream} of a directory of shards, or of a `.txt` file.

    The last tenth of a text is "val". Raises SettingError if `data` is neither, if a split has no
    shard, or for a manifest that the files do not match; UserError for a shard that is not valid.
    """
    path = find_data(data)
    if path.is_file() and path.suffix.lower() == ".txt":
        return _tokenize_text(path)
    if path.is_file():
        raise SettingError(
            f"data={data!r}: neither a directory of shards nor a .txt file; python fineweb.py "
            "--source=FILE --out=DIRECTORY makes shards of parquet, jsonl and txt files"
        )
    if not path.is_dir():
        raise SettingError(f"data={data!r}: no such directory or file; {GET_DATA}")
    load_manifest(path)
    files = sorted(file for file in path.iterdir() if is_shard(file))
    streams, map_file = {}, functools.lru_cache(MAPPED)(np.memmap)
    for split, other in (("train", "val"), ("val", "train")):
        names = [str(file) for file in files if split in file.name]
        if both := [name for name in names if other in Path(name).name]:
            raise SettingError(f"{both[0]}: both train and val in the name; rename it")
        if not names:
            raise SettingError(
                f"data={data!r}: no shards (.npy, .bin) with {split!r} in the name; {GET_DATA}"
            )
        streams[split] = TokenStream([open_shard(Path(n), map_file) for n in names], names)
    return streams


def check_lengths(data: str, streams: dict[str, TokenStream], T: int) -> None:
    """Raises SettingError if a split has less than one window of T tokens and its next token."""
    for split, tokens in streams.items():
        if len(tokens) <= T:
            raise SettingError(
                f"data={data!r}: {len(tokens)} tokens of {split!r} are too few for a window "
                f"of T={T} and its next token; give more text or a smaller T"
            )


def is_shard(path: Path) -> bool:
    """Whether a file's name is that of a shard; macOS leaves `._name` beside a file."""
    return path.suffix in SUFFIXES and not path.name.startswith(".")


def find_data(data: str) -> Path:
    """A path as given, or in the repository if it is relative and does not exist here."""
    in_repository = ROOT / data
    return in_repository if not Path(data).exists() and in_repository.exists() else Path(data)


def _tokenize_text(path: Path) -> dict[str, TokenStream]:
    try:
        text = text_encoding.decode(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingError(f"{path}: {error}") from None
    tokens = tokenizer.encode_plain(text).astype(np.uint16)
    cut = len(tokens) * 9 // 10
    parts = {"train": tokens[:cut], "val": tokens[cut:]}
    return {split: TokenStream([part], [str(path)]) for split, part in parts.items()}


def open_shard(path: Path, map_file=np.memmap) -> ShardFile:
    """A `.npy` or `.bin` shard. Raises UserError if it is not a complete shard of GPT-2 tokens."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".npy":
                if np.lib.format.read_magic(file) != (1, 0):  # others are for longer headers
                    raise ValueError("a .npy of another version than 1.0")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                header = np.fromfile(file, dtype="<i4", count=256)
                if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
                    raise ValueError("no llm.c header (256 int32, magic 20240520, version 1)")
                shape, dtype = (int(header[2]),), np.dtype("<u2")
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
        expected = offset + dtype.itemsize * math.prod(shape)
        if size < expected or (size > expected and path.suffix == ".bin"):
            found = (size - offset) // dtype.itemsize
            raise ValueError(f"truncated or too long: {found:,} of {math.prod(shape):,} tokens")
    except Exception as error:  # numpy's parser of a damaged header raises anything
        raise UserError(f"{path}: not a valid shard: {error}; make it again") from None
    if dtype != np.dtype("<u2") or len(shape) != 1:
        raise UserError(
            f"{path}: {dtype} of {len(shape)} dimensions instead of uint16 of one; "
            "use shards of GPT-2 tokens"
        )
    return ShardFile(path, offset, shape[0], map_file)


# -------------------------------------------------------------------------------------------------
# The manifest


def load_manifest(directory: Path) -> dict | None:
    """The manifest of a directory of shards; None if another program wrote the directory.

    `shards` has one entry for each shard, in the order of the stream: `file`, `split`, `tokens`,
    `bytes`, `sha256`. Raises SettingError if fineweb.py has not finished the directory, if the
    manifest is damaged, and if a shard is missing, has another size or is not listed.
    """
    path = directory / MANIFEST
    if not path.exists():
        if any(directory.glob("manifest*.json")):
            raise SettingError(
                f"data={str(directory)!r}: unfinished, {MANIFEST} is missing; run the same "
                "fineweb.py command again, which continues where it stopped"
            )
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        validate_entries(manifest["shards"])
    except MANIFEST_ERRORS as error:
        raise manifest_error(path, error) from None
    sizes = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    for name, size in sizes.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            problem = "missing" if found is None else f"{found:,} bytes"
            raise SettingError(f"{file}: {problem}, but {size:,} bytes in {MANIFEST}; {REBUILD}")
    for file in sorted(directory.iterdir()):
        if is_shard(file) and file.name not in sizes:
            raise SettingError(f"{file}: not listed in {MANIFEST}; move it elsewhere")
    return manifest


def manifest_error(path: Path, error: Exception) -> SettingError:
    """The error to raise for a manifest that is damaged."""
    reason, directory = f"{type(error).__name__}: {str(error)[:100]}", str(path.parent)
    return SettingError(
        f"{path}: damaged ({reason}); remove {directory!r} and run fineweb.py again, or choose "
        "another directory"
    )


def validate_entries(shards: list[dict]) -> None:
    """Raises one of MANIFEST_ERRORS if a manifest's list of shards is not valid."""
    types = {"file": str, "split": str, "sha256": str, "tokens": int, "bytes": int}
    for shard in shards:
        if wrong := [key for key, expected in types.items() if type(shard[key]) is not expected]:
            raise TypeError(f"{wrong[0]} of a shard is {shard[wrong[0]]!r}")
        if Path(shard["file"]).name != shard["file"] or len(shard["file"]) > 255:
            raise ValueError(f"{shard['file']!r} is not the name of a file")
    if len({shard["file"] for shard in shards}) < len(shards):
        raise ValueError("a shard is listed twice")


def find_intact(directory: Path, shards: list[dict]) -> list[bool]:
    """Whether the file of each entry of a manifest has the SHA-256 in it."""

    def is_intact(shard: dict) -> bool:
        path = directory / shard["file"]
        return path.is_file() and sha256(path) == shard["sha256"]

    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        return list(pool.map(is_intact, shards))


def verify_shards(data: str, rank: int, world_size: int, all_gather) -> None:
    """Compares the shards with the hashes in their manifest, if there is one; each rank a part.

    all_gather: a function from an object to the list of the objects of all ranks
    Raises SettingError, on all ranks, if a shard was altered.
    """
    path, start = find_data(data), time.perf_counter()
    manifest = load_manifest(path) if path.is_dir() else None
    shards = manifest["shards"] if manifest else []
    part = shards[rank::world_size]
    altered = [s["file"] for s, intact in zip(part, find_intact(path, part)) if not intact]
    # Also without a manifest: another node's copy may have one.
    if altered := sorted(sum(all_gather(altered), [])):
        raise SettingError(f"{path / altered[0]}: altered (SHA-256); {REBUILD}")
    if shards:
        print0(f"{data}: verified {len(shards)} shards ({time.perf_counter() - start:.1f} s)")


# -------------------------------------------------------------------------------------------------
# The order of an epoch


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The image of each index under a random permutation of range(n), fixed by (seed, epoch).

    index, result: int64 (count,)
    A Feistel network: swap and mix the halves of the index's bits, eight times; a result of n or
    more passes through it again, so that range(n) maps onto itself. It needs no memory for any n,
    and no state to resume. (Black and Rogaway 2002, "Ciphers with arbitrary finite domains".)
    """
    keys = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(8, np.uint64)
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = index.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's finalizer
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed >> np.uint64(31)) & mask)
        result[outside] = (left << half) | right
        outside = result >= n
    return result.astype(np.int64)
