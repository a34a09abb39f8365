"""The loss in chunks: the textbook's loss and gradients, in equal chunks, compiled once."""

import functools
import math

import pytest
import torch
from model_helpers import (
    V,
    assert_same_gradients,
    loss_and_gradients,
    make_model,
    random_ids,
    text_batch,
    with_ignored,
)
from torch import nn

from support import fused_loss
from support.fused_loss import IGNORE_INDEX, HeadLoss, TrainingModel, cut
from train_gpt2 import GPT


def assert_textbook_loss(model: GPT, x, y) -> None:
    """Loss and gradients of TrainingModel are those of GPT.forward."""
    count = (y != IGNORE_INDEX).sum().item()
    expected, gradients = loss_and_gradients(model, model(x, y)[1])
    training = TrainingModel(model, compiled=False)
    found, found_gradients = loss_and_gradients(model, training(x, y) / count)
    assert found == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(found_gradients, gradients)
    value = training.evaluate(x, y)
    assert value.item() / count == pytest.approx(expected, rel=1e-5) and not value.requires_grad


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("B, T, chunk", [(4, 16, 1024), (4, 16, 16), (4, 16, 25), (1, 13, 5)])
def test_training_loss_is_the_textbook_loss(monkeypatch, B, T, chunk, ignored):
    """TrainingModel: loss and all gradients of GPT.forward, in chunks of any size."""
    monkeypatch.setitem(fused_loss.CHUNK_ROWS, "cpu", chunk)
    x, y = random_ids(B, T), with_ignored(random_ids(B, T, seed=1), ignored if B > 1 else 0.0)
    assert_textbook_loss(make_model(), x, y)


@pytest.mark.parametrize("n", [1031, 512, 513, 1024, 1, 7919, 4096])
def test_chunks_have_one_shape_and_are_as_few_as_possible(n):
    """Prime numbers too: 1031 rows are 3 chunks of 344, the last one with a row of padding."""
    x, targets = torch.randn(n, 3), torch.arange(n)
    chunks = list(zip(*cut(x, targets, 512)))
    count = math.ceil(n / 512)
    rows = math.ceil(n / count)
    assert len(chunks) == count and rows <= 512
    assert {(a.shape, b.shape) for a, b in chunks} == {((rows, 3), (rows,))}
    x_cut, targets_cut = (torch.cat(parts) for parts in zip(*chunks))
    assert torch.equal(x_cut[:n], x) and torch.equal(targets_cut[:n], targets)
    assert (targets_cut[n:] == IGNORE_INDEX).all() and len(targets_cut) - n < count


def test_padded_last_chunk_has_no_effect():
    """One row of 1031 tokens: the last of three chunks is padded, loss and gradients are exact."""
    model = make_model(vocab_size=300, block_size=1031)
    x, y = (random_ids(1, 1031, seed=seed, vocab_size=300) for seed in (0, 1))
    assert_textbook_loss(model, x, y)


def test_a_batch_of_ignored_targets_is_zero():
    """Rows that only pad a micro-batch: loss 0 and gradients 0, and no NaN."""
    model = make_model()
    training = TrainingModel(model, compiled=False)
    x, y = random_ids(2, 16), torch.full((2, 16), IGNORE_INDEX)
    loss, gradients = loss_and_gradients(model, training(x, y))
    assert loss == 0 and training.evaluate(x, y) == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_bfloat16_loss_is_close():
    """Autocast to bfloat16 moves the mean loss by less than 0.02; gradients stay float32."""
    model, (x, y) = make_model(), text_batch(2, 32)
    training = TrainingModel(model, compiled=False)
    exact = training(x, y).item() / y.numel()
    with torch.autocast("cpu", torch.bfloat16):
        loss = training(x, y) / y.numel()
        value = training.evaluate(x, y).item() / y.numel()
    assert loss.dtype == torch.float32
    assert loss.item() != exact  # it was bfloat16
    assert loss.item() == pytest.approx(exact, abs=0.02)
    assert value == pytest.approx(exact, abs=0.02)
    _, gradients = loss_and_gradients(model, loss)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


def test_the_gradient_of_the_head_does_not_overflow_in_float16(monkeypatch):
    """8,192 tokens whose hidden states point the same way and whose target is the same: the sum
    over all rows, 245,760, is not a number of float16. The sum over each chunk is."""
    monkeypatch.setitem(fused_loss.CHUNK_ROWS, "cpu", 8192)
    model, rows = make_model(vocab_size=100), 8192
    with torch.no_grad():
        model.lm_head.weight.zero_()
    x = torch.full((1, rows, model.config.n_embd), 30.0)
    y = torch.full((1, rows), 7)
    training = TrainingModel(model, compiled=False)
    with torch.autocast("cpu", torch.float16):
        (training.loss(x, y) / rows).backward()
    gradient = model.lm_head.weight.grad
    assert gradient[7].eq(gradient[7, 0]).all()
    assert gradient[7, 0].item() == pytest.approx(-30 * 99 / 100, rel=1e-3)
    assert gradient[8, 0].item() == pytest.approx(30 / 100, rel=1e-3)


def test_logits_of_all_tokens_never_exist_at_once(monkeypatch):
    """In eager mode no chunk has more rows than half of CHUNK_ROWS, in training and validation."""
    monkeypatch.setitem(fused_loss.CHUNK_ROWS, "cpu", 8)
    model, rows = make_model(), []
    model.lm_head.register_forward_hook(lambda _, arguments, y: rows.append(len(y)))
    training = TrainingModel(model, compiled=False)
    rows.clear()
    x, y = random_ids(2, 16), random_ids(2, 16, seed=1)
    training(x, y).backward()
    training.evaluate(x, y)
    assert rows == [4] * 16


def test_a_frozen_parameter_gets_no_gradient():
    """requires_grad_(False) on the head or on others: the rest have the textbook's gradients."""
    for tied, frozen in ((True, "transformer.wte.weight"), (False, "lm_head.weight")):
        model = make_model(vocab_size=300, tied=tied)
        model.get_parameter(frozen).requires_grad_(False)
        model.transformer.h[0].requires_grad_(False)
        x, y = (random_ids(2, 16, seed=seed, vocab_size=300) for seed in (0, 1))
        model(x, y)[1].backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        (TrainingModel(model, compiled=False)(x, y) / y.numel()).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (expected[name] is None), name
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


class Temperature(GPT):
    """A GPT with a trained factor of the logits."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def logits(self, x):
        return super().logits(x) * self.temperature


@pytest.mark.gpt2
def test_the_loss_has_the_parameters_that_it_uses():
    """Those of the head, and no others: a parameter of the blocks is not passed."""
    model = make_model(model_class=Temperature)
    names = {"model.temperature", "model.transformer.wte.weight"}
    assert set(HeadLoss(model).used) == names
    untied = {"model.temperature", "model.lm_head.weight"}
    assert set(HeadLoss(make_model(model_class=Temperature, tied=False)).used) == untied
    assert all(parameter.grad is None for parameter in model.parameters())


def test_compiled_loss_is_the_same_and_compiles_once(monkeypatch, error_on_recompile):
    """With a parameter of its own in the loss and a padded chunk; three steps and validations."""
    monkeypatch.setitem(fused_loss.CHUNK_ROWS, "cpu", 12)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = make_model(model_class=Temperature, vocab_size=300, n_layer=1)
    eager, compiled = TrainingModel(model, compiled=False), TrainingModel(model, compiled=True)
    for step in range(3):
        x, y = (random_ids(1, 31, seed=2 * step + i, vocab_size=300) for i in (0, 1))
        expected, gradients = loss_and_gradients(model, eager(x, y))
        found, found_gradients = loss_and_gradients(model, compiled(x, y))
        assert found == pytest.approx(expected, rel=1e-6)
        assert_same_gradients(found_gradients, gradients)
        assert compiled.evaluate(x, y).item() == pytest.approx(expected, rel=1e-6)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)


def test_loss_and_gradient_scale_with_the_factor_of_the_backward_pass():
    """A gradient scale of 1024, as float16 needs: the gradients are 1024 times as large."""
    model = make_model()
    training = TrainingModel(model, compiled=False)
    x, y = random_ids(2, 16), random_ids(2, 16, seed=1)
    _, plain = loss_and_gradients(model, training(x, y))
    _, scaled = loss_and_gradients(model, training(x, y) * 1024)
    assert_same_gradients(scaled, {name: 1024 * gradient for name, gradient in plain.items()})
    assert (plain["transformer.wte.weight"][V:] == 0).all()
