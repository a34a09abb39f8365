"""Matrices in 8 bits: rounding, products and memory. (test_sample.py: their effect on a loss.)"""

import pytest
import torch
from torch.nn import functional as F

from support import quantize
from support.model_function import SkipInit
from train_gpt2 import GPT, GPTConfig


def count_bytes(model) -> int:
    """Bytes of a model's parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def test_rounded_rows_are_within_half_a_step():
    """Each row has its own scale; a row of zeros stays zero."""
    weight = torch.randn(50, 40) * torch.logspace(-3, 3, 50)[:, None]
    weight[7] = 0
    rounded, scale = quantize.round_rows(weight)
    assert rounded.dtype == torch.int8 and rounded.abs().max() == 127
    error = (rounded.float() * scale.float()[:, None] - weight).abs()
    assert (error <= scale.float()[:, None] * 0.5 + weight.abs() * 0.005).all()
    assert error[7].sum() == 0


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("columns", [64, 40, 36])
def test_a_product_in_8_bits_is_the_one_with_the_rounded_weights(columns, rows, dtype, bias):
    """With the kernel and without."""
    linear = torch.nn.Linear(columns, 96, bias=bias)
    rounded, scale = quantize.round_rows(linear.weight)
    layer = quantize.Int8Linear(rounded, scale, linear.bias)
    x = torch.randn(rows, columns)
    with torch.no_grad():
        expected = F.linear(x, rounded.float() * scale.float()[:, None], linear.bias)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = layer(x[None])
    assert found.shape == (1, rows, 96) and found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.003}[dtype]
    torch.testing.assert_close(found[0].float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_float16_neither_overflows_nor_vanishes(size):
    """Activations of one sign and this size, in the longest row of GPT-2: 3,072."""
    torch.manual_seed(0)
    weight, x = torch.rand(64, 3072) * 0.02, size * (0.5 + torch.rand(10, 3072))
    rounded, scale = quantize.round_rows(weight)
    found = quantize.Int8Linear(rounded, scale)(x.half())
    expected = x.half().float() @ (rounded.float() * scale.float()[:, None]).T
    assert found.dtype == torch.float16 and expected.max() < 65504
    torch.testing.assert_close(found.float(), expected, rtol=0.003, atol=0)


def test_gpt2_takes_a_quarter_of_its_bytes():
    with SkipInit():
        model = GPT(GPTConfig())
    size = 4 * model.num_parameters()
    assert count_bytes(model) == pytest.approx(size, rel=0.01)
    assert count_bytes(quantize.to_int8(model)) < 0.26 * size
