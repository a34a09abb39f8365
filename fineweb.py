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
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
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
from support.shard_writer import Position, ShardDirectory

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
    # how
    workers: int = 0  # processes that tokenize; 0: one for each core
    engine: str = "auto"  # gigatoken (fast), tiktoken (the same ids), auto: gigatoken if installed


# Settings that may change when a directory is continued. All others are recorded in the manifest;
# of local files, names and sizes are compared instead of `source`.
MAY_CHANGE = ("out", "workers", "engine")
ENGINES = ("auto", "gigatoken", "tiktoken")
MAX_SHARD = 10**10  # tokens: a shard is collected in memory
MAX_WORKERS = 61 if sys.platform == "win32" else 1000  # 61 is the limit of Windows
START_METHOD = "spawn"  # of workers; a fork would copy locks that threads of this process hold


def validate_config(config: Config) -> Config:
    """The settings with missing ones filled in. Raises SettingError for one that is not valid."""
    if config.source == Config.source and config.name in ("", "sample-10BT"):
        config = dataclasses.replace(config, name="sample-10BT", out=config.out or "edu_fineweb10B")
    separator = config.separator.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")
    config = dataclasses.replace(config, separator=separator)
    checks = (
        ("source", config.source, "name a dataset on the Hub or a local file"),
        ("out", config.out, "name the directory for the shards, --out=mydata"),
        ("out", config.out[:1] != "~", "the shell leaves ~ as it is after =; write $HOME"),
        ("shard_size", 1 <= config.shard_size <= MAX_SHARD, f"must be from 1 to {MAX_SHARD:,}"),
        ("val_tokens", 0 <= config.val_tokens <= config.shard_size, "must be from 0 to shard_size"),
        ("workers", 0 <= config.workers <= MAX_WORKERS, f"must be from 0 to {MAX_WORKERS:,}"),
        ("engine", config.engine in ENGINES, f"must be one of {', '.join(ENGINES)}"),
    )
    for setting, valid, remedy in checks:
        if not valid:
            raise SettingError(f"{setting}={getattr(config, setting)!r}: {remedy}")
    return config


# -------------------------------------------------------------------------------------------------
# Sources: local files or a dataset on the Hub


def share_of_rank(files: list, launch: Launch) -> list:
    """A rank's run of consecutive files. Rank 0, which writes `val`, has some if any rank has."""
    return [files[i] for i in np.array_split(range(len(files)), launch.world_size)[launch.rank]]


def open_sources(config: Config, launch: Launch, local: list[Path] | None, shards: ShardDirectory):
    """The files of this rank, which are recorded in the manifest or compared with those in it.

    local: of all ranks; None if `source` names a dataset on the Hub
    """
    begun = shards.load()
    if local is None:
        if not begun:
            commit, files = hub.list_files(config.source, config.name, shards.commit)
            if unknown := [f["file"] for f in files if not text_files.find_format(f["file"])]:
                raise UserError(
                    f"source={config.source!r}: {unknown[0]} is of an unknown kind; choose a "
                    "dataset of parquet, jsonl or txt files"
                )
            names = hash_names(file["file"] for file in files)
            shards.begin(share_of_rank(files, launch), names, commit)
        commit, files = shards.manifest["commit"], shards.manifest["sources"]
        return hub.Downloads(config.source, commit, files, shards.downloads)
    share, names = share_of_rank(local, launch), hash_names(local)
    sources = [text_files.describe_file(file) for file in share]
    if begun:
        shards.validate_sources(sources, names)
    else:
        for file in share:  # an unreadable file is reported before hours of work
            text_files.find_start(file, config.text_column)
        shards.begin(sources, names, None)
    return share


def hash_names(files) -> str:
    """A hash of the file names: all ranks must see the same files."""
    names = "\n".join(Path(file).name for file in files)
    return hashlib.sha256(os.fsencode(names)).hexdigest()


def read_pieces(files, count: int, position: Position, config: Config):
    """Yields the pieces of `count` files from a position on."""
    for index in range(position.file, count):
        start = position.start if index == position.file else 0
        yield from text_files.split_into_pieces(
            files[index], index, start, config.text_column, config.separator
        )


# -------------------------------------------------------------------------------------------------
# Workers: the tokens of a piece


def start_workers(pool, count: int) -> None:
    """Starts the processes, which inherit that SIGINT is ignored: ^C is for the main process."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(count):
            pool.submit(int)
    except OSError as error:  # too many processes or open files
        raise BrokenProcessPool from error
    finally:
        signal.signal(signal.SIGINT, handler)


def initialize_worker(engine: str) -> None:
    """Creates a worker's tokenizers, and makes it exit when its parent does."""
    global encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    encode = tokenizer.get_encoder(engine)


def tokenize(begins: bool, read: tuple) -> tuple[np.ndarray, tuple]:
    """(uint16 tokens, COUNTS of `support.shard_writer`) of a piece of text.

    begins, read: as in `text_files.Piece`. The first document is also encoded by tiktoken, to
    compare. Raises UserError if the piece cannot be read.
    """
    function, *arguments = read
    texts = function(*arguments)
    documents = [tokenizer.valid_text(text) for text in texts if text is not None]
    first = documents[0][:50_000] if documents else ""
    if not np.array_equal(encode(first), tokenizer.encode_plain(first)):
        raise UserError(
            f"engine: gigatoken's ids differ from tiktoken's in the document {first[:60]!r}...; "
            "none of it was written; continue with --engine=tiktoken"
        )
    end_of_text = np.array([tokenizer.END_OF_TEXT_ID], dtype=np.uint16)
    parts = [end_of_text[:0]]
    for text in documents:
        parts += [end_of_text, encode(text)]
    if not begins:
        del parts[1]
    tokens = np.concatenate(parts, dtype=np.uint16, casting="same_kind")
    replaced = sum("\ufffd" in text for text in documents)
    return tokens, (len(documents) * begins, len(texts) - len(documents), replaced)


def tokenize_in_order(pool, pieces, window: int):
    """Yields (piece, tokens, counts) in order, with at most `window` pieces in progress."""
    pending = deque()
    for piece in pieces:
        pending.append((piece, pool.submit(tokenize, piece.begins, piece.read)))
        if len(pending) > window:
            first, future = pending.popleft()
            yield first, *future.result()
    for first, future in pending:
        yield first, *future.result()


def count_workers(config: Config, launch: Launch) -> int:
    """The number of workers: the setting, or this rank's part of the cores it may use."""
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    cores = len(affinity(0))  # macOS and Windows have no affinity
    of_task = "" if "RANK" in os.environ else os.environ.get("SLURM_CPUS_PER_TASK", "")
    # Slurm may have bound this task to cores of its own, or left it all those of the job.
    cores = min(cores, int(of_task)) if of_task.isdecimal() else cores // launch.local_world_size
    return config.workers or max(1, min(cores, MAX_WORKERS))


# -------------------------------------------------------------------------------------------------
# Writing the shards of this rank


def print_estimate(shards: ShardDirectory) -> float:
    """Prints the size of the work and the disk space it needs. Returns the tokens to expect."""
    units, sources = tqdm.format_sizeof, shards.manifest["sources"]
    sizes = [source["bytes"] for source in sources]
    expected = sum(map(text_files.estimate_tokens, sources))
    needed = max(0.0, 2 * (expected - shards.tokens))
    if shards.manifest["commit"]:  # downloads: a file that the open shard began in, and the next
        needed += sum(sorted(sizes)[-hub.AHEAD - 1 :])
    free = shutil.disk_usage(shards.directory).free
    print_rank(
        f"{shards.directory}: {len(sources)} files of {units(sum(sizes))}B, about "
        f"{units(expected)} tokens; needs about {units(needed)}B of disk, {units(free)}B are free"
        + ": probably too little" * (free <= needed)
        + f"; continuing after {shards.tokens:,} tokens" * (shards.tokens > 0)
    )
    return expected


def write_shards(config: Config, launch: Launch, shards: ShardDirectory, files) -> None:
    """Writes the shards of this rank from the current position to the end of the sources."""
    tokenizer.get_encoder(config.engine)  # raises once what each worker would raise
    context, workers = multiprocessing.get_context(START_METHOD), count_workers(config, launch)
    try:
        pool = ProcessPoolExecutor(workers, context, initialize_worker, (config.engine,))
    except OSError as error:  # its locks lie there
        raise UserError(f"/dev/shm: {error.strerror}; make room and write access there") from None
    progress = tqdm(
        total=int(print_estimate(shards)), initial=shards.tokens, unit=" tokens", unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30, disable=launch.rank > 0,
    )  # fmt: skip
    try:
        start_workers(pool, workers)
        pieces = read_pieces(files, len(shards.manifest["sources"]), shards.position, config)
        for piece, tokens, counts in tokenize_in_order(pool, pieces, 2 * workers + 2):
            progress.update(len(tokens) - shards.position.skip)
            shards.write_piece(piece, tokens, counts)
            progress.set_postfix_str(f"{shards.position.documents:,} documents", refresh=False)
            if isinstance(files, hub.Downloads):
                files.remove_before(shards.recorded.file)
        shards.finish()
    except BrokenProcessPool:
        raise UserError(
            "workers: a process that tokenizes died or did not start, perhaps for lack of memory; "
            "run the same command again, with fewer --workers if needed, to continue"
        ) from None
    finally:
        progress.close()
        pool.shutdown(cancel_futures=True)


# -------------------------------------------------------------------------------------------------
# The command


def find_sources(config: Config) -> list[Path] | None:
    """The local files of `source`; None if it is on the Hub. Raises UserError if it is neither."""
    local = text_files.find_files(config.source, Path(config.out))
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", config.source)
    if local is None and (not on_hub or text_files.find_format(config.source)):
        raise UserError(
            f"source={config.source!r}: no such file or directory, nor a dataset on the Hub "
            "(OWNER/NAME); check the name"
        )
    return local


def build(config: Config, launch: Launch) -> None:
    """Writes the shards of this rank and prints the result."""
    out = Path(config.out)
    try:
        from filelock import FileLock, Timeout

        local = find_sources(config)
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / f".lock_{launch.rank:05d}", timeout=10):
            result = write_directory(config, launch, local)
    except BrokenPipeError:  # of the console
        raise
    except OSError as error:
        if isinstance(error, Timeout):
            reason = "another process is writing there; wait"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full; make room"
        else:
            reason = f"{error.strerror or error}; fix that"
        raise UserError(
            f"{error.filename or config.out}: {reason} and run the same command again, or choose "
            "another --out"
        ) from None
    print(result, flush=True)


def write_directory(config: Config, launch: Launch, local: list[Path] | None) -> str:
    """Writes the shards of this rank, from local files or else the Hub. Returns the last line."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    settings["source"] = config.source if local is None else ""
    shards = ShardDirectory(Path(config.out), settings, launch.rank, launch.world_size)
    files = open_sources(config, launch, local, shards)
    shards.verify()
    finished = "totals" in shards.manifest
    if not finished:
        write_shards(config, launch, shards, files)
    shutil.rmtree(shards.downloads, ignore_errors=True)
    totals = shards.manifest["totals"]
    waiting = "" if shards.merge() else "; the last rank to finish writes manifest.json"
    return (
        f"{config.out}: {'finished already' if finished else 'done'}: "
        f"{len(shards.manifest['shards'])} shards, {shards.tokens:,} tokens "
        f"({totals['val_tokens']:,} of them val), {totals['documents']:,} documents, "
        f"{totals['nulls']:,} nulls left out, {totals['replaced']:,} texts with U+FFFD{waiting}"
    )


def main() -> int:
    description = "Converts text into shards of GPT-2 tokens. All settings, with their defaults:"
    config = cli.parse(Config, {}, sys.argv[1:], description)
    build(validate_config(config), read_launch(TORCHRUN, SLURM))
    return 0


if __name__ == "__main__":
    run_main(main)
