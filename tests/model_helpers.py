"""Helpers of the tests of the model: small random models, token ids, gradients."""

import torch
from conftest import ROOT
from torch.nn import functional as F

import train_gpt2
from support import tokenizer
from support.fused_loss import IGNORE_INDEX
from train_gpt2 import GPT, GPTConfig

V = tokenizer.VOCAB_SIZE
SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, tied=True)


def make_model(seed: int = 0, model_class=GPT, **shape) -> GPT:
    """A small GPT whose norms and biases are random too, so that each of them has an effect."""
    torch.manual_seed(seed)
    model = model_class(GPTConfig(**{**SHAPE, **shape}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def model_of_recipe(name: str) -> GPTConfig:
    """The model's configuration by the settings of a recipe."""
    c = train_gpt2.Config(**train_gpt2.RECIPES[name])
    return GPTConfig(block_size=c.T, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)


def text_batch(B: int, T: int):
    """The first B rows of T tokens of input.txt: (ids, their next ids), int64 (B, T)."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[: 8 * B * T + 100]
    ids = torch.tensor(tokenizer.get_encoding().encode_ordinary(text)[: B * T + 1])
    return ids[:-1].view(B, T), ids[1:].view(B, T)


def random_ids(*shape, seed: int = 0, vocab_size: int = V):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def with_ignored(y, fraction: float):
    """Targets of which about so many, and all of the first row, do not count."""
    y = y.clone()
    y[torch.rand(y.shape, generator=torch.Generator().manual_seed(3)) < fraction] = IGNORE_INDEX
    if fraction:
        y[0] = IGNORE_INDEX
    return y


def record_cudnn(monkeypatch) -> list[bool]:
    """A list to which each call of attention adds whether cuDNN may be chosen for it."""
    attention, found = F.scaled_dot_product_attention, []

    def spy(*args, **kwargs):
        found.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return found


def relative_error(a, b) -> float:
    """|a - b| / |b|, of all elements together."""
    return ((a - b).norm() / b.norm()).item()


def loss_and_gradients(model: GPT, loss):
    """(loss, {parameter name: gradient}), and no gradient left in the model."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def assert_same_gradients(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-5, name
