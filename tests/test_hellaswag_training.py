"""HellaSwag in training: each score once, at its step, after a kill and for any number of ranks."""

import functools
import random
import re
import signal
from pathlib import Path

import hellaswag_helpers as helpers
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, losses, read_log, run_trainer
from hellaswag_helpers import (
    ALONE,
    EXAMPLES,
    WORDS,
    command,
    make_example,
    make_examples,
    make_questions,
    scores_in,
    set_batches,
    training,
    write_examples,
)

import train_gpt2
from support import hellaswag_eval, tokenizer
from support.distributed import Runtime
from support.errors import UserError

# Fixtures
broken_file, forks, server = helpers.broken_file, helpers.forks, helpers.server


def console_scores(output: str) -> dict[int, str]:
    """{step: score} as the trainer printed them."""
    return {int(s): score for s, score in re.findall(r"step +(\d+) \| HellaSwag (acc.*)", output)}


def test_training_scores_at_its_steps(forks, small, tmp_path, capsys):
    """As the program alone scores the checkpoint of that step, on the first examples if so set."""
    data = write_examples(tmp_path / "data.jsonl", make_examples(23, most=5))
    settings = dict(hellaswag_every=2, hellaswag_data=str(data), hellaswag_examples=19)
    config = small(**settings, max_steps=5, max_lr=0.05, checkpoint_every=2, keep_checkpoints=9)
    assert train_gpt2.train(config) == 0
    printed, logged = console_scores(capsys.readouterr().out), losses(config, "hella")
    assert list(logged) == [0, 2, 4, 5]
    assert len(set(logged.values())) > 1  # else this shows nothing
    options = ("-d", "cpu", "--dtype=float32", "--style=completion", "--limit=19", "--data", data)
    steps = [Path(config.log_dir) / f"step_{step:05d}" for step in (2, 4, 5)]
    results = forks(*[command("-m", step, *options) for step in steps])
    for step, result in zip((2, 4, 5), results):
        assert scores_in(result.out)["completion"] == printed[step], result.err
        assert f"acc_norm {logged[step]:.4f} +-" in printed[step] and "19 examples" in printed[step]
    for line in read_log(config):
        assert re.fullmatch(r"\d+ (train|hella) \d+\.\d+", line)


@pytest.mark.faults
def test_each_score_is_logged_once_after_kills(forks, small, tmp_path):
    """Killed in a score right after saving; and some steps, with a score, after saving."""
    data = write_examples(tmp_path / "data.jsonl", make_examples(13, most=5))
    settings = dict(hellaswag_every=2, hellaswag_data=str(data), max_steps=9, max_lr=0.05)
    complete = small(**settings, log_dir=str(tmp_path / "complete"))
    right_after = small(**settings, log_dir=str(tmp_path / "right_after"), checkpoint_every=4)
    later = small(**settings, log_dir=str(tmp_path / "later"), checkpoint_every=5)
    results = forks(
        training(complete), training(right_after, kill_at=3), training(later, kill_at=5)
    )
    assert [result.code for result in results] == [0, -signal.SIGKILL, -signal.SIGKILL], results
    assert list(losses(right_after, "hella")) == [0, 2]
    assert list(losses(later, "hella")) == [0, 2, 4, 6]
    for result in forks(training(right_after), training(later)):
        assert result.code == 0 and "continuing from" in result.out
    assert read_log(complete) == read_log(right_after) == read_log(later)
    assert list(losses(complete, "hella")) == [0, 2, 4, 6, 8, 9]


SMALL_BATCHES = {"cpu": 512}  # tokens of a batch


@pytest.fixture(scope="module")
def shared_score(tmp_path_factory):
    """(settings, scores) of a run on one process; its 37 examples are five batches."""
    directory = tmp_path_factory.mktemp("shared")
    (directory / "text.txt").write_text((ROOT / "input.txt").read_text("utf-8")[:16000], "utf-8")
    rng = random.Random(0)
    examples = [
        make_example(" ".join(rng.choice(WORDS[:20]) for _ in range(40)), "",
                [" ".join(rng.choice(WORDS[:20]) for _ in range(3)) for _ in range(4)])
        for _ in range(37)
    ]  # fmt: skip
    data = write_examples(directory / "data.jsonl", examples)
    rows = list(hellaswag_eval.make_rows(make_questions(examples), 64))
    assert len(hellaswag_eval.group_rows(rows, SMALL_BATCHES["cpu"])) == 5  # not a multiple of 3
    settings = SMALL | dict(
        data=str(directory / "text.txt"), T=64, max_steps=2, max_lr=0.05,
        hellaswag_every=2, hellaswag_data=str(data),
    )  # fmt: skip
    config = train_gpt2.Config(**settings, log_dir=str(directory / "log"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hellaswag_eval, "BATCH_TOKENS", SMALL_BATCHES)
        train_gpt2.train(config)
    scores = losses(config, "hella")
    assert list(scores) == [0, 2] and scores[0] != scores[2]
    return settings, scores


@pytest.mark.faults
def test_two_processes_under_torchrun_have_the_same_score(shared_score, tmp_path):
    settings, scores = shared_score
    config = train_gpt2.Config(**settings, log_dir=str(tmp_path / "log"))
    done = run_trainer(config, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(config, "hella") == scores
    assert list(console_scores(done.stdout)) == [0, 2]


def ranks(config, count: int, port: int) -> list[dict]:
    """The processes of a run as a launcher would start them."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        training(
            config,
            environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            BATCH_TOKENS=SMALL_BATCHES,
        )
        for rank in range(count)
    ]


def test_three_processes_have_the_same_score(forks, shared_score, port, tmp_path):
    settings, scores = shared_score
    config = train_gpt2.Config(**settings, log_dir=str(tmp_path / "log"))
    results = forks(*ranks(config, 3, port))
    assert [result.code for result in results] == [0] * 3, results
    assert losses(config, "hella") == scores
    assert [len(console_scores(result.out)) for result in results] == [2, 0, 0]


def test_processes_of_a_run_download_once(forks, shared_score, port, server, tmp_path):
    settings, _ = shared_score
    config = train_gpt2.Config(**settings | dict(hellaswag_data=""), log_dir=str(tmp_path / "log"))
    where = dict(FOLDER=str(tmp_path / "data"), EXAMPLES={"val": 12}, URL=server.url("slow"))
    results = forks(*[case | where for case in ranks(config, 2, port)])
    assert [result.code for result in results] == [0] * 2, results
    assert list(losses(config, "hella")) == [0, 2] and len(server.requests) == 1


def test_processes_without_data_train(forks, shared_score, port, server, tmp_path):
    """One waits for the server in vain, not one after the other: that can take minutes each."""
    settings, _ = shared_score
    config = train_gpt2.Config(**settings | dict(hellaswag_data=""), log_dir=str(tmp_path / "log"))
    where = dict(
        FOLDER=str(tmp_path / "data"), EXAMPLES={"val": 12}, URL=server.url("slow_missing")
    )
    results = forks(*[case | where for case in ranks(config, 2, port)])
    assert [result.code for result in results] == [0] * 2, results
    assert "".join(result.out for result in results).count("HellaSwag is skipped") == 1
    assert list(losses(config)) == [0, 1] and losses(config, "hella") == {}
    assert len(server.requests) == 1


def test_no_node_scores_if_another_one_lacks_the_data(tmp_path, capsys):
    class Node(Runtime):
        def all_reduce(self, tensor):
            return tensor  # the other one adds nothing

    data = write_examples(tmp_path / "data.jsonl", EXAMPLES[:3])
    node = Node(0, 2, ALONE.device, ALONE.dtype)
    arguments = (str(data), 0, tokenizer.VOCAB_SIZE)
    assert len(hellaswag_eval.load_shared_questions(*arguments, ALONE)) == 3
    assert hellaswag_eval.load_shared_questions(*arguments, node) == []
    assert capsys.readouterr().out == "HellaSwag is skipped: not all nodes have its data\n"


def test_scoring_recompiles_nothing(small, tmp_path, error_on_recompile, monkeypatch, capsys):
    """Compiled graphs are those of training and validation; a plain run has the same scores."""
    from torch._dynamo.utils import counters

    # what is compiled again, and when, does not depend on what the graphs are turned into
    quick = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(train_gpt2.torch, "compile", quick)
    set_batches(monkeypatch, 256, 64, 16)  # many shapes
    data = write_examples(tmp_path / "data.jsonl", make_examples(15, most=8))
    settings = dict(hellaswag_every=1, hellaswag_data=str(data), max_steps=3, max_lr=0.05)
    settings |= dict(val_every=2)
    counters.clear()
    config = small(**settings, compile=True)
    assert train_gpt2.train(config) == 0
    output = capsys.readouterr().out
    assert "compiled in" in output and "failed" not in output, output
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]
    eager = small(**settings, log_dir=str(tmp_path / "eager"))
    train_gpt2.train(eager)
    assert list(losses(config, "hella")) == [0, 1, 2, 3]
    assert losses(config, "hella") == losses(eager, "hella")


def test_scoring_does_not_change_the_training(small, tmp_path):
    data = write_examples(tmp_path / "data.jsonl", make_examples(5, most=8))
    for dtype in ("float32", "bfloat16"):
        runs = [
            small(dtype=dtype, log_dir=str(tmp_path / f"{dtype}_{every}"), hellaswag_every=every,
                  hellaswag_data=str(data), max_steps=2)
            for every in (0, 1)
        ]  # fmt: skip
        for config in runs:
            train_gpt2.train(config)
        assert losses(runs[0]) == losses(runs[1]) and losses(runs[0], "hella") == {}
        weights = [Path(c.log_dir) / "step_00002" / "model.safetensors" for c in runs]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def assert_trained_without(config, output: str) -> None:
    """To the end, after one line on HellaSwag."""
    lines = [line for line in output.splitlines() if "HellaSwag" in line]
    assert len(lines) == 1 and lines[0].startswith("HellaSwag is skipped: "), lines
    assert losses(config, "hella") == {} and list(losses(config)) == [0, 1]
    assert "finished:" in output


@pytest.mark.parametrize(
    "broken_file", ["not JSON", "no ctx", "endings are numbers"], indirect=True
)
def test_broken_data_does_not_stop_training(small, broken_file, capsys):
    config = small(hellaswag_every=1, hellaswag_data=str(broken_file), max_steps=2)
    assert train_gpt2.train(config) == 0
    assert_trained_without(config, capsys.readouterr().out)


@pytest.mark.parametrize("path", ["none.jsonl", "."])
def test_missing_data_does_not_stop_training(small, tmp_path, capsys, path):
    config = small(hellaswag_every=1, hellaswag_data=str(tmp_path / path), max_steps=2)
    assert train_gpt2.train(config) == 0
    assert_trained_without(config, capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["missing", "cut", "garbage"])
def test_a_bad_server_does_not_stop_training(small, tmp_path, capsys, monkeypatch, server, kind):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hellaswag_eval, "FOLDER", tmp_path / "hellaswag")
    monkeypatch.setattr(hellaswag_eval, "URL", server.url(kind))
    config = small(hellaswag_every=1, max_steps=2)
    assert train_gpt2.train(config) == 0
    assert_trained_without(config, capsys.readouterr().out)


def test_a_model_of_another_vocabulary_trains_without(small, tmp_path, capsys):
    """On shards of its own tokens."""
    shape = dict(block_size=32, vocab_size=1000, n_layer=1, n_head=1, n_embd=8)
    train_gpt2.GPT(train_gpt2.GPTConfig(**shape)).save_pretrained(tmp_path / "model")
    (tmp_path / "shards").mkdir()
    for split in ("train", "val"):
        np.save(tmp_path / "shards" / f"{split}_000.npy", np.arange(2000, dtype=np.uint16) % 1000)
    data = write_examples(tmp_path / "data.jsonl", EXAMPLES[:2])
    config = small(
        data=str(tmp_path / "shards"), init_from=str(tmp_path / "model"), max_steps=2,
        hellaswag_every=1, hellaswag_data=str(data), sample_every=2,
    )  # fmt: skip
    assert train_gpt2.train(config) == 0
    output = capsys.readouterr().out
    assert_trained_without(config, output)
    assert output.count("no sample: the model has 1,000 of GPT-2's tokens") == 1


def test_hellaswag_every_0_never_reads_the_data(small, tmp_path, monkeypatch, server, capsys):
    monkeypatch.setattr(hellaswag_eval, "FOLDER", tmp_path / "hellaswag")
    monkeypatch.setattr(hellaswag_eval, "URL", server.url("good"))
    assert train_gpt2.train(small(hellaswag_every=0)) == 0
    assert train_gpt2.train(small(hellaswag_every=0, hellaswag_data="nowhere", max_steps=5)) == 0
    assert server.requests == [] and not (tmp_path / "hellaswag").exists()
    assert "HellaSwag" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hellaswag_every", "hellaswag_examples"])
def test_negative_settings_are_refused(name):
    with pytest.raises(UserError, match=f"{name}=-1: must be 0 or more"):
        train_gpt2.parse_config([f"--{name}=-1"])
