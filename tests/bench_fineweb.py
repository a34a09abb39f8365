"""How fast fineweb.py is on given parquet files, beside the bare tokenizers and the usual shape.

    python tests/bench_fineweb.py corpus/*.parquet [--rounds=3] [--workers=N]

Prints one table: megabytes of text a second, medians of alternating rounds and their extremes. Of
fineweb.py the whole command is timed, start and exit included. "Bare" is one process that has the
texts in memory and turns each into ids. The "Pool.imap shape" is that of build-nanogpt's
fineweb.py: the main process reads the dataset, sends texts to half the cores in chunks of 16 and
collects the ids.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tokenizer  # noqa: E402

from support import text_files  # noqa: E402

SHARD = 10_000_000


def read_texts(files: list[Path]) -> list[str]:
    texts = []
    for number, file in enumerate(files):
        for piece in text_files.pieces_of(file, number, 0, "text", ""):
            function, *arguments = piece.read
            texts += function(*arguments).texts
    return texts


ENCODERS = {
    "tiktoken, encode_ordinary": lambda: tokenizer.get_encoding().encode_ordinary,
    "tiktoken, encode_to_numpy": lambda: tokenizer.get_encoder("tiktoken"),
    "gigatoken": lambda: tokenizer.get_encoder("gigatoken"),
}


def bare(name: str, texts: list[str]) -> None:
    """Prints the bytes of the texts, how many they are, and the seconds to turn each into ids."""
    encode = ENCODERS[name]()
    start = time.perf_counter()
    for text in texts:
        encode(text)
    seconds = time.perf_counter() - start
    print(sum(len(text.encode()) for text in texts), len(texts), seconds)


def ids_of(row: dict) -> np.ndarray:
    encoding = tokenizer.get_encoding()
    return np.array([encoding.eot_token, *encoding.encode_ordinary(row["text"])]).astype(np.uint16)


def imap_shape(files: list[Path], out: Path) -> None:
    """Tokenizes a dataset as build-nanogpt's program does: one pool, one writer, whole shards."""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=[str(f) for f in files], split="train",
                        cache_dir=str(out / "cache"))  # fmt: skip
    shard, filled, number = np.empty(SHARD, dtype=np.uint16), 0, 0
    with multiprocessing.Pool(max(1, os.cpu_count() // 2)) as pool:
        for ids in pool.imap(ids_of, rows, chunksize=16):
            while len(ids):
                part = ids[: SHARD - filled]
                shard[filled : filled + len(part)] = part
                filled, ids = filled + len(part), ids[len(part) :]
                if filled == SHARD:
                    np.save(out / f"shard_{number:06d}", shard)
                    filled, number = 0, number + 1
    np.save(out / f"shard_{number:06d}", shard[:filled])


def command(arguments: list[str]) -> tuple[float, float]:
    """(seconds, peak memory in MB of the main process or of a worker, whichever had more)."""
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return time.perf_counter() - start, usage.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--bare", choices=ENCODERS, help=argparse.SUPPRESS)
    parser.add_argument("--imap", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        return bare(options.bare, read_texts(options.files))
    if options.imap:
        return imap_shape(options.files, options.imap)

    here = [sys.executable, str(Path(__file__).resolve()), *map(str, options.files)]
    rates, memory = {}, {}
    for _ in range(options.rounds):
        for name in ENCODERS:
            found = subprocess.run([*here, f"--bare={name}"], capture_output=True, check=True)
            size, documents, seconds = found.stdout.split()
            size = int(size) / 1e6
            rates.setdefault(f"bare {name}", []).append(size / float(seconds))
        for engine in ("tiktoken", "gigatoken", None):
            with tempfile.TemporaryDirectory() as directory:
                folder = Path(directory) / "source"
                folder.mkdir()
                for number, file in enumerate(options.files):
                    (folder / f"{number:04d}.parquet").symlink_to(file.resolve())
                name, run = "Pool.imap shape, tiktoken", [*here, f"--imap={directory}"]
                if engine:
                    name = f"fineweb.py, {engine}, {options.workers} workers"
                    run = [sys.executable, str(ROOT / "fineweb.py"), f"--source={folder}"]
                    run += [f"--out={directory}/out", f"--shard_size={SHARD}"]
                    run += [f"--engine={engine}", f"--workers={options.workers}"]
                seconds, peak = command(run)
                rates.setdefault(name, []).append(size / seconds)
                memory[name] = max(memory.get(name, 0), peak)

    one = statistics.median(rates["bare tiktoken, encode_ordinary"])
    print(
        f"{size:.1f} MB of text in {int(documents):,} documents, {os.cpu_count()} cores, "
        f"{options.rounds} rounds\n"
    )
    print("| what | MB/s | least, most | x bare tiktoken | peak MB of its largest process |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, values in rates.items():
        peak = f"{memory[name]:.0f}" if name in memory else ""
        print(
            f"| {name} | {statistics.median(values):.1f} | {min(values):.1f}, {max(values):.1f} "
            f"| {statistics.median(values) / one:.2f} | {peak} |"
        )


if __name__ == "__main__":
    main()
