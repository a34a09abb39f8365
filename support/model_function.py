"""Which function a model's code computes: GPT-2's, or another one after an edit.

A tiny model of the same class, with fixed weights, is compared with GPT-2 written out below, and
its loss is a number that changes with the function. It takes some milliseconds on a CPU.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

RELATIVE_TOLERANCE = 1e-6  # float64, rounded to float32 in the loss: less than 1e-7 on any machine


class SkipInit(torch.overrides.TorchFunctionMode):
    """A context that skips all of `torch.nn.init`, for a model whose weights are then set."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


class Function(NamedTuple):
    """What is known about the function that a model computes."""

    number: float | None  # a loss in nats; None if the code cannot compute a tiny model
    is_gpt2: bool  # whether `transformers` computes the same logits

    def may_equal(self, number: float | None) -> bool:
        """False if `number`, of another model, shows that it computes another function."""
        if self.number is None or number is None:
            return True
        return math.isclose(self.number, number, rel_tol=RELATIVE_TOLERANCE)


@torch.no_grad()
def identify(model) -> Function:
    """The function of a model, whose own weights and device do not matter."""
    try:
        tiny = build_tiny(model).double()
        ids = torch.arange(34).square().mul(7).remainder(tiny.config.vocab_size).view(2, 17)
        logits = tiny.logits(tiny.hidden(ids[:, :-1]))
        is_gpt2 = computes_gpt2(tiny, ids[:, :-1], logits)
        losses = tiny.token_losses(logits.flatten(0, 1), ids[:, 1:].flatten())
        return Function(losses.double().mean().item(), is_gpt2)
    except Exception:  # any that edited code raises, e.g. because it needs a GPU
        return Function(None, False)


@torch.no_grad()
def build_tiny(model):
    """A model of the same class and configuration, but 2 layers, 8 channels per head and 16
    positions, with fixed weights in float32 on the CPU."""
    c = model.config
    sizes = dict(n_layer=2, n_embd=8 * c.n_head, block_size=16, vocab_size=64)
    with SkipInit(), torch.random.fork_rng([]):
        tiny = type(model)(dataclasses.replace(c, **sizes))
    for i, (name, parameter) in enumerate(tiny.named_parameters()):
        values = torch.sin(1.7 * torch.arange(parameter.numel()).double() + i)
        values /= math.sqrt(parameter.size(-1)) if parameter.dim() > 1 else 2
        is_gain = parameter.dim() < 2 and name.endswith("weight")
        parameter.copy_(values.view_as(parameter) + is_gain)
        if name in c.vocab_weights:
            parameter[tiny.config.vocab_size :] = 0  # the padding rows are not saved
    return tiny.eval()


def computes_gpt2(tiny, ids, logits) -> bool:
    """Whether a model has GPT-2's parameters, and `logits` are GPT-2's for the token ids."""
    weights = dict(tiny.state_dict())
    try:
        expected = gpt2_logits(weights, ids, tiny.config)
    except KeyError:  # a parameter of GPT-2 is missing
        return False
    return not weights and logits.shape == expected.shape and logits.allclose(expected)


def gpt2_logits(weights: dict, ids, config) -> torch.Tensor:
    """GPT-2's logits (B, T, vocab_size) of `ids` (B, T), without dropout.

    weights: {OpenAI's parameter name: tensor}; those that GPT-2 has are removed from it
    Source: Radford et al. 2019, and OpenAI's code of GPT-2.
    """
    names = {"weight", "bias"}

    def take(name: str) -> dict:
        return {kind: weights.pop(f"transformer.{name}.{kind}") for kind in names}

    def split_heads(y):
        return y.unflatten(2, (config.n_head, -1)).transpose(1, 2)

    T, C = ids.size(1), config.n_embd
    x = weights.pop("transformer.wte.weight")[ids] + weights.pop("transformer.wpe.weight")[:T]
    for i in range(config.n_layer):
        y = F.linear(F.layer_norm(x, (C,), **take(f"h.{i}.ln_1")), **take(f"h.{i}.attn.c_attn"))
        q, k, v = map(split_heads, y.split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(y.transpose(1, 2).flatten(2), **take(f"h.{i}.attn.c_proj"))
        y = F.linear(F.layer_norm(x, (C,), **take(f"h.{i}.ln_2")), **take(f"h.{i}.mlp.c_fc"))
        x = x + F.linear(F.gelu(y, approximate="tanh"), **take(f"h.{i}.mlp.c_proj"))
    head = weights.pop("lm_head.weight")[: config.vocab_size]
    return F.linear(F.layer_norm(x, (C,), **take("ln_f")), head)
