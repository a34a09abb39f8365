"""GPT-2 with its matrices in 8 bits, for sampling and scoring: a quarter of the memory.

Each row of a matrix (an output channel; in the embedding, an id) is whole numbers up to 127 times a
scale of its own. Only the weights are rounded, not what they are multiplied with. The embedding and
the head that is tied to it are among them; positions, norms and biases stay as they are.

On a CPU with bfloat16 units a product with few rows, one token of some texts, is done by PyTorch's
own kernel on the 8 bits: reading the weights is what takes the time there. All other products turn
the matrix at hand into the model's dtype first.
"""

import torch
from torch import nn
from torch.nn import functional as F

KERNEL_ROWS = 8  # most rows for which the kernel is the faster way, measured


def round_rows(weight) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 (N, K), bfloat16 (N,)): whole numbers, and the scales that make them `weight` again."""
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
        from train_gpt2 import product_dtype

        x = x.to(product_dtype(x))
        rows = x.flatten(0, -2)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and len(rows) <= KERNEL_ROWS:
            y = torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale)
            y = y.unflatten(0, x.shape[:-1])
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int8Embedding(nn.Module):
    """`nn.Embedding` with rounded weights: ids (...) -> float32 (..., K)."""

    def __init__(self, weight, scale):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, idx):
        return self.weight[idx].float() * self.scale[idx].float()[..., None]


def to_int8(model):
    """The `GPT` itself, its matrices replaced by rounded ones: no longer to be trained or saved.

    `model.hidden`, `logits`, `forward` and `generate` work as before, in float32 and in autocast.
    """
    wte = round_rows(model.transformer.wte.weight)
    head = wte if model.config.tied else round_rows(model.lm_head.weight)
    model.transformer.wte, model.lm_head = Int8Embedding(*wte), Int8Linear(*head)
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, Int8Linear(*round_rows(layer.weight), layer.bias))
    return model


def bytes_of(model) -> int:
    """Bytes of a model's parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
