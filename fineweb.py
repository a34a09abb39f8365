"""Converts text into shards of GPT-2 tokens: FineWeb-Edu 10B by default, or any text.

    python fineweb.py                                     # FineWeb-Edu 10B, into edu_fineweb10B/
    python fineweb.py --source=my.txt --out=mydata        # a file of your own
    python fineweb.py --source='books/*.jsonl.zst' --text_column=content --out=books
    srun --ntasks=64 python fineweb.py --source=HuggingFaceFW/fineweb --name=default --out=fineweb

Writes uint16 arrays of exactly `shard_size` tokens (the last one holds the rest), and at the end
`manifest.json`. The documents are in the order of the dataset's files, or of the file names, each
after an <|endoftext|>. The shards are the same bytes for any number of workers and after any number
of kills: the same command, run again, continues after the last finished shard.

If RANK and WORLD_SIZE are set, or if srun started it, each process takes a run of consecutive files
and has its rank in the names of its shards: in the order of their names they hold the same tokens.

The settings of `Config` can be edited here, or given as `--name=value`.
Source: build-nanogpt's fineweb.py, whose format the shards have.
"""

import dataclasses
import errno
import hashlib
import importlib.util
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support import cli, hub, text_files, tokenizer
from support.errors import SettingError, UserError, run_main
from support.launch import SLURM, TORCHRUN, Launch, print_rank, read_launch
from support.shard_writer import Counts, Position, ShardDirectory, disk_full_error

# -------------------------------------------------------------------------------------------------
# Settings: edit the defaults here, or give --name=value


@dataclass
class Config:
    """The settings: each is an option of the command line."""

    # what to read
    source: str = "HuggingFaceFW/fineweb-edu"  # a dataset on the Hub, or a file, directory or glob
    name: str = ""  # the Hub dataset's configuration; for FineWeb-Edu sample-10BT
    text_column: str = "text"  # of parquet and jsonl
    separator: str = ""  # between the documents of a .txt, \n a line end; "": a file is a document
    # what to write
    out: str = ""  # directory of the shards; for FineWeb-Edu sample-10BT edu_fineweb10B
    shard_size: int = 100_000_000  # tokens
    val_tokens: int = 0  # of the val shard; 0: shard_size, or a tenth of less than two shards
    prefix: str = "edufineweb"  # of the shards' names
    # how
    workers: int = 0  # processes that tokenize; 0: one for each core
    engine: str = "auto"  # gigatoken (fast), tiktoken (the same ids), auto: gigatoken if installed


FINEWEB_EDU = {"name": "sample-10BT", "out": "edu_fineweb10B"}
# The content of the shards does not depend on these. All other settings are recorded in the
# manifest, and must be the same when a directory is continued. Of local files, names and sizes are
# compared instead of `source`.
MAY_CHANGE = ("out", "workers", "engine")
START_METHOD = "spawn"  # of workers; a fork would copy locks that threads of this process hold


def validate_config(config: Config) -> Config:
    """The settings with missing ones filled in. Raises SettingError for one that is not valid."""
    if config.source == Config.source and config.name in ("", FINEWEB_EDU["name"]):
        out = config.out or FINEWEB_EDU["out"]
        config = dataclasses.replace(config, name=FINEWEB_EDU["name"], out=out)
    separator = config.separator.replace("\\n", "\n").replace("\\t", "\t")
    config = dataclasses.replace(config, separator=separator)

    prefix, engines = config.prefix, ("auto", "gigatoken", "tiktoken")
    is_name = prefix and Path(prefix).name == prefix and not prefix.startswith(".")
    checks = (
        ("source", config.source, "name a dataset on the Hub or a local file"),
        ("out", config.out, "name the directory for the shards, --out=mydata"),
        ("out", os.path.isdir(config.out) or not os.path.exists(config.out), "not a directory"),
        ("shard_size", config.shard_size >= 1, "must be at least 1 token"),
        ("val_tokens", 0 <= config.val_tokens <= config.shard_size, "must be from 0 to shard_size"),
        ("workers", config.workers >= 0, "must be at least 0"),
        ("engine", config.engine in engines, f"must be one of {', '.join(engines)}"),
        ("prefix", is_name, "must be the beginning of a file name"),
        ("prefix", "train" not in prefix and "val" not in prefix, "must not contain train or val"),
    )
    for setting, valid, remedy in checks:
        if not valid:
            raise SettingError(f"{setting}={getattr(config, setting)!r}: {remedy}")
    return config


# -------------------------------------------------------------------------------------------------
# Sources: local files or a dataset on the Hub


class LocalFiles(list):
    """Paths of local files, with the interface of `hub.Downloads`."""

    get = list.__getitem__

    def is_ready(self, index: int) -> bool:
        return True

    def remove_before(self, index: int) -> None:
        pass


def share_of_rank(files: list, launch: Launch) -> list:
    """A rank's run of consecutive files. Rank 0, which writes `val`, has some if any rank has."""
    count, world_size = len(files), launch.world_size
    start, stop = (-(-count * rank // world_size) for rank in (launch.rank, launch.rank + 1))
    return files[start:stop]


def open_sources(config: Config, launch: Launch, local: list[Path] | None, shards: ShardDirectory):
    """The files of this rank, which are recorded in the manifest or compared with those in it."""
    if local is not None:
        return open_local_files(config, local, share_of_rank(local, launch), shards)
    require("datasets", "huggingface_hub")
    if not shards.load():
        commit, files = hub.list_files(config.source, config.name, shards.commit)
        if unknown := [f["file"] for f in files if not text_files.find_format(f["file"])]:
            raise UserError(
                f"source={config.source!r}: {unknown[0]} is of an unknown kind; choose a dataset "
                "of parquet, jsonl or txt files"
            )
        shards.begin(share_of_rank(files, launch), hash_names(f["file"] for f in files), commit)
    commit, files = shards.manifest["commit"], shards.manifest["sources"]
    return hub.Downloads(config.source, commit, files, shards.downloads)


def open_local_files(config: Config, files: list[Path], share: list[Path], shards: ShardDirectory):
    """`open_sources` of local files. files: of all ranks; share: of this one"""
    sources, names = [text_files.describe_file(file) for file in share], hash_names(files)
    if shards.load():
        shards.validate_sources(sources, names)
    else:
        for file in share:  # an unreadable file is reported before hours of work
            if text_files.find_format(file.name)[0] == "parquet":
                text_files.open_parquet(file, config.text_column).close()
        shards.begin(sources, names, None)
    return LocalFiles(share)


def hash_names(files) -> str:
    """A hash of the file names: all ranks must see the same files."""
    names = "\n".join(Path(file).name for file in files)
    return hashlib.sha256(os.fsencode(names)).hexdigest()


def read_pieces(files, count: int, position: Position, config: Config):
    """Yields the pieces of `count` files from a position on, and None before each wait for one."""
    for index in range(position.file, count):
        if not files.is_ready(index):
            yield None
        path, start = files.get(index), position.start if index == position.file else 0
        yield from text_files.split_into_pieces(
            path, index, start, config.text_column, config.separator
        )


# -------------------------------------------------------------------------------------------------
# Workers: the tokens of a piece


def start_workers(pool, count: int) -> None:
    """Starts the processes with SIGINT ignored: ^C is for the main process to handle."""
    interrupts = []  # they inherit the mask of the main thread, which must miss no signal meanwhile
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    can_block = hasattr(signal, "pthread_sigmask")  # not on Windows
    if can_block:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(count):
            pool.submit(int)
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
    if interrupts:
        raise KeyboardInterrupt


def initialize_worker(engine: str) -> None:
    """Creates a worker's tokenizers, and makes it exit when its parent does."""
    global encode, encode_plain
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    encode_plain = tokenizer.get_encoder("tiktoken")
    encode = tokenizer.get_encoder(engine)


def tokenize(read: tuple) -> tuple[np.ndarray, Counts]:
    """(uint16 tokens, counts) of a piece. Raises UserError if it cannot be read.

    read: as in `text_files.Piece`. The first document is also encoded by tiktoken, to compare.
    """
    function, *arguments = read
    texts, begins, replaced = function(*arguments)
    end_of_text = np.array([tokenizer.END_OF_TEXT_ID], dtype=np.uint16)
    documents = [tokenizer.valid_text(text) for text in texts if text is not None]
    parts = [end_of_text[:0]]
    for text in documents:
        parts += [end_of_text, encode(text)]
    first = documents[0][:50_000] if documents else ""
    if not np.array_equal(encode(first), encode_plain(first)):
        raise UserError(
            f"engine: gigatoken's ids differ from tiktoken's in the document {first[:60]!r}...; "
            "none of it was written; continue with --engine=tiktoken"
        )
    if not begins:
        del parts[1]
    tokens = np.concatenate(parts, dtype=np.uint16, casting="same_kind")
    return tokens, Counts(len(documents) * begins, len(texts) - len(documents), replaced)


def tokenize_in_order(pool, pieces, window: int):
    """Yields (piece, tokens, counts) in order, with at most `window` pieces in progress."""
    pending = deque()
    for piece in itertools.chain(pieces, [None]):  # None: first yields all that is in progress
        if piece is not None:
            pending.append((piece, pool.submit(tokenize, piece.read)))
        while pending and (piece is None or len(pending) > window):
            first, future = pending.popleft()
            yield first, *future.result()


def count_workers(config: Config, launch: Launch) -> int:
    """The number of workers: the setting, or this rank's part of the cores it may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return config.workers or max(1, cores // launch.local_world_size)


# -------------------------------------------------------------------------------------------------
# Writing the shards of this rank


class Progress:
    """A progress bar of tokens, whose total is estimated from the share of the sources read."""

    def __init__(self, expected: float, tokens: int, sources: list[dict], enabled: bool):
        self.bytes = np.cumsum([0] + [source["bytes"] for source in sources])
        self.bar = tqdm(
            total=max(int(expected), tokens), initial=tokens, unit=" tokens", unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 30, disable=not enabled,
            dynamic_ncols=True,
        )  # fmt: skip

    def update(self, tokens: int, piece, documents: int, shard: int) -> None:
        """tokens: new, from `piece`; documents: up to its end; shard: the number of the open one"""
        size = self.bytes[piece.file + 1] - self.bytes[piece.file]
        done = (self.bytes[piece.file] + piece.done * size) / max(1, self.bytes[-1])
        if done > 0.01:
            self.bar.total = max(int((self.bar.n + tokens) / done), self.bar.n + tokens)
        self.bar.set_postfix_str(f"{documents:,} documents, shard {shard}", refresh=False)
        self.bar.update(tokens)


def write_shards_from(
    number: int, shards: ShardDirectory, pool, files, config: Config, window: int, progress
) -> None:
    """Writes shard `number` and the following ones, up to one that is there or to the end."""
    position = shards.open_shard(number, shards.start_of(number)).position
    pieces = read_pieces(files, len(shards.manifest["sources"]), position, config)
    for piece, tokens, counts in tokenize_in_order(pool, pieces, window):
        number, (_, _, skip, before) = shards.shard.number, shards.shard.position
        progress.update(len(tokens) - skip, piece, before.documents + counts.documents, number)
        if not shards.write_piece(piece.file, piece.start, piece.stop, tokens, counts):
            return
        files.remove_before(shards.start_of(shards.shard.number).file)
    shards.finish()


def print_estimate(shards: ShardDirectory, config: Config) -> float:
    """Prints the size of the work and the disk space it needs. Returns the tokens to expect."""
    units, sources = tqdm.format_sizeof, shards.manifest["sources"]
    sizes = [source["bytes"] for source in sources]
    expected = sum(
        text_files.estimate_tokens(source["file"], source["bytes"]) for source in sources
    )
    small = expected < 2 * config.shard_size and not config.val_tokens
    needed = max(0.0, 2 * (expected - shards.tokens)) * (2 if small else 1)  # split_small_text
    if shards.manifest["commit"]:  # downloads: a file that the open shard began in, and the next
        needed += sum(sorted(sizes)[-hub.AHEAD - 1 :])
    free = shutil.disk_usage(shards.directory).free
    print_rank(
        f"{shards.directory}: {len(sources)} files of {units(sum(sizes))}B, about "
        f"{units(expected)} tokens; needs about {units(needed)}B of disk, {units(free)}B are free"
        f"{'' if free > needed else ': probably too little'}"
        + f"; continuing after {shards.tokens:,} tokens"
        * (shards.tokens > 0)
    )
    return expected


def write_missing_shards(config: Config, launch: Launch, shards: ShardDirectory, files) -> None:
    """Writes all shards of this rank that are missing."""
    tokenizer.get_encoder(config.engine)  # raises once what each worker would raise
    expected = print_estimate(shards, config)
    context, workers = multiprocessing.get_context(START_METHOD), count_workers(config, launch)
    pool = ProcessPoolExecutor(workers, context, initialize_worker, (config.engine,))
    progress = Progress(expected, shards.tokens, shards.manifest["sources"], launch.rank == 0)
    try:
        start_workers(pool, workers)
        while (number := shards.next_missing()) is not None:
            write_shards_from(number, shards, pool, files, config, 2 * workers + 2, progress)
    except BrokenProcessPool:
        raise UserError(
            "workers: a process that tokenizes died, perhaps for lack of memory; run the same "
            "command again, with fewer --workers if needed; it continues after the last shard"
        ) from None
    finally:
        shards.discard()
        progress.bar.close()
        pool.shutdown(cancel_futures=True)
    shards.split_small_text()


# -------------------------------------------------------------------------------------------------
# The command


def format_result(shards: ShardDirectory, merged: bool, seconds: float, tokens: int | None) -> str:
    """The last line: what the directory holds.

    tokens: written by this process; None if the directory was finished before
    """
    entries, counts = shards.manifest["shards"], Counts(*shards.manifest["counts"])
    val = sum(shard["tokens"] for shard in entries if shard["split"] == "val")
    line = f"{shards.directory}: {'finished already' if tokens is None else 'done'}: "
    line += f"{len(entries)} shards, {shards.tokens:,} tokens ({val:,} of them val), "
    line += f"{counts.documents:,} documents"
    if counts.nulls:
        line += f", {counts.nulls:,} nulls left out"
    if counts.replaced:
        line += f", {counts.replaced:,} pieces of text with invalid UTF-8"
    if tokens is not None:
        line += f"; {seconds:,.0f} s, {tokens / seconds / 1e6:.2f} M tokens/s"
    if not merged:
        line += "; the last rank to finish writes manifest.json"
    return line


def require(*packages: str) -> None:
    """Raises SettingError for the first package that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise SettingError(f"{package}: not installed; pip install -r requirements.txt")


def find_sources(config: Config) -> list[Path] | None:
    """The local files of `source`; None if it names a dataset on the Hub.

    Raises UserError if it is neither.
    """
    local = text_files.find_files(config.source, Path(config.out))
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", config.source)
    if local is None and (not on_hub or text_files.find_format(config.source)):
        raise UserError(
            f"source={config.source!r}: no such file or directory, nor a dataset on the Hub "
            "(OWNER/NAME); check the name"
        )
    return local


def build(config: Config, launch: Launch) -> None:
    """Writes the shards of this rank and prints the result."""
    require("filelock", "pyarrow", "tiktoken", "tqdm")
    from filelock import FileLock, Timeout

    out, local = Path(config.out), find_sources(config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / f".lock_{launch.rank:05d}", timeout=10):
            result = write_directory(config, launch, local)
    except Timeout:
        raise UserError(
            f"out={config.out!r}: another process is writing there; wait for it, or choose another "
            "--out"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full_error(out) from None
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; fix that and run the same "
            "command again, or choose another --out"
        ) from None
    print(result, flush=True)


def write_directory(config: Config, launch: Launch, local: list[Path] | None) -> str:
    """Writes the shards of this rank, from local files or else the Hub. Returns the last line."""
    start = time.monotonic()
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    settings["source"] = config.source if local is None else ""
    shards = ShardDirectory(Path(config.out), settings, launch.rank, launch.world_size)
    files = open_sources(config, launch, local, shards)
    shards.verify()
    before, finished = shards.tokens, shards.next_missing() is None and not shards.partial.exists()
    if not finished:
        write_missing_shards(config, launch, shards, files)
        shards.close()
    shutil.rmtree(shards.downloads, ignore_errors=True)
    merged = shards.merge()
    tokens = None if finished else shards.tokens - before
    return format_result(shards, merged, time.monotonic() - start, tokens)


def main() -> int:
    description = "Converts text into shards of GPT-2 tokens. All settings, with their defaults:"
    config = cli.parse(Config, {}, sys.argv[1:], description)
    build(validate_config(config), read_launch(TORCHRUN, SLURM))
    return 0


if __name__ == "__main__":
    run_main(main)
