"""Turns text into shards of GPT-2 tokens: FineWeb-Edu 10B as it stands, or any text of yours.

    python fineweb.py                                     # FineWeb-Edu 10B, into edu_fineweb10B/
    python fineweb.py --source=my.txt --out=mydata        # one file of yours
    python fineweb.py --source='books/*.jsonl.zst' --text_column=content --out=books
    srun --ntasks=64 python fineweb.py --source=HuggingFaceFW/fineweb --name=default --out=fineweb

Writes, in `out`: `edufineweb_val_000000.npy`, `edufineweb_train_000001.npy`, ..., arrays of uint16
with exactly `shard_size` tokens (the last one has the rest), and at the end `manifest.json` with
the SHA-256 of each. Documents come in the order of the dataset's files, or of the file names, each
after an <|endoftext|>. The shards are the same bytes for any number of workers and after any number
of kills: the same command again goes on from the place that the last one reached.

Bytes that are no UTF-8 become U+FFFD. A null is no document; an empty text is one. The characters
"<|endoftext|>" in a text are text.

Where RANK and WORLD_SIZE are set, as by torchrun, or srun started it, each process takes a run of
consecutive files, and its rank is in the names of its shards: in the order of their names they hold
the very tokens that one process would have written.

The settings of `Config` can be edited here, or given as `--name=value`.
Source: build-nanogpt's fineweb.py, whose shards these are.
"""

import contextlib
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
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support import cli, hub, text_files, tokenizer
from support.errors import SettingError, UserError, run_main
from support.token_shards import Counts, Place, Record, no_room

# -------------------------------------------------------------------------------------------------
# Settings: edit the defaults here, or give --name=value


@dataclass
class Config:
    """The settings: a line of the command line each."""

    # what to read
    source: str = "HuggingFaceFW/fineweb-edu"  # a dataset on the Hub, or a file, directory or glob
    name: str = ""  # the Hub dataset's configuration; of FineWeb-Edu sample-10BT
    text_column: str = "text"  # of parquet and jsonl
    separator: str = ""  # between the documents of a .txt, \n a line end; "": a file is a document
    # what to write
    out: str = ""  # directory of the shards; of FineWeb-Edu sample-10BT edu_fineweb10B
    shard_size: int = 100_000_000  # tokens
    val_tokens: int = 0  # of the val shard; 0: shard_size, or a tenth of less than two shards
    prefix: str = "edufineweb"  # of the shards' names
    # how
    workers: int = 0  # processes that tokenize; 0: one for each core
    engine: str = "auto"  # gigatoken (fast), tiktoken (the same ids), auto: gigatoken if installed


FINEWEB_EDU = {"name": "sample-10BT", "out": "edu_fineweb10B"}
# What decides the shards' contents, beside the source itself.
DEFINING = ("name", "text_column", "separator", "shard_size", "val_tokens", "prefix")
START_METHOD = "spawn"  # of workers; a fork would copy locks that threads of ours may hold
SAVE_S = 5  # seconds from one record of the place reached to the next: what a kill costs
# To tell how much disk is needed: of English text, and of FineWeb-Edu's parquet files, of which
# 28.5 GB hold 9.95 B tokens.
TEXT_TOKENS_PER_BYTE, HUB_TOKENS_PER_BYTE = 0.22, 0.35


def check_config(config: Config) -> Config:
    """The settings with what is left out filled in. Raises SettingError for an impossible one."""
    if config.source == Config.source and config.name in ("", FINEWEB_EDU["name"]):
        out = config.out or FINEWEB_EDU["out"]
        config = dataclasses.replace(config, name=FINEWEB_EDU["name"], out=out)
    separator = config.separator.replace("\\n", "\n").replace("\\t", "\t")
    config = dataclasses.replace(config, separator=separator)

    def need(condition, setting, remedy):
        if not condition:
            raise SettingError(f"{setting}={getattr(config, setting)!r}: {remedy}")

    need(config.source, "source", "name a dataset on the Hub or a local file")
    need(config.out, "out", "name the directory for the shards, --out=mydata")
    there = os.path.exists(config.out)
    need(not there or os.path.isdir(config.out), "out", "is no directory; name one")
    need(config.shard_size >= 1, "shard_size", "must be at least 1 token")
    need(0 <= config.val_tokens <= config.shard_size, "val_tokens", "must be from 0 to shard_size")
    need(config.workers >= 0, "workers", "must be at least 0")
    engines = ("auto", "gigatoken", "tiktoken")
    need(config.engine in engines, "engine", f"must be one of {', '.join(engines)}")
    plain = Path(config.prefix).name == config.prefix and not config.prefix.startswith(".")
    need(config.prefix and plain, "prefix", "must be the beginning of a file's name")
    split = any(word in config.prefix for word in ("train", "val"))
    need(not split, "prefix", "must hold neither train nor val, which tell the splits apart")
    return config


class Launch(NamedTuple):
    """This process among those that share the work, `local_world` of them on this machine."""

    rank: int
    world: int
    local_world: int


def find_launch() -> Launch:
    """From torchrun's variables, or srun's. Raises UserError where they contradict."""
    for rank, world, local_world in (
        ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        # srun sets them for the tasks of a step; a batch script itself lacks the second one.
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE"),
    ):
        if rank in os.environ and world in os.environ:
            try:
                launch = Launch(*(int(os.environ.get(n, 1)) for n in (rank, world, local_world)))
            except ValueError:
                launch = None
            if launch is None or not 0 <= launch.rank < launch.world or launch.local_world < 1:
                share = f" ({local_world}={os.environ.get(local_world, 1)} of them here)"
                raise UserError(
                    f"{rank}={os.environ[rank]}: must be a number below "
                    f"{world}={os.environ[world]}{share}; unset all to work alone"
                )
            return launch
    return Launch(0, 1, 1)


# -------------------------------------------------------------------------------------------------
# Sources: local files or a dataset on the Hub


class LocalFiles:
    """Files that are there: what `hub.Downloads` is for those that must be fetched."""

    def __init__(self, files: list[Path]):
        self.files = files

    def is_ready(self, index: int) -> bool:
        return True

    def get(self, index: int) -> Path:
        return self.files[index]

    def drop_before(self, index: int) -> None:
        pass

    def remove(self) -> None:
        pass

    def close(self) -> None:
        pass


def share_of(files: list, launch: Launch) -> list:
    """A rank's run of consecutive files; the first rank, which makes `val`, has some if any has."""
    first, stop = (-(-len(files) * rank // launch.world) for rank in (launch.rank, launch.rank + 1))
    return files[first:stop]


def open_sources(config: Config, launch: Launch, local: list[Path] | None, record: Record, say):
    """The files of this process's share, as `LocalFiles` or `hub.Downloads`.

    They are recorded, or compared with those recorded before.
    """
    known = record.load()
    if local is None:
        try:
            import datasets  # noqa: F401
            import huggingface_hub  # noqa: F401
        except ImportError as error:
            raise not_installed(error) from None
    if local is None and not known:
        commit, files = hub.list_files(config.source, config.name, record.commit_of_others, say)
        if unknown := [f["file"] for f in files if not text_files.format_of(f["file"])]:
            raise UserError(
                f"source={config.source!r}: {unknown[0]} is of no known kind; choose a dataset of "
                "parquet, jsonl or txt files"
            )
        record.begin(share_of(files, launch), names_hash(f["file"] for f in files), commit)
    elif local is not None:
        share = share_of(local, launch)
        sources, names = list(map(text_files.describe_local, share)), names_hash(local)
        if known:
            record.check_sources(sources, names)
        else:
            for file in share:  # so that what is wrong with one is known before hours of work
                if text_files.format_of(file.name)[0] == "parquet":
                    text_files.open_parquet(file, config.text_column).close()
            record.begin(sources, names, None)
        return LocalFiles(share)
    facts, directory = record.facts, record.directory / f".downloads_{launch.rank:05d}"
    return hub.Downloads(config.source, facts["commit"], facts["sources"], directory, say)


def names_hash(files) -> str:
    """Of the names alone: all processes must see the same files."""
    names = "\n".join(Path(file).name for file in files)
    return hashlib.sha256(os.fsencode(names)).hexdigest()


def all_pieces(files, count: int, place: Place, config: Config):
    """Yields the pieces of `count` files from `place` on, and None before a file is waited for."""
    for index in range(place.file, count):
        if not files.is_ready(index):
            yield None
        start = place.start if index == place.file else 0
        path = files.get(index)
        yield from text_files.pieces_of(path, index, start, config.text_column, config.separator)


# -------------------------------------------------------------------------------------------------
# Workers: the tokens of a piece


def start_workers(pool, count: int) -> None:
    """Starts the processes, deaf to SIGINT from their birth: ^C is for this one to handle."""
    heard = []  # while this one's main thread is deaf, too, its others are not
    handler = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    blocks = hasattr(signal, "pthread_sigmask")  # not on Windows
    if blocks:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(count):
            pool.submit(int)
    finally:
        if blocks:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
    if heard:
        raise KeyboardInterrupt


def start_worker(engine: str) -> None:
    """Makes a worker's tokenizers, and has the worker end when its parent does."""
    global encode, encode_plain
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the parent to handle
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    encode_plain = tokenizer.get_encoder("tiktoken")
    encode = tokenizer.get_encoder(engine)


def tokenize(read: tuple) -> tuple[np.ndarray, Counts]:
    """(uint16 tokens, counts) of a piece. Raises UserError where it cannot be read.

    Its first document is also given to tiktoken: another engine's ids must be the same.
    """
    function, *arguments = read
    texts, begins, replaced = function(*arguments)
    end_of_text = np.array([tokenizer.END_OF_TEXT_ID], dtype=np.uint16)
    documents = [tokenizer.valid_text(text) for text in texts if text is not None]
    parts = [end_of_text[:0]]
    for text in documents:
        parts += [end_of_text, encode(text)]
    if documents:
        check_engine(documents[0][:50_000])
    if not begins:
        del parts[1]
    tokens = np.concatenate(parts, dtype=np.uint16, casting="same_kind")
    return tokens, Counts(len(documents) * begins, len(texts) - len(documents), replaced)


def check_engine(text: str) -> None:
    """Raises UserError where the engine's ids of a text are not tiktoken's."""
    if not np.array_equal(encode(text), encode_plain(text)):
        raise UserError(
            f"engine: gigatoken's ids are not tiktoken's in the document {text[:60]!r}...; "
            "nothing of it was written; go on with --engine=tiktoken"
        )


def tokenize_all(pool, pieces, window: int):
    """Yields (piece, tokens, counts) in order, while `window` pieces are being worked on."""
    pending = deque()
    try:
        for piece in pieces:
            if piece is not None:
                pending.append((piece, pool.submit(tokenize, piece.read)))
            while pending and (piece is None or len(pending) > window):
                first, future = pending.popleft()
                yield first, *future.result()
        while pending:
            first, future = pending.popleft()
            yield first, *future.result()
    finally:
        for _, future in pending:
            future.cancel()


# -------------------------------------------------------------------------------------------------
# The work


class Progress:
    """A bar of tokens with what is needed to guess their number, and the place in words."""

    def __init__(self, expected: float, tokens: int, sources: list[dict], enabled: bool):
        from tqdm import tqdm

        self.bytes = np.cumsum([0] + [source["bytes"] for source in sources])
        self.bar = tqdm(
            total=max(int(expected), tokens), initial=tokens, unit=" tokens", unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 30, disable=not enabled,
            dynamic_ncols=True,
        )  # fmt: skip

    def add(self, tokens: int, piece, counts: Counts, number: int) -> None:
        """piece: the one that the tokens come from; counts: up to its end; number: of the shard"""
        size = self.bytes[piece.file + 1] - self.bytes[piece.file]
        done = (self.bytes[piece.file] + piece.done * size) / max(1, self.bytes[-1])
        if done > 0.01:
            self.bar.total = max(int((self.bar.n + tokens) / done), self.bar.n + tokens)
        self.bar.set_postfix_str(f"{counts.documents:,} documents, shard {number}", refresh=False)
        self.bar.update(tokens)


def make_from(number: int, record: Record, pool, files, config: Config, window: int, progress):
    """Makes shard `number` and the following ones, up to one that is there or to the end."""
    shard, place = record.resume(number)
    pieces = all_pieces(files, len(record.facts["sources"]), place, config)
    saved = time.monotonic()
    try:
        for piece, tokens, counts in tokenize_all(pool, pieces, window):
            before, position = place.counts, place.skip
            after = Place(piece.file, piece.stop, 0, before.plus(counts))
            progress.add(len(tokens) - position, piece, after.counts, number)
            while position < len(tokens):
                part = tokens[position : position + shard.room]
                shard.write(part)
                position += len(part)
                within = Place(piece.file, piece.start, position, before)
                place = after if position == len(tokens) else within
                if shard.room == 0:
                    record.add(shard, number, place)
                    number += 1
                    if number in record.whole:
                        return
                    shard = record.open_shard(number)
            place = after
            if time.monotonic() - saved > SAVE_S:
                record.save_open(shard, number, place)
                files.drop_before(place.file)
                saved = time.monotonic()
    except UserError:
        if not shard.file.closed and (shard.tokens or number):
            record.save_open(shard, number, place)
        elif not shard.file.closed:
            shard.discard()
        raise
    if shard.tokens:
        record.add(shard, number, place)
        number += 1
    else:
        shard.discard()
    record.complete(number, place.counts)


def count_workers(config: Config, launch: Launch) -> int:
    """The processes to start: as asked for, or this process's part of the cores it may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return config.workers or max(1, cores // launch.local_world)


def units(number: float) -> str:
    """A number in three digits and k, M, G or T."""
    from tqdm import tqdm

    return tqdm.format_sizeof(number)


def tell_size(record: Record, files, config: Config, say) -> float:
    """Says how much is to be done and how much disk it needs. Returns the tokens to expect."""
    sources = record.facts["sources"]
    size, fetches = sum(source["bytes"] for source in sources), not isinstance(files, LocalFiles)
    expected = size * HUB_TOKENS_PER_BYTE
    if not fetches:
        texts = (text_files.text_bytes(file, config.text_column) for file in files.files)
        expected = sum(texts) * TEXT_TOKENS_PER_BYTE
    needed = max(0.0, 2 * (expected - record.tokens))
    if expected < 2 * config.shard_size and not config.val_tokens:
        needed *= 2  # see Record.split_small
    if fetches:
        needed += sum(sorted(source["bytes"] for source in sources)[-hub.AHEAD :])
    free = shutil.disk_usage(record.directory).free
    say(
        f"{record.directory}: {len(sources)} files of {units(size)}B, about {units(expected)} "
        f"tokens; needs about {units(needed)}B of disk, {units(free)}B are free"
        f"{'' if free > needed else ': too little, it seems'}"
    )
    return expected


def make_shards(config: Config, launch: Launch, record: Record, files, say) -> None:
    """Makes all shards of this process's share that are not there yet."""
    tokenizer.get_encoder(config.engine)  # what it lacks is told once, and not by each worker
    expected = tell_size(record, files, config, say)
    tokens = record.tokens + (record.facts["open"]["tokens"] if record.facts["open"] else 0)
    if tokens:
        say(f"{record.directory}: going on after {tokens:,} tokens")
    context, workers = multiprocessing.get_context(START_METHOD), count_workers(config, launch)
    pool = ProcessPoolExecutor(workers, context, start_worker, (config.engine,))
    progress = Progress(expected, tokens, record.facts["sources"], launch.rank == 0)
    try:
        start_workers(pool, workers)
        while (number := record.next_missing()) is not None:
            make_from(number, record, pool, files, config, 2 * workers + 2, progress)
    except BrokenProcessPool:
        raise UserError(
            "workers: a process that tokenizes died, killed for want of memory perhaps; run the "
            "same command again, which goes on from here, with fewer --workers if need be"
        ) from None
    finally:
        progress.bar.close()
        pool.shutdown(cancel_futures=True)
    record.split_small()


def tell_end(record: Record, finished: bool, whole: bool, seconds: float, tokens: int) -> None:
    """The last line: what there is, and what of it was made now."""
    shards, counts = record.facts["shards"], Counts(*record.facts["counts"])
    val = sum(shard["tokens"] for shard in shards if shard["split"] == "val")
    text = f"{record.directory}: {'finished already' if finished else 'done'}: {len(shards)} shards"
    text += f", {record.tokens:,} tokens ({val:,} of them val), {counts.documents:,} documents"
    if counts.nulls:
        text += f", {counts.nulls:,} nulls left out"
    if counts.replaced:
        text += f", {counts.replaced:,} pieces of text with bytes that are no UTF-8"
    if not finished:
        text += f"; {seconds:,.0f} s, {tokens / seconds / 1e6:.2f} M tokens/s"
    if not whole:
        text += "; manifest.json comes when the last rank is done"
    print(text, flush=True)


def not_installed(error: ImportError) -> SettingError:
    """The error to raise where a package is missing."""
    return SettingError(f"{error.name}: not installed; pip install -r requirements.txt")


@contextlib.contextmanager
def removing_if_empty(lock: Path, new: list[Path]):
    """At the end removes a lock that is alone in its directory, and the directories `new`."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if [*lock.parent.iterdir()] == [lock]:  # nothing came of it
                lock.unlink()
                for path in new:
                    with contextlib.suppress(OSError):
                        path.rmdir()


def build(config: Config, launch: Launch) -> int:
    """Makes the shards of this process's share, and tells what there is. Returns the exit code."""
    try:
        import pyarrow  # noqa: F401
        import tiktoken  # noqa: F401
        import tqdm  # noqa: F401
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise not_installed(error) from None

    def say(line: str) -> None:
        rank = f"rank {launch.rank}: " if launch.world > 1 else ""
        print(rank + line, file=sys.stderr, flush=True)

    start, out = time.monotonic(), Path(config.out)
    local = text_files.find_local(config.source, out, say)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", config.source)
    if local is None and (not on_hub or text_files.format_of(config.source)):
        raise UserError(
            f"source={config.source!r}: no such file or directory, and no dataset on the Hub, "
            "which would be OWNER/NAME"
        )
    settings = {"source": config.source if local is None else ""}
    settings |= {name: getattr(config, name) for name in DEFINING}
    lock = out / f".lock_{launch.rank:05d}"
    new = [path for path in (out, *out.parents) if not os.path.exists(path)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=10), removing_if_empty(lock, new):
            record = Record(out, settings, launch.rank, launch.world)
            files = open_sources(config, launch, local, record, say)
            try:
                record.verify(say)
                before, finished = record.tokens, record.is_finished()
                if not finished:
                    make_shards(config, launch, record, files, say)
                    record.close()
                files.remove()
            finally:
                files.close()
            whole = record.merge()
    except Timeout:
        raise UserError(
            f"out={config.out!r}: another process is at work there; wait for it, or choose "
            "another --out"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_room(out) from None
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}; mend that and run the same "
            "command again, or choose another --out"
        ) from None
    tell_end(record, finished, whole, time.monotonic() - start, record.tokens - before)
    return 0


def main() -> int:
    description = "Turns text into shards of GPT-2 tokens. All settings, with their defaults:"
    config = cli.parse(Config, {}, sys.argv[1:], description)
    return build(check_config(config), find_launch())


if __name__ == "__main__":
    run_main(main)
