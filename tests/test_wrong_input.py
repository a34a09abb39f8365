"""Wrong input: one line with the file or setting and the remedy, code 2, nothing written over.

Most cases run in this process, as `main` does, from settings on; a few in a process of their own.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, environment, limit_files, losses, run_trainer

import train_gpt2
from support import checkpoint, errors, tokenizer

TEXT = (ROOT / "input.txt").read_text(encoding="utf-8")[:16000]
WAYS_OUT = ("python fineweb.py", "python train_gpt2.py tiny")


def tree(directory: Path) -> dict[str, str]:
    """{relative path: SHA-256, or "directory"} of all below `directory`."""
    return {
        str(path.relative_to(directory)): checkpoint.sha256(path) if path.is_file() else "directory"
        for path in directory.rglob("*")
    }


def outcome(config, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a run in this process, through `run_main` as from a shell."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        errors.run_main(lambda: train_gpt2.train(config))
    return stop.value.code, *capsys.readouterr()


def assert_one_line(err: str, words) -> None:
    """`err` is the one error line that a user reads, with all `words` in it."""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert all(word in err for word in words), (words, err)


def assert_refused(config, capsys, *words, within: Path | None = None) -> str:
    """The run ends with one line holding `words`, code 2, and nothing in `within` changed.

    Returns what was printed before.
    """
    within = within or Path(config.log_dir).parent
    before = tree(within)
    code, out, err = outcome(config, capsys)
    assert code == 2
    assert_one_line(err, words)
    assert tree(within) == before
    return out


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The settings of a run of 4 steps with checkpoints at 2 and 4, as a kill at its very end
    leaves it: all is there, but that it is finished is not yet noted. Not to be written to."""
    directory = tmp_path_factory.mktemp("stopped")
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    config = train_gpt2.Config(
        data=str(directory / "text.txt"), log_dir=str(directory / "log"),
        **SMALL | dict(checkpoint_every=2, val_every=2, val_tokens=320, device="cpu"),
    )  # fmt: skip
    assert train_gpt2.train(config) == 0
    facts = json.loads((directory / "log" / "run.json").read_text())
    assert facts.pop("finished_step") == 4
    (directory / "log" / "run.json").write_text(json.dumps(facts))
    return config


@pytest.fixture
def copy(stopped, tmp_path):
    """The same, copied to where a test may write: text and log directory have both moved."""
    shutil.copytree(Path(stopped.log_dir).parent, tmp_path / "copy")
    data, log_dir = tmp_path / "copy" / "text.txt", tmp_path / "copy" / "log"
    return dataclasses.replace(stopped, data=str(data), log_dir=str(log_dir))


def weights(config, step: int = 4) -> bytes:
    """The bytes of a checkpoint's model.safetensors."""
    return (Path(config.log_dir) / f"step_{step:05d}" / "model.safetensors").read_bytes()


def finish(config) -> None:
    """Notes in run.json that the run is finished, as its last act is."""
    path = Path(config.log_dir) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished_step": 4}))


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
        "d", with_shard("x_val_2.npy", array=np.array([None, {}])), "x_val_2.npy", AGAIN,
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
    """What the cases above change is good before."""
    data = shards(tmp_path / "d", write=write, suffix=suffix)
    assert train_gpt2.train(small(data=str(data), val_every=1, max_steps=1)) == 0


def test_a_missing_tokenizer_is_told_before_the_first_step(small, tmp_path, monkeypatch, capsys):
    """Shards need none of it, but the checkpoint does, hours later."""
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


def test_a_text_too_short_to_validate_will_do_without_validation(small, tmp_path):
    (tmp_path / "s.txt").write_text(TEXT[:400])
    assert train_gpt2.train(small(data=str(tmp_path / "s.txt"), val_every=0, max_steps=1)) == 0


# -------------------------------------------------------------------------------------------------
# Another run in log_dir

OTHER = dict(
    seed=1338, shuffle=False, init_from="gpt2", n_layer=3, n_head=4, n_embd=64, T=16,
    total_batch_size=512, batch_ramp_tokens=10**6, max_lr=2e-3, min_lr=2e-4, warmup_steps=3,
    weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-7, grad_clip=0.5, optimizer="muon",
    schedule="linear", muon_lr=0.01, muon_momentum=0.9,
)  # fmt: skip


def test_the_cases_below_are_all_that_defines_a_run():
    assert set(OTHER) == set(train_gpt2.DEFINING)


@pytest.mark.parametrize("name", OTHER)
def test_a_setting_that_contradicts_the_run_is_refused_by_name(name, stopped, capsys):
    before, other = getattr(stopped, name), OTHER[name]
    config = dataclasses.replace(stopped, **{name: other})
    words = (f"{name}={other!r}:", f"{name}={before!r};", "log_dir=", "another --log_dir")
    assert_refused(config, capsys, *words)


def test_a_setting_that_contradicts_a_finished_run_is_refused(copy, capsys):
    finish(copy)
    config = dataclasses.replace(copy, seed=1338)
    assert_refused(config, capsys, "seed=1338", "seed=1337", "another --log_dir")


@pytest.mark.parametrize("name", ["n_embd", "seed"])
def test_a_checkpoint_of_another_model_is_refused_without_run_json_too(name, copy, capsys):
    (Path(copy.log_dir) / "run.json").unlink()
    config = dataclasses.replace(copy, **{name: OTHER[name]})
    assert_refused(config, capsys, f"{name}={OTHER[name]}:", f"{name}={getattr(copy, name)}")


@pytest.mark.parametrize("finished", [False, True])
def test_max_steps_may_not_shrink(finished, copy, capsys):
    if finished:
        finish(copy)
    config = dataclasses.replace(copy, max_steps=3)
    assert_refused(config, capsys, "max_steps=3:", "max_steps=4", "grow", "another --log_dir")


def test_max_steps_may_grow_and_that_is_said(copy, capsys):
    finish(copy)
    config = dataclasses.replace(copy, max_steps=6)
    code, out, err = outcome(config, capsys)
    assert (code, err) == (0, "")
    assert "max_steps was 4 and is 6" in out and "continuing from" in out and "step_00004" in out
    assert list(losses(config)) == [0, 1, 2, 3, 4, 5]
    assert json.loads((Path(config.log_dir) / "run.json").read_text())["finished_step"] == 6


def test_a_finished_run_says_so_and_is_left_alone(copy, capsys):
    finish(copy)
    before = tree(Path(copy.log_dir).parent)
    code, out, err = outcome(copy, capsys)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1 and copy.log_dir in out and "finished, at step 4 of 4" in out
    assert "--max_steps" in out and "--log_dir" in out
    assert tree(Path(copy.log_dir).parent) == before


def test_a_finished_run_whose_final_checkpoint_is_damaged_makes_it_again(copy, stopped, capsys):
    finish(copy)
    os.truncate(Path(copy.log_dir) / "step_00004" / "model.safetensors", 1000)
    code, out, _ = outcome(copy, capsys)
    assert code == 0 and "step_00004: damaged, not used: model.safetensors has 1,000 bytes" in out
    assert weights(copy) == weights(stopped)


@pytest.mark.parametrize("what", ["a run", "run.json", "log.txt", "a checkpoint"])
def test_resume_false_refuses_a_directory_with_a_run(what, copy, capsys):
    log_dir = Path(copy.log_dir)
    for path in list(log_dir.iterdir()):
        if what != "a run" and path.name != {"a checkpoint": "step_00002"}.get(what, what):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = dataclasses.replace(copy, resume=False)
    assert_refused(config, capsys, "resume=False", "log_dir=", "another --log_dir")


def test_resume_false_starts_in_an_empty_directory(small, tmp_path):
    (tmp_path / "log").mkdir()
    assert train_gpt2.train(small(resume=False, max_steps=1)) == 0


OTHER_TEXT = {
    "more": TEXT + TEXT[:500],
    "less": TEXT[:-500],
    "of the same length": TEXT.replace("e", "a"),
}


@pytest.mark.parametrize("case", OTHER_TEXT)
def test_other_text_at_the_same_path_is_refused(case, copy, capsys):
    Path(copy.data).write_text(OTHER_TEXT[case], encoding="utf-8")
    assert_refused(copy, capsys, f"data={copy.data!r}", "other tokens", "another --log_dir")


def test_other_text_is_refused_without_run_json_too(copy, capsys):
    (Path(copy.log_dir) / "run.json").unlink()
    Path(copy.data).write_text(OTHER_TEXT["more"], encoding="utf-8")
    assert_refused(copy, capsys, f"data={copy.data!r}", "other tokens", "another --log_dir")


FREE = {
    "the place of the data": (dict(), True),
    "rows at a time": (dict(B=3), False),
    "evaluation, log and checkpoints": (
        dict(
            val_every=1, val_tokens=64, sample_every=2, sample_tokens=2, num_samples=1,
            checkpoint_every=1, keep_checkpoints=1, max_bad_steps=9,
        ),
        True,
    ),
    "precision": (dict(dtype="bfloat16"), None),
}  # fmt: skip


@pytest.mark.parametrize("case", FREE)
def test_what_does_not_define_the_run_may_change(case, copy, stopped, tmp_path, capsys):
    """The data lie elsewhere in every case; where the sums are the same, so are the weights."""
    settings, same_weights = FREE[case]
    shutil.rmtree(Path(copy.log_dir) / "step_00004")
    moved = tmp_path / "moved.txt"
    Path(copy.data).rename(moved)
    config = dataclasses.replace(copy, data=str(moved), **settings)
    code, out, err = outcome(config, capsys)
    assert (code, err) == (0, "") and f"continuing from {Path(copy.log_dir) / 'step_00002'}" in out
    if same_weights:
        assert weights(config) == weights(stopped)
    if same_weights is not None:
        assert losses(config) == pytest.approx(losses(stopped), abs=1e-5)
    assert list(losses(config)) == [0, 1, 2, 3]


def test_a_log_of_another_program_is_refused(small, tmp_path, capsys):
    log_dir = tmp_path / "log"
    log_dir.mkdir()
    lines = ("0 val 10.9504", "0 hella 0.2463", "0 train 10.955029", "1 train 10.6")
    (log_dir / "log.txt").write_text("\n".join(lines) + "\n")  # build-nanogpt's
    (log_dir / "model_00000.pt").write_bytes(b"weights")
    assert_refused(small(), capsys, "log_dir=", "log.txt", "another program", "another --log_dir")


GARBLED = {
    "empty": b"",
    "cut off": b'{"settings": {"data": ',
    "no text": b"\xff\x00",
    "a list": b"[1, 2]",
    "another program's": b'{"name": "a run of something else"}',
    "without settings": b'{"settings": {}, "data": ""}',
}


@pytest.mark.parametrize("case", GARBLED)
def test_a_garbled_run_json_is_refused(case, copy, capsys):
    path = Path(copy.log_dir) / "run.json"
    path.write_bytes(GARBLED[case])
    assert_refused(copy, capsys, str(path), "remove")


def test_without_run_json_a_run_continues_from_its_checkpoint(copy, stopped, capsys):
    """What the message on a garbled one advises."""
    shutil.rmtree(Path(copy.log_dir) / "step_00004")
    (Path(copy.log_dir) / "run.json").unlink()
    assert outcome(copy, capsys)[0] == 0
    assert weights(copy) == weights(stopped) and losses(copy) == losses(stopped)


@pytest.mark.parametrize("there", ["itself", "above it"])
def test_a_file_in_the_place_of_log_dir_is_refused(there, small, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    log_dir = tmp_path / "file" if there == "itself" else tmp_path / "file" / "log"
    config = small(log_dir=str(log_dir))
    assert_refused(config, capsys, "log_dir=", "another --log_dir", within=tmp_path)


# -------------------------------------------------------------------------------------------------
# Checkpoints


def truncate(directory: Path, name: str) -> None:
    os.truncate(directory / name, (directory / name).stat().st_size // 2)


HALF_WRITTEN = {
    "truncated weights": lambda d: truncate(d, "model.safetensors"),
    "no list of files": lambda d: (d / "files.json").unlink(),
    "no training state": lambda d: (d / "train_state.pt").unlink(),
}


@pytest.mark.parametrize("case", HALF_WRITTEN)
def test_the_older_whole_checkpoint_is_used_and_that_is_said(case, copy, stopped, capsys):
    newest = Path(copy.log_dir) / "step_00004"
    HALF_WRITTEN[case](newest)
    code, out, err = outcome(copy, capsys)
    assert (code, err) == (0, "")
    assert f"{newest}: damaged, not used" in out
    assert f"continuing from {Path(copy.log_dir) / 'step_00002'}" in out
    assert weights(copy) == weights(stopped) and losses(copy) == losses(stopped)
    assert losses(copy, "val") == losses(stopped, "val")
    assert checkpoint.damage(newest) is None


def test_a_partial_directory_of_a_killed_run_is_passed_over_and_goes(copy, stopped, capsys):
    log_dir = Path(copy.log_dir)
    (log_dir / "step_00004").rename(log_dir / ".step_00004.partial")
    truncate(log_dir / ".step_00004.partial", "train_state.pt")
    code, out, _ = outcome(copy, capsys)
    assert code == 0 and "step_00002" in out
    assert weights(copy) == weights(stopped) and losses(copy) == losses(stopped)
    assert not list(log_dir.glob(".*"))


def test_where_all_checkpoints_are_damaged_the_user_decides(copy, capsys):
    for step in (2, 4):
        truncate(Path(copy.log_dir) / f"step_{step:05d}", "model.safetensors")
    words = ("log_dir=", "every checkpoint", "damaged", "remove them", "another --log_dir")
    out = assert_refused(copy, capsys, *words)
    assert out.count("damaged, not used") == 2


class RunsCode:
    """Pickled, it creates the file `path` when it is loaded."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_train_state_that_runs_code_is_refused_and_not_run(form, copy, tmp_path, capsys):
    marker = tmp_path / "it ran"
    directory = Path(copy.log_dir) / "step_00004"
    path = directory / "train_state.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"step": RunsCode(marker)}, protocol=2))
    else:
        torch.save({"step": RunsCode(marker)}, path)
    listed = json.loads((directory / "files.json").read_text())
    raw = path.read_bytes()
    listed[path.name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (directory / "files.json").write_text(json.dumps(listed))
    assert checkpoint.damage(directory) is None
    assert_refused(copy, capsys, str(path), "remove", str(directory))
    assert not marker.exists()
    loaded = pickle.loads(raw) if form == "pickle" else torch.load(path, weights_only=False)
    loaded["step"].close()
    assert marker.exists(), "the file does not do what it is to show"


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


@pytest.mark.parametrize("case", NOT_A_MODEL)
def test_init_from_what_is_no_gpt2_is_refused(case, small, tmp_path, capsys):
    make, *words = NOT_A_MODEL[case]
    make(tmp_path / "model")
    config = small(init_from=str(tmp_path / "model"))
    assert_refused(config, capsys, str(tmp_path / "model"), *words)


@pytest.mark.parametrize("name", ["gpt3", "gpt2-small", "scrach", "./gone", "a/b/c"])
def test_init_from_an_unknown_name_is_refused_with_those_there_are(name, small, capsys):
    config = small(init_from=name)
    assert_refused(config, capsys, "init_from", name, "gpt2, gpt2-medium, gpt2-large, gpt2-xl")


def test_init_from_the_hub_without_its_package_says_how_to_install_it(small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    assert_refused(small(init_from="gpt2"), capsys, "pip install huggingface_hub")


def test_init_from_the_hub_without_a_network_is_refused(small, tmp_path):
    config = small(init_from="gpt2")
    (tmp_path / "cache").mkdir()
    before = tree(tmp_path)
    offline = dict(
        HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_CACHE=str(tmp_path / "cache"), NO_PROXY="*"
    )
    done = run_trainer(config, env=environment(**offline, no_proxy="*"))
    assert done.returncode == 2 and done.stdout == ""
    assert_one_line(done.stderr, ("'gpt2'", "Hugging Face Hub", "local directory"))
    after = {k: v for k, v in tree(tmp_path).items() if not k.startswith("cache" + os.sep)}
    assert after == before


# -------------------------------------------------------------------------------------------------
# Devices

ABSENT = ["cuda:99"]
ABSENT += [] if torch.cuda.is_available() else ["cuda", "cuda:3"]
ABSENT += [] if torch.backends.mps.is_available() else ["mps"]


@pytest.mark.parametrize("device", ABSENT)
def test_a_device_that_is_not_there_is_refused(device, small, tmp_path, capsys):
    assert_refused(small(device=device), capsys, f"device='{device}'", within=tmp_path)


def test_a_device_that_is_not_there_is_met_with_one_that_is(small, capsys):
    remedy = "--device=cpu" if not torch.cuda.is_available() else "name another"
    assert_refused(small(device="cuda:99"), capsys, remedy)


# -------------------------------------------------------------------------------------------------
# Full disks: writes that fail for real

FILES = {"log.txt", "progress.txt", "run.json"}  # of a run, besides its checkpoints


def assert_disk_full(done, config, *words) -> None:
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stderr, (f"log_dir={config.log_dir!r}", "make room", *words))


@pytest.mark.faults
def test_without_room_for_a_checkpoint_the_earlier_ones_stay_and_a_rerun_completes(
    copy, stopped, capsys
):
    """The weights (6.5 MB) fit, the training state (13 MB) does not."""
    log_dir = Path(copy.log_dir)
    shutil.rmtree(log_dir / "step_00004")
    done = run_trainer(copy, preexec_fn=limit_files(8_000_000))
    assert_disk_full(done, copy, "step 4", "step_00002")
    assert checkpoint.newest_whole(log_dir) == log_dir / "step_00002"
    assert {path.name for path in log_dir.iterdir()} == FILES | {"step_00002"}
    code, out, _ = outcome(copy, capsys)
    assert code == 0 and "continuing from" in out
    assert losses(copy) == pytest.approx(losses(stopped), abs=1e-5)
    assert checkpoint.damage(log_dir / "step_00004") is None


@pytest.fixture
def small_disk(tmp_path):
    """(directory, preexec_fn for a trainer in it, function that makes room).

    A file system of 27 MB, which holds one checkpoint of 22 MB and no second; where this process
    may not mount one, a directory for a trainer whose files may not be larger than 5 MB.
    """
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=27m", "tmpfs", str(directory)]
    root = os.geteuid() == 0 and shutil.which("mount") is not None
    if root and subprocess.run(mount, capture_output=True).returncode == 0:
        remount = ["mount", "-o", "remount,size=200m", str(directory)]
        yield directory, None, functools.partial(subprocess.run, remount, check=True)
        subprocess.run(["umount", "-l", str(directory)], check=True)
    else:
        yield directory, limit_files(5_000_000), lambda: None


def test_on_a_full_disk_the_earlier_checkpoint_stays_and_a_rerun_completes(
    small_disk, small, capsys
):
    disk, limit, make_room = small_disk
    config = small(log_dir=str(disk / "log"), max_steps=2, device="cpu")
    assert outcome(config, capsys)[0] == 0
    config = dataclasses.replace(config, max_steps=4)
    whole = tree(disk / "log" / "step_00002")

    done = run_trainer(config, preexec_fn=limit)
    assert_disk_full(done, config, "step 4", "step_00002")
    assert tree(disk / "log" / "step_00002") == whole
    assert {path.name for path in (disk / "log").iterdir()} == FILES | {"step_00002"}

    make_room()
    code, out, _ = outcome(config, capsys)
    assert code == 0 and "continuing from" in out
    assert checkpoint.damage(disk / "log" / "step_00004") is None
    assert list(losses(config)) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["run.json", "log.txt"])
def test_without_room_for_the_log_the_run_ends_with_one_line_and_a_rerun_completes(
    name, copy, stopped, capsys
):
    """run.json takes more than 100 bytes; log.txt has room for half a line."""
    log_dir = Path(copy.log_dir)
    shutil.rmtree(log_dir / "step_00004")
    log = log_dir / "log.txt"
    old = "".join(f"0 old {i}.000000\n" for i in range(1000, 1200)) + log.read_text()
    log.write_text(old)
    kept = "".join(line for line in old.splitlines(keepends=True) if line[0] in "01")
    size = {"run.json": 100, "log.txt": len(kept) + 5}[name]
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        code, _, err = outcome(copy, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert_one_line(err, (copy.log_dir, "make room"))
    assert checkpoint.newest_whole(log_dir) == log_dir / "step_00002"
    assert outcome(copy, capsys)[0] == 0
    assert weights(copy) == weights(stopped) and losses(copy) == losses(stopped)


# -------------------------------------------------------------------------------------------------
# In a process of its own


def test_from_a_shell_wrong_data_is_one_line_and_code_2(small, tmp_path):
    config = small(data=str(tmp_path / "gone"))
    before = tree(tmp_path)
    done = run_trainer(config)
    assert done.returncode == 2 and done.stdout == ""
    assert_one_line(done.stderr, ("data=", "gone", *WAYS_OUT))
    assert tree(tmp_path) == before
