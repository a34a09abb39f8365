"""Head and cross-entropy in chunks of rows, so that the (B * T, V) logits never exist at once."""

import functools

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from support.autotune import divide_evenly
from support.devices import matmul_dtype

IGNORE_INDEX = -1  # a target that does not count
CHUNK_ROWS = {"cpu": 512, "mps": 1024, "cuda": 8192}  # rows of logits at a time, at most
# In float16 the gradient of the head is a sum over the rows of a chunk, with no loss scale: it is
# finite if no hidden state is above 63.
FLOAT16_ROWS = 1024


class HeadLoss(nn.Module):
    """The summed loss of hidden states as a module, so that its parameters can be arguments.

    model: has `logits(x)` and `token_losses(logits, targets)`. Whatever they compute is
    differentiated by autograd, for all parameters that they use and that are trained: `used` has
    them by name.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        device = next(self.parameters()).device
        x = torch.zeros(1, model.config.n_embd, device=device, requires_grad=True)
        loss = self(x, torch.zeros(1, dtype=torch.int64, device=device))
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        self.used = {name: p for (name, p), g in zip(named.items(), gradients) if g is not None}

    def forward(self, x, targets):
        """x (N, C), targets int64 (N,) -> float32 scalar."""
        return self.model.token_losses(self.model.logits(x), targets).sum()

    def with_parameters(self, x, targets, *parameters):
        """The same with other values for the parameters `used`, in their order."""
        return functional_call(self, dict(zip(self.used, parameters)), (x, targets))


def cut(x, targets, most: int):
    """Chunks of x (N, C) and targets (N,): (chunks, rows, C) and (chunks, rows), rows <= `most`.

    The last chunk is padded with rows whose target does not count: one shape compiles once.
    """
    rows = divide_evenly(len(x), most)
    if padding := -len(x) % rows:
        x = F.pad(x, (0, 0, 0, padding))
        targets = F.pad(targets, (0, padding), value=IGNORE_INDEX)
    return x.unflatten(0, (-1, rows)), targets.unflatten(0, (-1, rows))


def in_matmul_dtype(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of matrix products."""
    return x.to(matmul_dtype(x))


def cast_matrices(parameters, dtype: torch.dtype) -> list[torch.Tensor]:
    """The parameters, detached, and the matrices among them in the dtype of matrix products."""
    return [p.detach().to(dtype if p.dim() > 1 else p.dtype) for p in parameters]


class ChunkedLoss(torch.autograd.Function):
    """The sum of `loss_fn` over chunks of rows, with all gradients computed in the forward pass.

    The gradients of a chunk are taken as soon as its loss is known, so that nothing of size V is
    kept for the backward pass. (The idea of Liger-Kernel's fused linear cross-entropy.)
    """

    @staticmethod
    def forward(ctx, loss_fn, x, targets, most, *parameters):
        """x (N, C), targets int64 (N,) -> float32 scalar

        loss_fn: `HeadLoss.with_parameters`, compiled or not; most: rows of a chunk
        """
        dtype = matmul_dtype(x)
        cast = [p.requires_grad_() for p in cast_matrices(parameters, dtype)]
        total = torch.zeros((), device=x.device)
        x_chunks, targets_chunks = cut(x, targets, most)
        # What is kept is allocated before the chunks' large tensors, and never between them, where
        # it would keep the allocator from using their memory again.
        dx, *sums = [torch.zeros_like(tensor) for tensor in (x_chunks, *parameters)]
        for x_chunk, targets_chunk, dx_chunk in zip(x_chunks, targets_chunks, dx):
            with torch.enable_grad():
                x_chunk = x_chunk.detach().to(dtype).requires_grad_()
                loss = loss_fn(x_chunk, targets_chunk, *cast)
            total += loss.detach()
            gradients = list(torch.autograd.grad(loss, (x_chunk, *cast)))
            for kept in reversed([dx_chunk, *sums]):  # each is freed before the next chunk's exist
                kept += gradients.pop()
        ctx.save_for_backward(dx.flatten(0, 1)[: len(x)], *sums)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, *sums = ctx.saved_tensors
        return None, dx * grad, None, None, *(gradient.mul_(grad) for gradient in sums)


class TrainingModel(nn.Module):
    """The loss of a GPT, summed, compiled or not: token ids in, loss out. Shares all parameters.

    `model` itself stays uncompiled, for saving, sampling and odd shapes. Training and validation
    compile functions of their own, so that neither recompiles because of the other.
    """

    def __init__(self, model: nn.Module, compiled: bool):
        super().__init__()
        self.model, self.head = model, [HeadLoss(model)]  # in a list: not a second submodule
        self.use(compiled)

    def use(self, compiled: bool) -> None:
        """Switches between compiled and eager mode."""
        maybe_compile = functools.partial(torch.compile, dynamic=False) if compiled else lambda f: f
        model, head, self.compiled = self.model, self.head[0], compiled
        # The compiler keeps a cache for each function in the source, so each has a lambda.
        # The products of the head need no more digits than its dtype has.
        self.hidden = maybe_compile(lambda idx: in_matmul_dtype(model.hidden(idx)))
        self.eval_hidden = maybe_compile(lambda idx: in_matmul_dtype(model.hidden(idx)))
        self.train_loss = maybe_compile(lambda *arguments: head.with_parameters(*arguments))
        self.eval_loss = maybe_compile(lambda *arguments: head.with_parameters(*arguments))

    def forward(self, idx, targets):
        """Summed loss in nats of int64 (B, T) each: float32 scalar."""
        return self.loss(self.hidden(idx), targets)

    def loss(self, x, targets):
        """The same from final hidden states (B, T, C)."""
        return ChunkedLoss.apply(self.train_loss, *self.arguments(x, targets))

    @torch.no_grad()
    def evaluate(self, idx, targets):
        """The same loss without gradients."""
        x, targets, most, *parameters = self.arguments(self.eval_hidden(idx), targets)
        cast = cast_matrices(parameters, x.dtype)
        chunks = zip(*cut(x, targets, most))
        return torch.stack([self.eval_loss(x, y, *cast) for x, y in chunks]).sum()

    def arguments(self, x, targets) -> tuple:
        """Those of `ChunkedLoss` after `loss_fn`. Eager mode needs more memory for each row."""
        most = CHUNK_ROWS[x.device.type] // (1 if self.compiled else 2)
        if matmul_dtype(x) == torch.float16:
            most = min(most, FLOAT16_ROWS)
        return x.flatten(0, 1), targets.flatten(), most, *self.head[0].used.values()
