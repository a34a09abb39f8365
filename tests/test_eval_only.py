"""`eval_only`: validation, HellaSwag and samples once, of any model, and nothing is written."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import TEXT, losses, outcome, run_trainer, tree
from filelock import FileLock
from hellaswag_helpers import make_examples, write_examples
from transformers import GPT2Config, GPT2LMHeadModel

import train_gpt2
from support import tokenizer
from support.shards import open_splits


def results_in(output: str) -> dict[str, float]:
    """{name: value} of the lines `name: value` that a run prints at its end."""
    return {name: float(value) for name, value in re.findall(r"(?m)^(\w+): ([\d.e+-]+)$", output)}


def evaluation_of(config, **settings):
    return dataclasses.replace(config, eval_only=True, **settings)


def test_the_newest_checkpoint_of_a_log_directory(copy, capsys):
    """The loss is the one that the run logged; no file is changed, and the run can continue."""
    before = tree(Path(copy.log_dir).parent)
    code, out, err = outcome(evaluation_of(copy, sample_every=1, sample_tokens=4), capsys)
    assert (code, err) == (0, "") and f"evaluating {copy.log_dir}/step_00004" in out
    assert tree(Path(copy.log_dir).parent) == before
    assert f"torch {torch.__version__}" in out
    loss = results_in(out)["val_loss"]
    assert loss == pytest.approx(losses(copy, "val")[4], abs=1e-4)
    assert out.count("step     4 | validation loss") == 1 and out.count("--- sample") == 4
    assert results_in(out)["val_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert train_gpt2.train(dataclasses.replace(copy, max_steps=5)) == 0


@pytest.mark.parametrize("source", ["a checkpoint", "a log directory"])
def test_another_model_by_init_from(source, copy, tmp_path, capsys):
    path, step = (Path(copy.log_dir), 4) if source != "a checkpoint" else (None, 2)
    path = path or Path(copy.log_dir) / "step_00002"
    config = evaluation_of(copy, init_from=str(path), log_dir=str(tmp_path / "none"))
    code, out, err = outcome(config, capsys)
    assert (code, err) == (0, "") and not Path(config.log_dir).exists()
    assert results_in(out)["val_loss"] == pytest.approx(losses(copy, "val")[step], abs=1e-4)
    assert f"step {step:5d} | validation loss" in out


@pytest.mark.gpt2
def test_a_model_from_elsewhere_has_the_loss_of_transformers(small, tmp_path, capsys):
    """More positions than T are not used; fewer are an error that names T."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=48, n_layer=1, n_head=3)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    config = evaluation_of(small(init_from=str(tmp_path / "theirs"), val_every=1))
    code, out, err = outcome(config, capsys)
    assert (code, err) == (0, "")
    tokens = torch.from_numpy(open_splits(config.data)["val"].read(0, 4 * 32 + 1).astype(int))
    with torch.no_grad():
        windows = tokens.unfold(0, 33, 32)
        logits = theirs(windows[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.mT, windows[:, 1:]).item()
    assert results_in(out)["val_loss"] == pytest.approx(expected, abs=1e-4)
    code, _, err = outcome(dataclasses.replace(config, T=128, total_batch_size=128), capsys)
    assert code == 2 and "only 64 positions; give --T=64" in err and err.count("\n") == 1


def test_hellaswag_is_scored(copy, tmp_path, capsys):
    data = write_examples(tmp_path / "data.jsonl", make_examples(8, most=5))
    settings = dict(hellaswag_every=1, hellaswag_data=str(data), val_every=0)
    code, out, err = outcome(evaluation_of(copy, **settings), capsys)
    assert (code, err) == (0, "") and out.count("| HellaSwag acc") == 1
    assert results_in(out).keys() == {"hellaswag"}


@pytest.mark.parametrize("content", ["nothing", "no checkpoint"])
def test_without_a_model_it_is_one_line(content, small, tmp_path, capsys):
    config = evaluation_of(small())
    if content == "no checkpoint":
        Path(config.log_dir).mkdir()
    before = tree(tmp_path)
    code, _, err = outcome(config, capsys)
    assert code == 2 and err.startswith(f"error: log_dir={config.log_dir!r}: ")
    assert err.count("\n") == 1 and tree(tmp_path) == before


def test_two_processes_share_the_evaluation_of_a_run_in_progress(copy):
    """An evaluation only reads, so it does not need the lock that the run holds."""
    with FileLock(Path(copy.log_dir) / ".lock"):
        before = tree(Path(copy.log_dir).parent)
        done = run_trainer(evaluation_of(copy, timeout_s=60), processes=2)
        assert done.returncode == 0, done.stderr
        assert results_in(done.stdout)["val_loss"] == pytest.approx(
            losses(copy, "val")[4], abs=1e-4
        )
        assert done.stdout.count("| validation loss") == 1
        assert tree(Path(copy.log_dir).parent) == before


# -------------------------------------------------------------------------------------------------
# Results of a run


def test_the_results_are_printed_and_recorded(small, capsys):
    config = small(val_every=2, val_tokens=10**6)
    assert train_gpt2.train(config) == 0
    printed = results_in(capsys.readouterr().out)
    result = json.loads((Path(config.log_dir) / "run.json").read_text())["result"]
    assert list(result) == [
        "val_loss", "val_bpb", "val_perplexity", "hellaswag", "tokens", "steps", "seconds",
        "tokens_per_second", "peak_memory_mib", "mfu",
    ]  # fmt: skip
    known = {name: value for name, value in result.items() if value is not None}
    assert printed == pytest.approx(known, rel=1e-5) and "hellaswag" not in printed
    assert (result["tokens"], result["steps"]) == (256, 4)
    assert result["tokens_per_second"] == pytest.approx(256 / result["seconds"])
    assert result["val_loss"] == pytest.approx(losses(config, "val")[4], abs=1e-6)
    assert 50 < result["peak_memory_mib"] < 10_000


@pytest.mark.parametrize("text", [TEXT, "日本語のテキスト。naïve 🙂\n" * 400], ids=["en", "ja"])
def test_bits_per_byte_are_those_of_the_text(text, small, tmp_path):
    """From the size of the text that the validation tokens stand for, which may begin in the middle
    of a character; its first token is not predicted."""
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    config = small(val_every=9, val_tokens=10**6, T=16, total_batch_size=64)
    assert train_gpt2.train(config) == 0
    result = json.loads((Path(config.log_dir) / "run.json").read_text())["result"]
    val = open_splits(config.data)["val"]
    windows = (len(val) - 1) // 16
    ids = val.read(1, windows * 16 + 1).tolist()
    size = len(b"".join(map(tokenizer.get_encoding().decode_single_token_bytes, ids)))
    assert abs(size - len(text.encode()) / 10) < 0.04 * len(text.encode())
    bits = result["val_loss"] * len(ids) / math.log(2)
    assert result["val_bpb"] == pytest.approx(bits / size, rel=1e-6)
