"""Random damage to every file that a command reads, and senseless values of every setting.

Each case ends well, or with exit code 2 and one line that names the file or setting. No file that
was there is overwritten by a run that is refused, and none that is only read by any run.

A case is one run of a command's `main` in this process, of a tiny model, in a copy of a directory
with one file of each kind. What happens in it depends on the name of the test and the number of the
case alone. `pytest -m faults` runs thousands of them.
"""

import contextlib
import dataclasses
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, TEXT
from fineweb_helpers import build, pack, write_text_parquet
from hellaswag_helpers import make_examples, write_examples
from safetensors.torch import load_file, save_file

import fineweb
import hellaswag
import plot
import sample
import train_gpt2
from support import errors, huggingface, run_log, text_files, tokenizer
from support.files import sha256

pytest_plugins = ["fineweb_helpers"]

TIME_S = 60  # for one run, which takes a fraction of a second
MEMORY = 3 << 30  # bytes that one run may add
STEPS = 4  # of the run that is there
TINY = SMALL | dict(
    n_layer=1, n_head=1, n_embd=8, T=16, B=4, max_steps=STEPS, val_tokens=64, device="cpu"
)

# -------------------------------------------------------------------------------------------------
# A directory with one file of each kind


@pytest.fixture(scope="module")
def originals(tmp_path_factory, workers_by_fork) -> Path:
    """A directory with valid files, not to be written to."""
    directory = tmp_path_factory.mktemp("originals")
    (directory / "text.txt").write_text(TEXT[:4000], encoding="utf-8")
    (directory / "prompt.txt").write_text(TEXT[:20], encoding="utf-8")
    write_examples(directory / "examples.jsonl", make_examples(4, most=6))
    make_sources(directory / "source")
    make_shards(directory)
    places = dict(data=str(directory / "text.txt"), log_dir=str(directory / "log"))
    config = train_gpt2.Config(**places, **TINY | dict(checkpoint_every=2, val_every=2))
    with pytest.MonkeyPatch.context() as patch:  # to read a vocabulary takes longer than a run
        patch.setattr(huggingface, "save_tokenizer", lambda *_, **__: None)
        assert train_gpt2.train(config) == 0
    make_models(directory)
    return directory


def make_sources(directory: Path) -> None:
    """Texts for fineweb.py, one file of each kind."""
    directory.mkdir()
    documents = [TEXT[i : i + 300] for i in range(0, 3000, 300)]
    write_text_parquet(directory / "a.parquet", documents)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    for name in ("b.jsonl", "c.jsonl.gz", "d.jsonl.zst"):
        (directory / name).write_bytes(pack(name, lines))
    for name in ("e.txt", "f.txt.gz", "g.txt.zst"):
        (directory / name).write_bytes(pack(name, "\n\n".join(documents).encode()))


def make_shards(directory: Path) -> None:
    """Finished shards, those of a run that was killed, and two directories of other programs."""
    build(directory / "source", directory / "finished", shard_size=1000)
    shutil.copytree(directory / "finished", directory / "begun")
    manifest = json.loads((directory / "finished" / "manifest.json").read_text())
    for shard in manifest["shards"][3:]:
        (directory / "begun" / shard["file"]).unlink()
    del manifest["shards"][3:], manifest["totals"]
    (directory / "begun" / "manifest.json").unlink()
    (directory / "begun" / "manifest.partial.json").write_text(json.dumps(manifest))
    for suffix in ("npy", "bin"):
        (directory / suffix).mkdir()
        for split in ("train", "val"):
            tokens = tokenizer.encode_plain(TEXT[:2000]).astype("<u2")
            path = directory / suffix / f"{split}.{suffix}"
            np.save(directory / "npy" / f"{split}.npy", tokens)
            if suffix == "bin":
                header = np.zeros(256, "<i4")
                header[:3] = 20240520, 1, len(tokens)
                path.write_bytes(header.tobytes() + tokens.tobytes())


def make_models(directory: Path) -> None:
    """The model of the run in other forms: alone, in two files, as a pickle, with a vocabulary."""
    saved = directory / "log" / f"step_{STEPS:05d}"
    tensors = load_file(saved / "model.safetensors")
    for form in ("model", "divided", "pickled"):
        (directory / form).mkdir()
        shutil.copy(saved / "config.json", directory / form)
    save_file(tensors, directory / "model" / "model.safetensors")
    torch.save(tensors, directory / "pickled" / "pytorch_model.bin")
    parts = {"1.safetensors": sorted(tensors)[::2], "2.safetensors": sorted(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, directory / "divided" / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    index = directory / "divided" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    shutil.copytree(directory / "model", directory / "spelled")
    tokenizer.save_tokenizer(directory / "spelled")


def copy_file(source, target) -> None:
    """Copies a small file; a large one is a link, which nothing may write through."""
    if os.path.getsize(source) > 100_000:
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def list_contents(directory: Path) -> dict[str, object]:
    """{path: content of a small file, identity of a large one, None for a directory}."""
    found = {}
    for path in directory.rglob("*"):
        status = path.stat()
        content = (status.st_size, status.st_mtime_ns)
        if path.is_file() and status.st_size <= 100_000:
            content = path.read_bytes()
        found[str(path.relative_to(directory))] = None if path.is_dir() else content
    return found


# -------------------------------------------------------------------------------------------------
# Damage

ABSURD = (
    None, True, -1, 0, 0.5, 2**31, 10**22, -(10**22), float("inf"), float("nan"), "", "x", "..",
    "\0", "\ud800", "a" * 10_000, [], {}, [None], [[]], {"a": None}, {"": -1},
)  # fmt: skip


def damage(path: Path, choose: random.Random, others: list[Path]) -> str:
    """Damages a file in a random way, and returns what was done in a few words."""
    kinds = [cut, change_byte, insert_bytes, clear_block, empty, put_directory, put_other_file]
    if path.suffix in (".json", ".jsonl"):
        kinds += [change_json] * 4
    if path.suffix == ".txt":
        kinds += [change_word] * 4
    kind = choose.choice(kinds)
    data = path.read_bytes()
    path.unlink()  # a large one is a link to the original
    return f"{kind.__name__} {kind(path, data, choose, others)}"


def choose_place(data: bytes, choose: random.Random) -> int:
    """A byte of the file, often one near its start or end, where many formats hold their sizes."""
    ranges = [(0, len(data)), (0, 300), (len(data) - 300, len(data))]
    first, last = choose.choice(ranges)
    return min(max(0, choose.randint(first, last)), len(data) - 1)


def cut(path, data, choose, others) -> str:
    place = choose_place(data, choose)
    path.write_bytes(data[:place])
    return f"at {place}"


def change_byte(path, data, choose, others) -> str:
    place, byte = choose_place(data, choose), choose.randbytes(1)
    path.write_bytes(data[:place] + byte + data[place + 1 :])
    return f"at {place} to {byte}"


def insert_bytes(path, data, choose, others) -> str:
    place, more = choose_place(data, choose), choose.randbytes(choose.choice([1, 8, 1000]))
    path.write_bytes(data[:place] + more + data[place:])
    return f"at {place}, {len(more)} of them"


def clear_block(path, data, choose, others) -> str:
    place, size = choose_place(data, choose), choose.choice([1, 8, 1000])
    path.write_bytes((data[:place] + bytes(size) + data[place + size :])[: len(data)])
    return f"at {place}, {size} bytes"


def empty(path, data, choose, others) -> str:
    path.write_bytes(b"")
    return ""


def put_directory(path, data, choose, others) -> str:
    path.mkdir()
    return ""


def put_other_file(path, data, choose, others) -> str:
    other = choose.choice(others)
    shutil.copy(other, path)
    return f"{other.name}"


def change_json(path, data, choose, others) -> str:
    """Replaces a value, or a key with its value, at any depth; in a .jsonl of one line."""
    lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
    number = choose.randrange(len(lines))
    content, value = {"": json.loads(lines[number])}, choose.choice(ABSURD)
    parent, place = content, ""
    while isinstance(parent[place], dict | list) and parent[place] and choose.random() < 0.8:
        parent = parent[place]
        place = choose.choice(list(parent if isinstance(parent, dict) else range(len(parent))))
    parent[place] = value
    if choose.random() < 0.2:
        del parent[place]
    lines[number] = json.dumps(content.get(""))
    if choose.random() < 0.05:
        lines[number] = "[" * 100_000
    path.write_text("\n".join(lines) + "\n")
    return f"at {place!r} to {str(value)[:50]!r}"


def change_word(path, data, choose, others) -> str:
    """Replaces a word of a text."""
    words = data.decode().split(" ")
    place = choose.randrange(len(words))
    values = ("", "-1", "nan", "inf", "1e400", str(10**22), "9" * 5000, "٣", "x", "\0", "\n", "1 1")
    words[place] = choose.choice(values)
    path.write_bytes(" ".join(words).encode())
    return f"number {place} to {words[place][:50]!r}"


def record_hash(path: Path) -> None:
    """Makes the size and hash in `files.json` or the manifest those of the damaged file."""
    if not path.is_file():
        return
    for name in ("files.json", "manifest.json", "manifest.partial.json"):
        manifest = path.parent / name
        if manifest.exists() and manifest != path:
            content = json.loads(manifest.read_text())
            entries = content.get("shards") or [e | {"file": n} for n, e in content.items()]
            entry = next((e for e in entries if e["file"] == path.name), {})
            entry.update(bytes=path.stat().st_size, sha256=sha256(path))
            if name == "files.json":
                content = {e.pop("file"): e for e in entries if "file" in e}
            manifest.write_text(json.dumps(content))


# -------------------------------------------------------------------------------------------------
# Runs


class Endless(BaseException):
    """Ends a run after TIME_S; no command catches it."""


class InlinePool:
    """A `ProcessPoolExecutor` that computes in this process, at once."""

    def __init__(self, *_):
        pass

    def submit(self, function, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def run(monkeypatch, capsys, surroundings):
    """A function: a module, its arguments -> (exit code, stdout, stderr) of the command.

    The exit code is that of an unexpected error, 1, for an exception, whose traceback is in stderr.
    """
    train, no_versions = train_gpt2.train, {"versions": {}, "commit": None, "changes": None}
    monkeypatch.setattr(train_gpt2, "train", lambda config, **_: train(config))
    monkeypatch.setattr(train_gpt2, "save_checkpoint", lambda run: None)
    monkeypatch.setattr(run_log, "describe_software", lambda: no_versions)
    monkeypatch.setattr(fineweb, "ProcessPoolExecutor", InlinePool)
    monkeypatch.setattr(fineweb, "encode", tokenizer.encode_plain, raising=False)

    def run(module, arguments: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff text")))
        capsys.readouterr()
        text_files._cached_parquet.cache_clear()
        code = 1
        with limits():
            try:
                errors.run_main(module.main)
            except SystemExit as stop:
                code = stop.code
            except (Exception, Endless):
                traceback.print_exc()
        return code, *capsys.readouterr()

    return run


@contextlib.contextmanager
def limits():
    """A context that ends after TIME_S, and has MEMORY more than the process uses."""

    def stop(*_):
        raise Endless

    handler = signal.signal(signal.SIGALRM, stop)
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, TIME_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def find_fault(result: tuple[int, str, str], words) -> str | None:
    """What is wrong with the end of a run; None if it ended well, or in one line with a word."""
    code, out, err = result
    *before, last = err.splitlines() or [""]
    if "Traceback" in out + err or any("rror:" in line for line in before):
        return f"exit code {code}, {' | '.join(err.splitlines()[-5:])[-1500:]}"
    if code == 0:
        return None
    if code != 2 or not last.startswith("error: "):
        return f"exit code {code}, {err[-300:]}"
    if not any(word in last for word in words):
        return f"no word of {words}: {last[:500]}"
    return None


# -------------------------------------------------------------------------------------------------
# Damaged files


def settings(**values) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


TRAIN = settings(**TINY | dict(max_steps=STEPS + 1, val_every=4))
START = [*TRAIN, *settings(log_dir="new", max_steps=1)]
RESUME = [*TRAIN, *settings(data="text.txt", log_dir="log")]
SCORE = settings(hellaswag_every=1, data="text.txt", hellaswag_data="examples.jsonl")
FINEWEB = settings(workers=1, engine="tiktoken", shard_size=1000, source="source")
SAMPLE = settings(max_new_tokens=2, device="cpu", dtype="float32")
HELLASWAG = [*settings(data="examples.jsonl", dtype="float32", out="scores.jsonl"), "-dcpu"]
PROMPT = settings(prompt="FILE:prompt.txt")
LAST = f"log/step_{STEPS:05d}"
MODEL = ("model.safetensors", "config.json")
CHECKPOINT = (*MODEL, "train_state.pt", "files.json")
MODELS = {
    "model": MODEL,
    "divided": ("model.safetensors.index.json", "1.safetensors", "config.json"),
    "pickled": ("pytorch_model.bin",),
    "spelled": ("vocab.json", "tokenizer.json"),
}
# name: (module, arguments, files that it reads)
COMMANDS = {
    "resume": (
        train_gpt2, RESUME,
        (
            *(f"{LAST}/{name}" for name in CHECKPOINT),
            "log/run.json", "log/log.txt", "log/progress.txt", "text.txt",
        ),
    ),
    "start on npy": (train_gpt2, [*START, "--data=npy"], ("npy/train.npy", "npy/val.npy")),
    "start on bin": (train_gpt2, [*START, "--data=bin"], ("bin/train.bin", "bin/val.bin")),
    "start on finished": (
        train_gpt2, [*START, "--data=finished"],
        ("finished/manifest.json", "finished/edufineweb_val_000000.npy"),
    ),
    "start with HellaSwag": (train_gpt2, [*START, *SCORE], ("examples.jsonl",)),
    **{
        f"start from {form}": (
            train_gpt2, [*START, "--data=text.txt", f"--init_from={form}"],
            [f"{form}/{name}" for name in files],
        )
        for form, files in MODELS.items()
    },
    **{
        f"sample {form}": (
            sample, [form, *SAMPLE, *PROMPT], [*(f"{form}/{name}" for name in files), "prompt.txt"]
        )
        for form, files in (MODELS | {LAST: MODEL}).items()
    },
    "sample log": (sample, ["log", *SAMPLE], [f"{LAST}/{name}" for name in CHECKPOINT]),
    "score": (
        hellaswag, ["-mmodel", *HELLASWAG], ("examples.jsonl", *(f"model/{n}" for n in MODEL)),
    ),
    "plot": (
        plot, ["log", "-onew.png"], ("log/log.txt", "log/progress.txt", "log/run.json"),
    ),
    "tokenize": (
        fineweb, [*FINEWEB, "--out=new"],
        [f"source/{name}" for name in (
            "a.parquet", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.txt", "f.txt.gz", "g.txt.zst",
        )],
    ),
    "continue": (
        fineweb, [*FINEWEB, "--out=begun"],
        ("begun/manifest.partial.json", "begun/edufineweb_train_000001.npy", "source/a.parquet"),
    ),
    "verify": (
        fineweb, [*FINEWEB, "--out=finished"],
        ("finished/manifest.json", "finished/edufineweb_train_000001.npy"),
    ),
}  # fmt: skip
TARGETS = [(command, file) for command, (*_, files) in COMMANDS.items() for file in files]
# What names the file if its own name does not: settings, and what the directory is called.
ALSO = (
    "data=", "source=", "out=", "log_dir=", "init_from=", "prompt", "model: ", "divided: ", "log: ",
)  # fmt: skip


def damaged_run(originals, directory, run, command: str, file: str, number: int) -> str | None:
    """Runs a command on files of which one is damaged; returns what is wrong with its end."""
    module, arguments, _ = COMMANDS[command]
    choose = random.Random(f"{command} {file} {number}")
    shutil.copytree(originals, directory, copy_function=copy_file)
    kind = damage(directory / file, choose, sorted(p for p in originals.rglob("*") if p.is_file()))
    if choose.random() < 0.5:
        record_hash(directory / file)
    before = list_contents(directory)
    with contextlib.chdir(directory):
        result = run(module, arguments)
    fault = find_fault(result, (Path(file).name, str(Path(file).parent), *ALSO))
    after = list_contents(directory)
    written = ("log/", "begun/", "finished/") if result[0] == 0 else ()
    changed = [
        name for name, content in before.items()
        if not name.startswith(written) and after.get(name, "gone") != content
    ]  # fmt: skip
    if not fault and changed:
        fault = f"exit code {result[0]}, changed: {changed}: {result[2][-300:]}"
    shutil.rmtree(directory)
    return fault and f"{command}, {file}, {number}: {kind}: {fault}"


def check_damage(originals, tmp_path, run, command, file, numbers) -> None:
    directory = tmp_path / "copy"
    faults = [damaged_run(originals, directory, run, command, file, n) for n in numbers]
    faults = [fault for fault in faults if fault]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("command", COMMANDS)
def test_undamaged_files_are_accepted(command, originals, tmp_path, run):
    module, arguments, _ = COMMANDS[command]
    shutil.copytree(originals, tmp_path / "copy", copy_function=copy_file)
    with contextlib.chdir(tmp_path / "copy"):
        code, out, err = run(module, arguments)
    assert code == 0, err


@pytest.mark.parametrize("command, file", random.Random(0).sample(TARGETS, 30))
def test_a_damaged_file_ends_well_or_in_one_line(command, file, originals, tmp_path, run):
    check_damage(originals, tmp_path, run, command, file, range(1))


@pytest.mark.faults
@pytest.mark.parametrize("command, file", TARGETS)
def test_many_damaged_files_end_well_or_in_one_line(command, file, originals, tmp_path, run):
    check_damage(originals, tmp_path, run, command, file, range(30))


# -------------------------------------------------------------------------------------------------
# Senseless values of settings

VALUES = (
    "", " ", "-", "--", "-1", "0", "0.5", "1_0", "1e400", "1e-300", "1e22", "-inf", "nan", "inf",
    str(10**22), "9" * 5000, "٣", "²", "None", "x", "[1]", "%s", "{}", "\n", "*", "~", ".", "..",
    "/dev/null", "/dev/null/x", "\udcff", "a" * 300, "a" * 10_000,
)  # fmt: skip
EVALUATED = dict(
    val_every=1, sample_every=1, num_samples=1, sample_tokens=2, hellaswag_every=1, data="text.txt",
    hellaswag_data="examples.jsonl", log_dir="new", max_steps=2,
)  # fmt: skip
VALID = {
    train_gpt2: settings(**TINY | EVALUATED),
    fineweb: settings(workers=1, engine="tiktoken", source="prompt.txt", out="new"),
    sample: ["model", *SAMPLE, *PROMPT],
    hellaswag: ["--model=model", "--device=cpu", *HELLASWAG],
    plot: ["log", "--out=new.png"],
}
OPTIONS = {
    hellaswag: "model device dtype style limit data out".split(),
    plot: ["logs", "out"],
}
OPTIONS |= {
    module: [field.name for field in dataclasses.fields(module.Config)]
    for module in (train_gpt2, fineweb, sample)
}
SETTINGS = [(module.__name__, name) for module, names in OPTIONS.items() for name in names]


def senseless_run(originals, directory, run, command: str, name: str, value: str) -> str | None:
    """Runs a command with a value of a setting; returns what is wrong with its end."""
    module = sys.modules[command]
    arguments = [*VALID[module], value if name in ("models", "logs") else f"--{name}={value}"]
    directory = directory / "copy"
    directory.mkdir(parents=True)
    for part in ("text.txt", "prompt.txt", "examples.jsonl", "model", "log"):
        copy = shutil.copytree if (originals / part).is_dir() else shutil.copy2
        copy(originals / part, directory / part)
    before = list_contents(directory)
    with contextlib.chdir(directory):
        result = run(module, arguments)
    shown = [value.encode(errors="backslashreplace").decode()[:100]] * bool(value.strip())
    fault = find_fault(result, [name, repr(value), "log directory", "text_column", *shown])
    after = list_contents(directory)
    if not fault and not before.items() <= after.items():
        fault = f"changed: {[name for name in before if after.get(name) != before[name]]}"
    shutil.rmtree(directory.parent)
    return fault and f"{command} --{name}={value[:50]!r}: {fault}"


def check_settings(originals, tmp_path, run, cases) -> None:
    faults = [senseless_run(originals, tmp_path / "cases", run, *case) for case in cases]
    faults = [fault for fault in faults if fault]
    assert not faults, "\n" + "\n".join(faults)


@pytest.fixture
def without_curves(monkeypatch):
    monkeypatch.setattr(run_log.Curves, "draw", lambda self, wait: None)


@pytest.mark.parametrize("command", [module.__name__ for module in VALID])
def test_a_senseless_setting_ends_well_or_in_one_line(
    command, originals, tmp_path, run, without_curves
):
    choose = random.Random(command)
    pairs = [(command, name, value) for c, name in SETTINGS if c == command for value in VALUES]
    check_settings(originals, tmp_path, run, choose.sample(pairs, 8))


@pytest.mark.faults
@pytest.mark.parametrize("command, name", SETTINGS)
def test_all_senseless_settings_end_well_or_in_one_line(
    command, name, originals, tmp_path, run, without_curves
):
    check_settings(originals, tmp_path, run, [(command, name, value) for value in VALUES])
