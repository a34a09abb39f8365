"""Causal attention, with a faster path for bfloat16 on CPUs without AMX."""

import math

import torch
from torch.nn import functional as F

from support.devices import cpu_flags

FLASH_IS_SLOW = "avx512_bf16" in cpu_flags() and "amx_bf16" not in cpu_flags()
QUERIES = 256  # queries in a block of `BlockwiseAttention`


def causal_attention(q, k, v):
    """Causal attention: q, k, v (B, nh, T, hs) -> (B, nh, T, hs)."""
    if torch.compiler.is_compiling() and FLASH_IS_SLOW and q.size(2) > QUERIES:
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            return BlockwiseAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class BlockwiseAttention(torch.autograd.Function):
    """Causal attention in blocks of queries, for compiled code.

    Without AMX, PyTorch's flash kernel for CPUs multiplies bfloat16 at the rate of float32, and
    takes twice the time. Here a block of queries attends to the keys up to its own last one. The
    probabilities are kept for the backward pass: B nh T T / 2 numbers in the dtype of q.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        """q, k, v (B, nh, T, hs) -> (B, nh, T, hs)."""
        blocks, scale = q.split(QUERIES, dim=2), q.size(3) ** -0.5
        ys, ps, end = [], [], 0
        for q_block in blocks:
            start, end = end, end + q_block.size(2)
            s = (q_block * scale @ k[:, :, :end].transpose(2, 3)).float()
            future = torch.ones(s.shape[2:], dtype=torch.bool, device=q.device).triu(start + 1)
            p = s.masked_fill(future, -math.inf).softmax(dim=3).to(q.dtype)
            ys.append(p @ v[:, :, :end])
            ps.append(p)
        y = torch.cat(ys, dim=2)
        ctx.save_for_backward(q, k, v, y, *ps)
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, y, *ps = ctx.saved_tensors
        scale, end = q.size(3) ** -0.5, 0
        dqs, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        mean_dp = (dy.float() * y.float()).sum(dim=3, keepdim=True)  # mean under p
        for p in ps:
            start, end = end, end + p.size(2)
            dy_block = dy[:, :, start:end]
            dp = dy_block @ v[:, :, :end].transpose(2, 3)
            ds = (p.float() * (dp.float() - mean_dp[:, :, start:end]) * scale).to(q.dtype)
            dqs.append(ds @ k[:, :, :end])
            dk[:, :, :end] += ds.transpose(2, 3) @ q[:, :, start:end]
            dv[:, :, :end] += p.transpose(2, 3) @ dy_block
        return torch.cat(dqs, dim=2), dk, dv
