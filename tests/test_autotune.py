"""Choices made by trying: the rows of a micro-batch, and compiled or eager mode."""

import functools
import math

import pytest
import torch
from conftest import losses
from model_helpers import make_model

import train_gpt2
from support import autotune
from support.autotune import choose_micro_batch, divide_evenly
from support.distributed import Runtime
from support.fused_loss import TrainingModel


def choose(rows: int, B: int, T: int, world_size: int = 1) -> int:
    """The micro-batch of a rank if all ranks together have `rows` rows, on a CPU."""
    runtime = Runtime(0, world_size, torch.device("cpu"), torch.float32)
    return choose_micro_batch(math.ceil(rows / world_size), B, T, None, runtime)


@pytest.mark.parametrize(
    "rows, T, world_size, B, chosen",
    [
        (8, 1024, 1, 0, 4),  # 4,096 tokens
        (512, 64, 1, 0, 64),
        (100, 4096, 1, 0, 1),
        (100, 8192, 1, 0, 1),  # at least one row
        (16, 128, 1, 0, 16),  # no more than there are
        (171, 8, 1, 64, 57),  # 3 x 57, not 64 + 64 + 43
        (171, 8, 1, 57, 57),
        (171, 8, 1, 200, 171),
        (9, 32, 1, 8, 5),
        (512, 1024, 8, 64, 64),
        (512, 1024, 3, 64, 57),  # the largest share is 171
        (8, 32, 3, 8, 3),
        (2, 32, 8, 4, 1),
        (7, 32, 1, 1, 1),
    ],
)
def test_B_is_even_and_never_more_than_a_rank_has(rows, T, world_size, B, chosen):
    assert choose(rows, B, T, world_size) == chosen


def test_B_wastes_less_than_a_micro_batch():
    """For all shares to 200 rows and settings to 70: as few micro-batches as B allows."""
    for rows in range(1, 201):
        for B in range(1, 71):
            chosen = choose(rows, B, 8)
            micro_steps = math.ceil(rows / B)
            assert 1 <= chosen <= min(B, rows) and chosen == divide_evenly(rows, B)
            assert math.ceil(rows / chosen) == micro_steps  # no more forward passes than at B
            assert micro_steps * chosen - rows < micro_steps  # less than a row of each is idle


@pytest.mark.parametrize("largest, chosen", [(64, 64), (63, 32), (9, 8), (1, 1), (0, 1)])
def test_B_on_a_gpu_is_the_largest_power_of_two_that_fits(monkeypatch, largest, chosen):
    """Up to 65,536 tokens; a single row is not tried, since less is not possible."""
    from support import autotune

    tried = []

    def fits(training_model, B, T, runtime):
        tried.append(B)
        return B <= largest

    monkeypatch.setattr(autotune, "fits", fits)
    monkeypatch.setattr(torch, "tensor", lambda value, device: torch.as_tensor(value))
    runtime = Runtime(0, 1, torch.device("cuda"), torch.bfloat16)
    assert choose_micro_batch(512, 0, 1024, None, runtime) == chosen
    assert tried[0] == 64 and 1 not in tried


# -------------------------------------------------------------------------------------------------
# Trials: memory and the compiler, with a model that does nothing


class FakeModel(torch.nn.Module):
    """A training model whose forward pass calls `act`."""

    def __init__(self, compiled: bool, act=lambda: None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.compiled, self.act, self.modes = compiled, act, []

    def use(self, compiled: bool) -> None:
        self.compiled = compiled

    def forward(self, idx, targets):
        self.modes.append(self.compiled)
        self.act()
        return (idx.float().sum() + self.weight).sum()

    evaluate = forward


RUNTIME = Runtime(0, 1, torch.device("cpu"), torch.float32)


def raise_error(error):
    """A function that raises this error."""

    def act():
        raise error

    return act


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fits", [False, True])
def test_a_trial_of_memory_leaves_the_model_as_it_was(compiled, fits):
    act = (lambda: None) if fits else raise_error(torch.OutOfMemoryError("out of memory"))
    model = FakeModel(compiled, act)
    assert autotune.fits(model, 8, 16, RUNTIME) is fits
    assert model.modes == [False], "the trial must not compile"
    assert model.compiled is compiled and model.weight.grad is None
    assert torch.equal(model.weight, torch.ones(3))


def test_a_trial_whose_backward_pass_runs_out_of_memory_leaves_no_gradient(monkeypatch):
    original = torch.Tensor.backward

    def backward(self):
        original(self)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    model = FakeModel(compiled=True)
    assert autotune.fits(model, 8, 16, RUNTIME) is False
    assert model.compiled and model.weight.grad is None


def test_a_trial_does_not_hide_other_errors():
    model = FakeModel(True, raise_error(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        autotune.fits(model, 8, 16, RUNTIME)
    assert model.compiled and model.weight.grad is None


def test_a_compiler_that_fails_is_one_line_and_eager_mode(capsys):
    model = FakeModel(True, raise_error(OSError("g++\nis missing\nand a long report")))
    autotune.compile_or_fall_back(model, model, 8, 16, RUNTIME)
    line = "torch.compile failed; falling back to eager mode: OSError: g++ is missing\n"
    assert capsys.readouterr().out == line
    assert model.compiled is False and model.weight.grad is None


def test_a_compiler_that_fails_on_another_rank_is_eager_mode_too(capsys, monkeypatch):
    monkeypatch.setattr(Runtime, "sum_float", lambda self, value: value + 1.0)
    model = FakeModel(True)
    autotune.compile_or_fall_back(model, model, 8, 16, RUNTIME)
    line = "torch.compile failed; falling back to eager mode: on another rank\n"
    assert capsys.readouterr().out == line and not model.compiled


def test_running_out_of_memory_is_not_a_compiler_that_fails(capsys):
    model = FakeModel(True, raise_error(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        autotune.compile_or_fall_back(model, model, 8, 16, RUNTIME)
    assert "falling back" not in capsys.readouterr().out


def test_without_compile_nothing_is_tried(capsys):
    model = FakeModel(compiled=False)
    autotune.compile_or_fall_back(model, model, 8, 16, RUNTIME)
    assert model.modes == [] and capsys.readouterr().out == ""


# -------------------------------------------------------------------------------------------------
# Runs with torch.compile


@pytest.mark.parametrize("kind, compiled", [("cpu", True), ("mps", False)])
def test_nothing_is_compiled_on_mps(kind, compiled, small):
    """Compiled LayerNorm is wrong there (pytorch#191976). The model stays on the CPU here."""
    config, runtime = small(compile=True), Runtime(0, 1, torch.device(kind), torch.bfloat16)
    splits = train_gpt2.open_data(config, runtime)
    run = train_gpt2.build_run(config, runtime, make_model(vocab_size=300), splits)
    assert run.training_model.compiled == compiled


SLOWER_BACKENDS = ["aot_eager", "inductor"]


@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(b, marks=pytest.mark.faults) for b in SLOWER_BACKENDS)]
)
def test_compiled_training_never_recompiles(
    small, error_on_recompile, monkeypatch, capsys, backend
):
    """Validation, odd shapes on the raw model and samples leave the compiled step as it is.

    What is traced, and how often, does not depend on the backend, which takes most of the time.
    """
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    settings = dict(n_layer=1, max_steps=3, val_every=1, total_batch_size=160, B=2)
    settings |= dict(sample_every=1, sample_tokens=4, num_samples=2)
    config = small(compile=True, **settings)
    graphs = []
    original = train_gpt2.print_samples

    def print_samples(run, *rest):
        for shape in ((4, 7), (1, 32), (3, 31)):  # as HellaSwag's
            run.model(torch.zeros(shape, dtype=torch.int64))
        graphs.append(counters["stats"]["unique_graphs"])
        original(run, *rest)

    monkeypatch.setattr(train_gpt2, "print_samples", print_samples)
    counters.clear()
    assert train_gpt2.train(config) == 0
    assert "compiled in" in capsys.readouterr().out
    assert graphs == [4] * 3  # hidden states and loss, each for training and for validation
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]

    plain = small(log_dir=config.log_dir + "_eager", **settings)
    train_gpt2.train(plain)
    assert losses(config) == pytest.approx(losses(plain), abs=1e-4)
    assert losses(config, "val") == pytest.approx(losses(plain, "val"), abs=1e-4)


def test_inductors_loss_and_gradients_are_those_of_eager_mode():
    """The default backend, which makes machine code, on the smallest model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(32, n_layer=1, n_head=2, n_embd=32))
    idx, targets = (torch.randint(50257, (2, 32)) for _ in range(2))
    results = []
    for compiled in (False, True):
        loss = TrainingModel(model, compiled)(idx, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_missing_toolchain_is_eager_mode(small, monkeypatch, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler found\nand more lines")

    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", no_compiler)
    config = small(compile=True)
    assert train_gpt2.train(config) == 0
    output = capsys.readouterr().out
    assert "torch.compile failed; falling back to eager mode: " in output
    assert "no C++ compiler found" in output and "and more lines" not in output
    assert list(losses(config)) == [0, 1, 2, 3]
