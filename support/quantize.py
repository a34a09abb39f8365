"""GPT-2 with its matrices in 8 bits, for sampling and scoring: a quarter of the memory.

Each row of a matrix (an output channel; in the embedding, an id) is stored as integers from -127 to
127 and one scale. Only weights are rounded, not activations. The token embedding and the head that
is tied to it are included; positions, norms and biases are unchanged.

On a CPU that multiplies bfloat16, a product with few rows, as for the next token of a few texts, is
limited by reading the weights, and PyTorch has a kernel that reads them in 8 bits. All other
products first convert the matrix to the model's dtype, in float16 with its scales.
"""

import torch
from torch import nn
from torch.nn import functional as F

from support.devices import dtype_name, matmul_dtype
from support.distributed import Runtime

KERNEL_ROWS = 8  # most rows for which the kernel is the faster way, measured
KERNEL_COLUMNS = 16  # it reads so many at a time (AVX-512; 8 with AVX2), and past the end of a row


def round_rows(weight) -> tuple[torch.Tensor, torch.Tensor]:
    """(integers, scales) whose product approximates `weight` (N, K): int8 (N, K), bfloat16 (N,)."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12).bfloat16()
    return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """`nn.Linear` with rounded weights: (..., K) -> (..., N)."""

    def __init__(self, weight, scale, bias=None):
        super().__init__()
        for name, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
            self.register_buffer(name, None if tensor is None else tensor.detach())

    def forward(self, x):
        x = x.to(matmul_dtype(x))
        rows = x.flatten(0, -2)
        fits_kernel = len(rows) <= KERNEL_ROWS and rows.size(1) % KERNEL_COLUMNS == 0
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and fits_kernel:
            y = torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale)
            y = y.unflatten(0, x.shape[:-1])
        elif x.dtype == torch.float16:  # a sum of products with integers would overflow
            y = F.linear(x, self.weight * self.scale.to(x.dtype)[:, None])
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int8Embedding(Int8Linear):
    """`nn.Embedding` with rounded weights: ids (...) -> float32 (..., K)."""

    def forward(self, idx):
        return self.weight[idx].float() * self.scale[idx].float()[..., None]


def to_int8(model):
    """Replaces the matrices of a `GPT` by rounded ones, and returns it.

    It can no longer be trained or saved; `hidden`, `logits`, `forward` and `generate` work as
    before, in float32 and under autocast.
    """
    wte = round_rows(model.transformer.wte.weight)
    head = wte if model.config.tied else round_rows(model.lm_head.weight)
    model.transformer.wte, model.lm_head = Int8Embedding(*wte), Int8Linear(*head)
    for module in list(model.transformer.h.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                setattr(module, name, Int8Linear(*round_rows(layer.weight), layer.bias))
    return model


def prepare_for_inference(model, runtime: Runtime, int8: bool) -> str:
    """Moves a `GPT` to the device of `runtime`, in 8 bits if `int8`.

    Returns where and how it computes, e.g. "cpu in bfloat16, weights in int8".
    """
    if int8:
        to_int8(model)
    model.to(runtime.device).eval()
    weights = ", weights in int8" if int8 else ""
    return f"{runtime.device.type} in {dtype_name(runtime.dtype)}{weights}"
