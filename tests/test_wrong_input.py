"""Wrong input: one line with the file or setting and the remedy, code 2, nothing overwritten.

The cases run in this process, as `main` does, from settings on.
"""

import functools
import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TEXT,
    RunsCode,
    assert_one_line,
    assert_refused,
    command_line,
    outcome,
    tree,
)

import train_gpt2
from support import checkpoint, tokenizer

WAYS_OUT = ("python fineweb.py", "python train_gpt2.py tiny")


# -------------------------------------------------------------------------------------------------
# Data


def npy(path: Path, tokens) -> None:
    np.save(path, np.asarray(tokens, dtype=np.uint16))


def llmc(path: Path, tokens, magic: int = 20240520, version: int = 1, count=None) -> None:
    """A .bin shard as llm.c writes it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


GOOD = np.arange(1000) % 50257


HIGH = np.where(np.arange(1000) % 10 == 3, 50257, GOOD)  # in every window an id too many


def shards(directory: Path, train=GOOD, val=GOOD, write=npy, suffix=".npy") -> Path:
    """A directory of two shards."""
    directory.mkdir()
    write(directory / f"x_train_000001{suffix}", train)
    write(directory / f"x_val_000000{suffix}", val)
    return directory


def with_shard(path: str, content: bytes | None = None, array=None):
    """A function that makes a good directory and then puts something else in a shard's place."""

    def make(directory: Path):
        shards(directory)
        if array is not None:
            np.save(directory / path, array, allow_pickle=True)
        else:
            (directory / path).write_bytes(content)

    return make


def make_truncated_npy(directory: Path) -> None:
    shards(directory)
    os.truncate(directory / "x_train_000001.npy", 1500)


def make_truncated_bin(directory: Path) -> None:
    shards(directory, write=llmc, suffix=".bin")
    os.truncate(directory / "x_val_000000.bin", 1024 + 1998)


def make_npz(directory: Path) -> None:
    shards(directory)
    with open(directory / "x_val_000000.npy", "wb") as file:
        np.savez(file, tokens=GOOD.astype(np.uint16))


def make_one_split(name: str):
    def make(directory: Path):
        directory.mkdir()
        npy(directory / name, GOOD)

    return make


AGAIN = "make it again"


WRONG_DATA = {
    # name: (data, function that makes it or None, words)
    "nothing there": ("gone", None, "data=", "gone", *WAYS_OUT),
    "a file that is neither": ("a.csv", lambda p: p.write_text("1,2"), "data=", "a.csv", ".txt"),
    "a shard, not its directory": ("a.npy", lambda p: npy(p, GOOD), "data=", "a.npy", "directory"),
    "an empty directory": ("d", lambda p: p.mkdir(), "data=", "'train'", *WAYS_OUT),
    "no training shard": ("d", make_one_split("x_val_0.npy"), "data=", "'train'", *WAYS_OUT),
    "no validation shard": ("d", make_one_split("x_train_0.npy"), "data=", "'val'", *WAYS_OUT),
    "a truncated .npy": ("d", make_truncated_npy, "x_train_000001.npy", AGAIN),
    "a truncated .bin": ("d", make_truncated_bin, "x_val_000000.bin", "1,000 tokens", AGAIN),
    "an empty .npy": ("d", with_shard("x_val_000000.npy", b""), "x_val_000000.npy", AGAIN),
    "an empty .bin": ("d", with_shard("x_val_1.bin", b""), "x_val_1.bin", AGAIN),
    "a .bin of another program": (
        "d", with_shard("x_val_1.bin", bytes(5000)), "x_val_1.bin", "llm.c", AGAIN,
    ),
    "a .bin of another version": (
        "d",
        lambda p: shards(p, write=functools.partial(llmc, version=2), suffix=".bin"),
        "x_train_000001.bin", "version", AGAIN,
    ),
    "a text named .npy": ("d", with_shard("x_train_2.npy", b"words\n"), "x_train_2.npy", AGAIN),
    "an archive named .npy": ("d", make_npz, "x_val_000000.npy"),
    "a shard of floats": (
        "d", with_shard("x_train_2.npy", array=np.ones(99)), "x_train_2.npy", "float64", "uint16",
    ),
    "a shard of int32": (
        "d", with_shard("x_train_2.npy", array=np.ones(99, np.int32)), "x_train_2.npy", "int32",
    ),
    "a shard of two dimensions": (
        "d", with_shard("x_val_2.npy", array=np.ones((9, 9), np.uint16)), "x_val_2.npy", "2 dim",
    ),
    "a shard of objects": (
        "d", with_shard("x_val_2.npy", array=np.array([None, {}])), "x_val_2.npy", "object",
    ),
    "too few training tokens": (
        "d", lambda p: shards(p, train=GOOD[:32]), "data=", "32 tokens", "'train'", "smaller T",
    ),
    "too few validation tokens": (
        "d", lambda p: shards(p, val=GOOD[:32]), "data=", "32 tokens", "'val'", "smaller T",
    ),
    "a text too short to train": ("s.txt", lambda p: p.write_text("Short."), "'train'", "T=32"),
    "a text too short to validate": ("s.txt", lambda p: p.write_text(TEXT[:400]), "'val'", "T=32"),
    "an empty text": ("s.txt", lambda p: p.write_text(""), "0 tokens", "'train'", "T=32"),
    "a text in Latin-1": (
        "s.txt", lambda p: p.write_bytes("caf\u00e9 ".encode("latin-1") * 99), "s.txt", "UTF-8",
    ),
    "a text in UTF-16": ("s.txt", lambda p: p.write_bytes(TEXT.encode("utf-16")), "s.txt", "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data_is_refused_before_anything_is_written(case, small, tmp_path, capsys):
    name, make, *words = WRONG_DATA[case]
    if make:
        make(tmp_path / name)
    config = small(data=str(tmp_path / name), val_every=2)
    assert_refused(config, capsys, *words)
    assert not Path(config.log_dir).exists()


@pytest.mark.parametrize("write, suffix", [(npy, ".npy"), (llmc, ".bin")])
def test_good_shards_are_accepted(write, suffix, small, tmp_path):
    """The directories that the cases above damage are accepted."""
    data = shards(tmp_path / "d", write=write, suffix=suffix)
    assert train_gpt2.train(small(data=str(data), val_every=1, max_steps=1)) == 0


def test_a_missing_tokenizer_is_reported_at_once(small, tmp_path, monkeypatch, capsys):
    """Shards do not need it, but the checkpoint does, hours later."""
    config = small(data=str(shards(tmp_path / "d")))
    monkeypatch.setattr(tokenizer, "RANKS", tmp_path / "gone.tiktoken")
    tokenizer.load_ranks.cache_clear()
    assert_refused(config, capsys, "gone.tiktoken", "restore it from the repository")


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_id_out_of_range_is_named_with_its_file(split, suffix, small, tmp_path, capsys):
    write = npy if suffix == ".npy" else llmc
    data = shards(tmp_path / "d", **{split: HIGH}, write=write, suffix=suffix)
    config = small(data=str(data), val_every=1)
    before = tree(tmp_path)
    code, _, err = outcome(config, capsys)
    assert code == 2
    file = {"train": "x_train_000001", "val": "x_val_000000"}[split] + suffix
    assert_one_line(err, (file, "50257", "token id", "tokeniz"))
    assert before.items() <= tree(tmp_path).items()
    assert checkpoint.list_checkpoints(Path(config.log_dir)) == {}


def test_a_text_too_short_to_validate_is_accepted_without_validation(small, tmp_path):
    (tmp_path / "s.txt").write_text(TEXT[:400])
    assert train_gpt2.train(small(data=str(tmp_path / "s.txt"), val_every=0, max_steps=1)) == 0


# -------------------------------------------------------------------------------------------------
# init_from


def make_model(directory: Path, **config) -> None:
    """A Hugging Face directory without weights."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))


SHAPE = dict(vocab_size=50257, n_positions=32, n_embd=32, n_layer=2, n_head=2)


def make_weightless(directory: Path) -> None:
    make_model(directory, model_type="gpt2", **SHAPE)


def make_damaged(directory: Path) -> None:
    make_weightless(directory)
    (directory / "model.safetensors").write_bytes(b"\xff" * 100)


def make_tensorless(directory: Path) -> None:
    from safetensors.torch import save_file

    make_weightless(directory)
    save_file({"transformer.ln_f.weight": torch.ones(32)}, directory / "model.safetensors")


def make_other_shape(directory: Path) -> None:
    train_gpt2.GPT(train_gpt2.GPTConfig(32, n_layer=1, n_head=2, n_embd=32)).save_pretrained(
        directory
    )
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"n_layer": 2}))


def make_too_short(directory: Path) -> None:
    train_gpt2.GPT(train_gpt2.GPTConfig(16, n_layer=1, n_head=2, n_embd=32)).save_pretrained(
        directory
    )


def make_code(directory: Path) -> None:
    make_weightless(directory)
    torch.save({"x": RunsCode(directory / "it ran")}, directory / "pytorch_model.bin")


NOT_A_MODEL = {
    "an empty directory": (lambda d: d.mkdir(), "config.json", "not a model directory"),
    "another architecture": (lambda d: make_model(d, model_type="llama"), "'llama'", "gpt2"),
    "a config.json without a shape": (lambda d: make_model(d, model_type="gpt2"), "vocab_size"),
    "a config.json that is a list": (
        lambda d: (d.mkdir(), (d / "config.json").write_text("[]")),
        "config.json",
    ),
    "no weights": (make_weightless, "model.safetensors"),
    "damaged weights": (make_damaged, "model.safetensors", "damaged"),
    "weights of something else": (make_tensorless, "transformer.wte.weight"),
    "weights of another shape": (make_other_shape, "not this GPT-2"),
    "too few positions": (make_too_short, "T=32", "16 positions"),
    "weights that run code": (make_code, "pytorch_model.bin", "refused"),
}


@pytest.mark.gpt2
@pytest.mark.parametrize("case", NOT_A_MODEL)
def test_init_from_something_else_than_gpt2_is_refused(case, small, tmp_path, capsys):
    make, *words = NOT_A_MODEL[case]
    make(tmp_path / "model")
    config = small(init_from=str(tmp_path / "model"))
    assert_refused(config, capsys, str(tmp_path / "model"), *words)


@pytest.mark.parametrize("name", ["gpt3", "gpt2-small", "scrach", "./gone", "a/b/c"])
def test_init_from_an_unknown_name_is_refused_with_the_valid_names(name, small, capsys):
    config = small(init_from=name)
    assert_refused(config, capsys, "init_from", name, "gpt2, gpt2-medium, gpt2-large, gpt2-xl")


def test_init_from_the_hub_without_its_package_says_how_to_install_it(small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    assert_refused(small(init_from="gpt2"), capsys, "pip install huggingface_hub")


def test_init_from_the_hub_without_a_network_is_refused(small, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    config = small(init_from="gpt2")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    (tmp_path / "cache").mkdir()
    before = tree(tmp_path)
    code, out, err = outcome(config, capsys)
    assert code == 2 and out == ""
    assert_one_line(err, ("'gpt2'", "Hugging Face Hub", "local directory"))
    after = {k: v for k, v in tree(tmp_path).items() if not k.startswith("cache" + os.sep)}
    assert after == before


# -------------------------------------------------------------------------------------------------
# Devices


ABSENT = ["cuda:99"]


ABSENT += [] if torch.cuda.is_available() else ["cuda", "cuda:3"]


ABSENT += [] if torch.backends.mps.is_available() else ["mps"]


@pytest.mark.parametrize("device", ABSENT)
def test_a_missing_device_is_refused(device, small, tmp_path, capsys):
    assert_refused(small(device=device), capsys, f"device='{device}'", within=tmp_path)


def test_the_error_of_a_missing_device_names_one_that_exists(small, capsys):
    remedy = "--device=cpu" if not torch.cuda.is_available() else "name another"
    assert_refused(small(device="cuda:99"), capsys, remedy)


# -------------------------------------------------------------------------------------------------
# From a shell


def test_from_a_shell_wrong_data_is_one_line_and_code_2(small, tmp_path, monkeypatch, capsys):
    config = small(data=str(tmp_path / "gone"))
    before = tree(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train_gpt2.py"), *command_line(config)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(sys.argv[0], run_name="__main__")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert_one_line(err, ("data=", "gone", *WAYS_OUT))
    assert tree(tmp_path) == before
