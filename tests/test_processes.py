"""The same run on 1, 2 and 3 processes, on two nodes, and through torchrun."""

import subprocess
import sys

import pytest
from conftest import (
    ROOT,
    SMALL,
    TEXT,
    command_line,
    environment,
    finish,
    losses,
    run_trainer,
    start,
)

import train_gpt2


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The losses of 8 steps of 5 rows on one process, and the settings to repeat them elsewhere."""
    directory = tmp_path_factory.mktemp("single")
    text = directory / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    settings = SMALL | dict(n_layer=1, T=16, B=5, total_batch_size=80, max_steps=8)
    settings |= dict(data=str(text), val_every=4, val_tokens=13 * 16)
    config = train_gpt2.Config(**settings, log_dir=str(directory / "log"))
    train_gpt2.train(config)
    return settings, losses(config), losses(config, "val")


@pytest.mark.parametrize("B", [1, 2, 3])
def test_any_B_gives_the_same_losses(single, tmp_path, B):
    settings, train, val = single
    config = train_gpt2.Config(**settings | dict(B=B, log_dir=str(tmp_path / "log")))
    train_gpt2.train(config)
    assert losses(config) == pytest.approx(train, abs=1e-5)
    assert losses(config, "val") == pytest.approx(val, abs=1e-5)


@pytest.mark.faults
@pytest.mark.parametrize("processes, B", [(2, 4), (3, 2)])
def test_any_number_of_processes_gives_the_same_losses(single, tmp_path, processes, B):
    """Three processes share 5 rows as 1, 2 and 2."""
    settings, train, val = single
    config = train_gpt2.Config(**settings | dict(B=B, log_dir=str(tmp_path / "log")))
    done = run_trainer(config, processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step     0 | loss") == 1  # one process prints
    assert losses(config) == pytest.approx(train, abs=1e-5)
    assert losses(config, "val") == pytest.approx(val, abs=1e-5)


@pytest.mark.parametrize(
    "processes, backend",
    [
        (2, "eager"),
        pytest.param(3, "eager", marks=pytest.mark.faults),
        pytest.param(3, "inductor", marks=pytest.mark.faults),
    ],
)
def test_compiled_in_processes_then_continued_in_one(single, tmp_path, processes, backend):
    """They share 5 rows as 2 and 3, train, validate, sample and save; one process continues.

    inductor takes more than a minute to make its machine code: test_autotune.py compares that in
    one process.
    """
    settings, train, val = single
    settings = settings | dict(
        compile=True, max_steps=4, warmup_steps=2, sample_every=4, sample_tokens=4, num_samples=3,
        log_dir=str(tmp_path / "log"),
    )  # fmt: skip
    config = train_gpt2.Config(**settings | dict(B=2))
    output = finish(start(config, processes, harm=f"compile_with {backend}"), timeout_s=240)
    assert "compiled in" in output and "failed" not in output
    assert [f"--- sample {i} at step 4" in output for i in range(3)] == [True] * 3
    same = [losses(config)[step] for step in range(3)]  # later ones have another learning rate
    assert same == pytest.approx([train[step] for step in range(3)], abs=1e-4)
    assert losses(config, "val")[0] == pytest.approx(val[0], abs=1e-4)
    assert output.count("step     0 | loss") == 1  # one process prints
    longer = train_gpt2.Config(**settings | dict(max_steps=6, compile=False))
    train_gpt2.train(longer)
    assert list(losses(longer)) == list(range(6))


def two_nodes(config, port: int) -> list[str]:
    """The outputs of two torchrun agents with one process each, which must end well."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test"]
    command = [*launcher, str(ROOT / "train_gpt2.py"), *command_line(config)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    nodes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    return outputs


@pytest.mark.faults
def test_two_nodes_train_and_continue(single, port, tmp_path):
    settings, train, val = single
    settings = settings | dict(log_dir=str(tmp_path / "log"), sample_every=4, sample_tokens=4)
    two_nodes(train_gpt2.Config(**settings | dict(checkpoint_every=4)), port)
    config = train_gpt2.Config(**settings)
    assert losses(config) == pytest.approx(train, abs=1e-5)
    outputs = two_nodes(train_gpt2.Config(**settings | dict(max_steps=10)), port)
    assert "continuing from" in "".join(outputs)
    assert list(losses(config)) == list(range(10))
    assert losses(config, "val")[4] == pytest.approx(val[4], abs=1e-5)
