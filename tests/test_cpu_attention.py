"""Attention in blocks of queries: the same function, and used only in code that it speeds up."""

import math

import pytest
import torch
from torch.nn import functional as F

from support import cpu_attention
from support.cpu_attention import BlockwiseAttention, causal_attention


def plain_attention(q, k, v):
    """The textbook's, in the dtype of q."""
    s = q @ k.transpose(2, 3) / math.sqrt(q.size(3))
    future = torch.ones(s.shape[2:], dtype=torch.bool).triu(1)
    return s.masked_fill(future, -math.inf).softmax(dim=3) @ v


def with_gradient(attention, qkv, dy):
    """The result of an attention and its gradient at the three inputs, in float32."""
    inputs = [x.detach().clone().requires_grad_() for x in qkv]
    y = attention(*inputs)
    y.backward(dy.to(y.dtype))
    return [y.detach().float(), *(x.grad.float() for x in inputs)]


@pytest.mark.parametrize("T", [3, 255, 256, 257, 512, 700])
def test_attention_in_blocks_is_attention(T):
    """Result and gradients are the textbook's; in bfloat16 as close as the flash kernel's."""
    torch.manual_seed(T)
    *qkv, dy = torch.randn(4, 2, 3, T, 16)
    expected = with_gradient(plain_attention, qkv, dy)
    found = with_gradient(BlockwiseAttention.apply, qkv, dy)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    low = [x.bfloat16() for x in qkv]
    flash = with_gradient(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), low, dy)
    found = with_gradient(BlockwiseAttention.apply, low, dy)
    for a, b, exact in zip(found, flash, expected):
        assert (a - exact).norm() <= 1.5 * (b - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize(
    "T, dtype, slow, used",
    [
        (300, torch.bfloat16, True, True),
        (256, torch.bfloat16, True, False),
        (300, torch.float32, True, False),
        (300, torch.bfloat16, False, False),
    ],
)
def test_attention_in_blocks_is_for_what_it_speeds_up(monkeypatch, T, dtype, slow, used):
    """Long rows in bfloat16 on a CPU without AMX, in compiled code; never in eager code."""
    monkeypatch.setattr(cpu_attention, "FLASH_IS_SLOW", slow)
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    qkv = [torch.randn(1, 1, T, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(causal_attention, backend=backend, fullgraph=True)
    tolerance = dict(atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(compiled(*qkv), causal_attention(*qkv), **tolerance)
    assert any("scaled_dot_product" in target for target in traced) is not used
    monkeypatch.setattr(cpu_attention, "BlockwiseAttention", None)
    causal_attention(*qkv)
