"""Trains GPT-2 from scratch: the 124M model on FineWeb-Edu, or a small one on `input.txt`.

    python train_gpt2.py tiny                                  # a small GPT in two minutes on a CPU
    python train_gpt2.py                                       # GPT-2 124M on one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py     # the same run on eight
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
        --rdzv_endpoint=HOST:29500 train_gpt2.py               # and on two nodes (shared log_dir)

The 124M run starts at a loss of about 10.98 and is to pass OpenAI's GPT-2 on FineWeb-Edu validation
(3.2924) within its 10 B tokens. Any setting of `Config` below can be given as `--name=value`.

Writes, in `log_dir`: `log.txt` (`step stream value` lines), `run.json` (settings, versions) and
`step_NNNNN/`, each a Hugging Face model plus what an exact resume needs. The same command again
continues the run.

Sources: Radford et al. 2019 (GPT-2), Brown et al. 2020 (GPT-3: optimizer, schedule), and the
programs nanoGPT and build-nanogpt, whose names are kept.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import re
import statistics
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import hellaswag
from support import (
    checkpoint,
    cli,
    distributed,
    huggingface,
    run_log,
    token_shards,
    tokenizer,
    trackers,
)
from support.errors import SettingError, UserError, run_main
from support.run_log import Curves, Progress, RunLog
from support.stop_signals import Stopped, StopSignals

# -------------------------------------------------------------------------------------------------
# Settings: edit the defaults here, or give --name=value


@dataclass
class Config:
    """The settings: a line of the command line each."""

    # data
    data: str = "edu_fineweb10B"  # a directory of token shards (.npy, .bin), or one .txt file
    check_data: bool = True  # read all shards through, if they have a manifest, before training
    shuffle: bool = True  # a new order of the windows each epoch; False: file order
    seed: int = 1337  # of the initialization and the order of the windows
    init_from: str = "scratch"  # scratch, gpt2[-medium|-large|-xl], or a Hugging Face directory

    # model: GPT-2 124M
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width of the residual stream
    T: int = 1024  # context, in tokens

    # batch
    B: int = 0  # most rows in one forward pass; 0: the most that fit the device
    total_batch_size: int = 524288  # tokens per step over all processes: 2**19, GPT-3's 0.5 M
    batch_ramp_tokens: int = 0  # tokens over which the batch grows from 32,768; 0: no ramp

    # optimizer and schedule, as in GPT-3 (table 2.1 and appendix B)
    optimizer: str = "adamw"  # adamw, or muon: on the matrices of the blocks, AdamW on the rest
    schedule: str = "cosine"  # of the learning rate after the warm-up: cosine or linear
    max_lr: float = 6e-4  # learning rate after the warm-up
    min_lr: float = 6e-5  # learning rate at the end: 10 %
    warmup_steps: int = 715  # steps of linear warm-up: 375 M tokens
    max_steps: int = 19073  # steps of the run: 10 B tokens, one epoch of FineWeb-Edu 10B
    weight_decay: float = 0.1  # on tensors of 2 or more dimensions
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    grad_clip: float = 1.0  # largest global norm of the gradient; 0: no clipping
    muon_lr: float = 0.02  # Muon's learning rate after the warm-up; it rises and falls with AdamW's
    muon_momentum: float = 0.95  # decay of the average of gradients that Muon orthogonalizes
    max_bad_steps: int = 3  # non-finite steps in a row after which the run stops

    # evaluation
    val_every: int = 250  # steps between validations; 0: never
    val_tokens: int = 10485760  # tokens of each validation, always the same ones
    hellaswag_every: int = 250  # steps between HellaSwag scores; 0: never
    hellaswag_data: str = ""  # a .jsonl; "": hellaswag/hellaswag_val.jsonl, fetched if need be
    hellaswag_examples: int = 0  # only the first ones; 0: all 10,042
    sample_every: int = 250  # steps between samples; 0: never
    sample_prompt: str = "Hello, I'm a language model,"  # what the samples continue
    sample_tokens: int = 32  # tokens added to the prompt
    num_samples: int = 4  # samples each time

    # output
    log_dir: str = "log"  # the log and the checkpoints of this run
    checkpoint_every: int = 1000  # steps between checkpoints; 0: only the final one
    keep_checkpoints: int = 2  # newest checkpoints kept, besides the best one
    resume: bool = True  # continue the run in log_dir; False: refuse if there is one
    curves: bool = True  # draw curves.png at each evaluation
    tracker: str = ""  # "", tensorboard or wandb
    gpu_hour_usd: float = 0.0  # of one GPU, for an estimate of the run's price; 0: none

    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of the matrix products: auto, float32, bfloat16, float16
    compile: bool = True  # torch.compile; eager where it cannot
    timeout_s: int = 600  # seconds that processes wait for one of them before the run ends


RECIPES = {
    # two minutes on two CPU cores: 614,400 tokens, so the play 5.7 times over; compiling would take
    # longer than it saves
    "tiny": dict(
        data="input.txt", n_layer=4, n_head=4, n_embd=128, T=128, B=8, total_batch_size=2048,
        max_lr=3e-3, min_lr=3e-4, warmup_steps=20, max_steps=300, val_every=50, val_tokens=8192,
        hellaswag_every=300, hellaswag_data="hellaswag/hellaswag_val.jsonl", hellaswag_examples=500,
        sample_every=100, sample_prompt="QUEEN MARETH:\n", sample_tokens=120, num_samples=1,
        log_dir="log_tiny", checkpoint_every=100, compile=False,
    ),
    "gpt2": dict(),
    # sizes from GPT-2, learning rates from GPT-3's models of the same size (table 2.1)
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4, min_lr=3e-5),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, max_lr=2.5e-4, min_lr=2.5e-5),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, max_lr=2e-4, min_lr=2e-5),
    # GPT-2 124M by Muon in a third of the tokens. A small model needed about half of what a
    # tuned AdamW needs (BENCHMARKS.md), which by modded-nanogpt's records is half of what it needs
    # at the default's rate. muon_lr, momentum, beta2, schedule and warm-up (5 %) are the small
    # model's best; max_lr, here of embeddings, norms and biases, is that of modded-nanogpt's first
    # run with Muon, whose head was tied too. Not measured at this size yet.
    "speedrun": dict(
        optimizer="muon", muon_lr=0.02, muon_momentum=0.9, beta2=0.99, max_lr=3.6e-3, min_lr=3.6e-4,
        warmup_steps=318, max_steps=6358,
    ),
    # OpenAI's GPT-2 goes on with a text of your own: nanoGPT's batch and learning rate for that
    "finetune": dict(
        init_from="gpt2", data="input.txt", total_batch_size=32768, max_lr=3e-5, min_lr=3e-6,
        warmup_steps=2, max_steps=20, val_every=5, val_tokens=8192, hellaswag_every=0,
        sample_every=20, sample_prompt="QUEEN MARETH:\n", sample_tokens=120, num_samples=1,
        log_dir="log_finetune", checkpoint_every=0,
    ),
    # GPT-3's context and its ramp over the first 4 B tokens: the 375 M tokens of warm-up then take
    # 7,297 steps, and 10 B tokens 34,250
    "gpt3-124M": dict(
        T=2048, batch_ramp_tokens=4_000_000_000, warmup_steps=7297, max_steps=34250,
    ),
}  # fmt: skip
RAMP_START = 32768  # tokens per step at the start of a batch ramp (GPT-3, appendix B)

# What makes a run this run: a checkpoint continues only under the same values. `data` is compared
# by content, and `max_steps` may grow.
DEFINING = (
    "seed", "shuffle", "init_from", "n_layer", "n_head", "n_embd", "T", "total_batch_size",
    "batch_ramp_tokens", "optimizer", "schedule", "max_lr", "min_lr", "warmup_steps",
    "weight_decay", "beta1", "beta2", "eps", "grad_clip", "muon_lr", "muon_momentum",
)  # fmt: skip


def check_config(config: Config) -> None:
    """Raises UserError for the first setting that is out of range or contradicts another."""
    c = config
    positive = "n_layer n_head n_embd T total_batch_size max_steps val_tokens sample_tokens"
    positive += " num_samples keep_checkpoints max_bad_steps max_lr eps muon_lr timeout_s"
    for name in positive.split():
        if not 0 < getattr(c, name) < math.inf:
            raise SettingError(f"{name}={getattr(c, name)}: must be above 0 and finite")
    natural = "seed B batch_ramp_tokens min_lr warmup_steps weight_decay beta1 beta2 grad_clip"
    natural += " muon_momentum val_every hellaswag_every hellaswag_examples sample_every"
    natural += " checkpoint_every gpu_hour_usd"
    for name in natural.split():
        if not 0 <= getattr(c, name) < math.inf:
            raise SettingError(f"{name}={getattr(c, name)}: must be 0 or more and finite")
    if c.seed >= 2**64:
        raise SettingError(f"seed={c.seed}: must be below 2**64")
    for name in ("beta1", "beta2", "muon_momentum"):
        if getattr(c, name) >= 1:
            raise SettingError(f"{name}={getattr(c, name)}: must be below 1")
    for name, known in (("optimizer", ("adamw", "muon")), ("schedule", ("cosine", "linear"))):
        if getattr(c, name) not in known:
            raise SettingError(f"{name}={getattr(c, name)!r}: must be {' or '.join(known)}")
    if c.min_lr > c.max_lr:
        raise SettingError(f"min_lr={c.min_lr}: above max_lr={c.max_lr}; give both")
    if c.n_embd % c.n_head:
        raise SettingError(f"n_head={c.n_head}: n_embd={c.n_embd} is no multiple of it")
    if c.total_batch_size % c.T:
        near = max(1, round(c.total_batch_size / c.T)) * c.T
        raise SettingError(
            f"total_batch_size={c.total_batch_size}: not a multiple of T={c.T}; {near} would be"
        )
    if c.batch_ramp_tokens and c.total_batch_size <= RAMP_START:
        raise SettingError(
            f"batch_ramp_tokens={c.batch_ramp_tokens}: a ramp starts at {RAMP_START} tokens, and "
            f"total_batch_size={c.total_batch_size} is not above that; set it to 0"
        )
    if c.val_every and c.val_tokens < c.T:
        raise SettingError(f"val_tokens={c.val_tokens}: less than one window of T={c.T}")
    trackers.check(c.tracker)
    check_system(c)


def check_system(settings) -> None:
    """Raises SettingError where `device` or `dtype` is none."""
    dtype, device = settings.dtype, settings.device
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise SettingError(f"dtype={dtype!r}: must be auto, float32, bfloat16 or float16")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise SettingError(f"device={device!r}: must be auto, cpu, cuda, cuda:N or mps")


# -------------------------------------------------------------------------------------------------
# Model
#
# B rows, T tokens in each, C = n_embd channels, nh heads of size hs = C / nh, V token ids, L layers


@dataclass
class GPTConfig:
    """The shape of a GPT-2."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    tied: bool = True  # the head is the token embedding; False in some models of other programs

    @property
    def rows(self) -> int:
        """Rows of the embedding: vocab_size up to a multiple of 128, which matrix products like."""
        return math.ceil(self.vocab_size / 128) * 128

    @property
    def vocab_weights(self) -> tuple[str, ...]:
        """Names of the parameters that have a row for each id."""
        return ("transformer.wte.weight", "lm_head.weight")[: 1 if self.tied else 2]


class KVCache:
    """Keys and values that one layer made of the tokens so far, in memory that is taken once.

    `add` takes those of the first tokens of a text, then those of one more token at a time.
    """

    def __init__(self, length: int):
        self.length, self.seen = length, 0  # in tokens: the room there is, what is in it
        self.memory = None

    def add(self, k, v):
        """(B, nh, T, hs) each -> those of all tokens so far: (B, nh, seen, hs) each."""
        B, nh, T, hs = k.shape
        if self.memory is None:
            self.memory = k.new_empty(2, B, nh, self.length, hs)
        start, self.seen = self.seen, self.seen + T
        self.memory[0, :, :, start : self.seen] = k
        self.memory[1, :, :, start : self.seen] = v
        return self.memory[:, :, :, : self.seen].unbind()


@functools.cache
def cpu_flags() -> set[str]:
    """The words of /proc/cpuinfo, the processor's features among them; none where it is missing."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


FLASH_IS_SLOW = "avx512_bf16" in cpu_flags() and "amx_bf16" not in cpu_flags()
QUERIES = 256  # in a block of `BlockwiseAttention`


class BlockwiseAttention(torch.autograd.Function):
    """Causal attention for CPUs that multiply bfloat16 fast, when compiled.

    PyTorch's flash kernel for CPUs multiplies at the rate of float32 where there is no AMX, and
    takes twice the time. Here a block of queries sees the keys up to its own last one, and its
    probabilities are kept for the backward pass: B nh T T / 2 numbers in the dtype of q.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        """(B, nh, T, hs) each -> (B, nh, T, hs)."""
        blocks, scale = q.split(QUERIES, dim=2), q.size(3) ** -0.5
        ys, ps, end = [], [], 0
        for q_block in blocks:
            start, end = end, end + q_block.size(2)
            s = (q_block * scale @ k[:, :, :end].transpose(2, 3)).float()
            later = torch.ones(s.shape[2:], dtype=torch.bool, device=q.device).triu(start + 1)
            p = s.masked_fill(later, -math.inf).softmax(dim=3).to(q.dtype)
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
        mean_dp = (dy.float() * y.float()).sum(dim=3, keepdim=True)  # under the probabilities
        for p in ps:
            start, end = end, end + p.size(2)
            dy_block = dy[:, :, start:end]
            dp = dy_block @ v[:, :, :end].transpose(2, 3)
            ds = (p.float() * (dp.float() - mean_dp[:, :, start:end]) * scale).to(q.dtype)
            dqs.append(ds @ k[:, :, :end])
            dk[:, :, :end] += ds.transpose(2, 3) @ q[:, :, start:end]
            dv[:, :, :end] += p.transpose(2, 3) @ dy_block
        return torch.cat(dqs, dim=2), dk, dv


def causal_attention(q, k, v):
    """Each query's mean of the values up to its own place: (B, nh, T, hs) each -> the same."""
    if torch.compiler.is_compiling() and FLASH_IS_SLOW and q.size(2) > QUERIES:
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            return BlockwiseAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class CausalSelfAttention(nn.Module):
    """Each position mixes what it and the positions before it offer: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in (q, k, v))
        if cache is not None:
            k, v = cache.add(k, v)
        if mask is None and k.size(2) == T:
            y = causal_attention(q, k, v)  # (B, nh, T, hs)
        else:  # without a mask one token, which sees all before it
            y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Each position thinks by itself: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: token and position embeddings, L blocks, a norm, and a head tied to the embedding.

    The embedding has spare rows (`GPTConfig.rows` instead of `vocab_size`) that no result contains.
    There is no dropout, so training and evaluation mode are the same function.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.rows, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.rows, bias=False)
        self.tie()
        self.init_weights()

    def tie(self) -> None:
        """Makes the head the token embedding, if it is to be."""
        if self.config.tied:
            self.lm_head.weight = self.transformer.wte.weight

    def init_weights(self) -> None:
        """N(0, 0.02), biases 0, and what adds to the residual stream smaller by sqrt(2 L)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(parameter, mean=0.0, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def num_parameters(self) -> int:
        """Parameters of the model, spare embedding rows left out: 124,439,808 for GPT-2 124M."""
        spare = sum(rows.numel() for rows in self.spare_rows().values())
        return sum(parameter.numel() for parameter in self.parameters()) - spare

    def spare_rows(self) -> dict[str, torch.Tensor]:
        """{parameter: its rows from vocab_size on}, which `save_pretrained` leaves out."""
        c = self.config
        rows = {name: self.get_parameter(name)[c.vocab_size :] for name in c.vocab_weights}
        return {name: spare.detach().clone() for name, spare in rows.items()}

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations that training spends on one token of a row of T.

        6 per parameter of a matrix product (the tied embedding counts once, as the head), and
        6 L C T for causal attention: half of the T x T scores, forward and backward.
        """
        c = self.config
        return 6 * (12 * c.n_layer * c.n_embd**2 + c.rows * c.n_embd) + 6 * c.n_layer * c.n_embd * T

    def hidden(self, idx, position=None, mask=None, caches=None):
        """What the head reads: token ids (B, T) -> (B, T, C).

        position: int64 (B, T), where each token stands; by default one after the other
        mask: bool (B, 1, T, T), which tokens (last) each sees; by default itself and those before
        caches: a `KVCache` for each layer, which holds the tokens before `idx` and gets `idx`
        """
        if position is None:
            start = caches[0].seen if caches else 0
            position = torch.arange(start, start + idx.size(1), device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)
        for i, block in enumerate(self.transformer.h):
            x = block(x, mask, caches[i] if caches else None)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Scores of the next token: (..., C) -> (..., vocab_size), so without the spare rows."""
        return self.lm_head(x)[..., : self.config.vocab_size]

    def forward(self, idx, targets=None):
        """(logits (B, T, vocab_size), mean loss in nats or None): the textbook form.

        idx, targets: int64 (B, T); targets of `IGNORE` count for nothing.
        The training loop gets the same loss and gradient from `TrainingModel`, in less memory.
        """
        logits = self.logits(self.hidden(idx))
        if targets is None:
            return logits, None
        flat = logits.float().flatten(0, 1)
        return logits, F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, **more):
        """`idx` (B, T) continued by up to `max_new_tokens` ids: int64 (B, T + max_new_tokens).

        The settings are those of `stream`.
        """
        settings = dict(temperature=temperature, top_k=top_k, generator=generator, **more)
        return torch.cat((idx, *self.stream(idx, max_new_tokens, **settings)), dim=1)

    @torch.no_grad()
    def stream(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None,
        stop=None, slide=1,
    ):  # fmt: skip
        """Yields the ids that continue `idx` (B, T), one for each row at a time: int64 (B, 1).

        temperature, top_k, top_p, generator: of `sample_ids`
        stop: an id, such as <|endoftext|>'s, after which a row has only that id; ends when all have
        slide: the model sees the last block_size ids; so many of the first ones are dropped at once
            when there are more. With 1 it sees as much as it can, but each id from there on costs
            a whole forward pass, since all positions shift.
        """
        size = self.config.block_size
        seen = new = idx[:, -size:]
        length = min(size, seen.size(1) + max_new_tokens)
        caches = [KVCache(length) for _ in self.transformer.h]
        stopped = torch.zeros_like(seen[:, :1], dtype=torch.bool)
        for _ in range(max_new_tokens):
            x = self.hidden(new, caches=caches)[:, -1]
            new = sample_ids(self.logits(x).float(), temperature, top_k, top_p, generator)
            if stop is not None:
                new = new.masked_fill(stopped, stop)
                stopped |= new == stop
            yield new
            if stop is not None and stopped.all():
                return
            seen = torch.cat((seen, new), dim=1)
            if seen.size(1) > size:
                seen = new = seen[:, slide:]
                for cache in caches:
                    cache.seen = 0

    def save_pretrained(self, directory) -> None:
        """Writes a directory that `AutoModelForCausalLM` and `AutoTokenizer` open."""
        c = self.config
        shape = dict(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd,
            n_layer=c.n_layer, n_head=c.n_head, tie_word_embeddings=c.tied,
        )  # fmt: skip
        weights = {name: p for name, p in self.named_parameters()}
        for name in c.vocab_weights:
            weights[name] = weights[name][: c.vocab_size]
        Path(directory).mkdir(parents=True, exist_ok=True)
        huggingface.save(directory, shape, weights)

    @classmethod
    def from_pretrained(cls, source: str, block_size: int | None = None) -> "GPT":
        """The GPT-2 of a Hugging Face directory or Hub name (`huggingface.load`), in float32.

        block_size: keep only so many positions. The spare embedding rows are zero.
        """
        shape, weights = huggingface.load(str(source))
        positions, tied = shape.pop("n_positions"), shape.pop("tie_word_embeddings")
        if block_size is not None and block_size > positions:
            raise UserError(f"T={block_size}: {source} has only {positions} positions")
        config = GPTConfig(block_size=block_size or positions, tied=tied, **shape)
        spare = (0, 0, 0, config.rows - config.vocab_size)
        for name in config.vocab_weights:
            weights[name] = F.pad(weights[name], spare)
        if tied:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]
        wpe = weights["transformer.wpe.weight"]
        weights["transformer.wpe.weight"] = wpe[: config.block_size]
        with torch.device("meta"), WithoutInit():
            model = cls(config)
        model = model.to_empty(device="cpu")
        model.tie()
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{source}: not this GPT-2: {error}") from None
        return model

    def not_finite(self) -> str | None:
        """The name of a parameter that holds a NaN or an infinity, if there is one."""
        found = (n for n, p in self.named_parameters() if not torch.isfinite(p).all())
        return next(found, None)


class WithoutInit(torch.overrides.TorchFunctionMode):
    """Leaves out all of `torch.nn.init`: a second that a model about to be loaded does not need."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def sample_ids(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """An id for each row of `logits` (B, V): int64 (B, 1).

    temperature: 0 takes the likeliest id; top_k: only among so many
    top_p: only among the likeliest ones that together have this probability
    generator: a torch.Generator, or one for each row: then a row has the same ids in any batch
    """
    if temperature == 0:
        return logits.argmax(dim=1, keepdim=True)
    ids = None
    if top_k is not None:  # in the order of ids, so that no last digit of a logit moves them
        ids = logits.topk(min(top_k, logits.size(1))).indices.sort(dim=1).values
        logits = logits.gather(1, ids)
    p = F.softmax(logits / temperature, dim=1)
    if top_p is not None:
        falling, order = p.sort(dim=1, descending=True)
        others = falling.cumsum(dim=1) - falling >= top_p
        p = p.masked_fill(others.scatter(1, order, others), 0.0)
    if isinstance(generator, list):
        rows = zip(p.split(1), generator, strict=True)
        chosen = torch.cat([torch.multinomial(row, 1, generator=g) for row, g in rows])
    else:
        chosen = torch.multinomial(p, 1, generator=generator)
    return chosen if ids is None else ids.gather(1, chosen)


# -------------------------------------------------------------------------------------------------
# Loss: head and cross-entropy in chunks of rows, so that the (B * T, V) logits never exist at once

IGNORE = -1  # a target that counts for nothing
CHUNK = {"cpu": 1024, "mps": 1024, "cuda": 8192}  # rows of logits at a time


def softmax_loss(logits, targets, vocab_size: int):
    """(summed loss, float32; its gradient at the logits, in their dtype and perhaps their memory).

    logits (N, V) of which the columns from vocab_size on are spare; targets int64 (N,)
    """
    z = logits.float()
    z[:, vocab_size:] = -math.inf  # probability and gradient of a spare id: exactly 0
    normalizer = z.logsumexp(dim=1)
    counts = targets != IGNORE
    column = targets.clamp(min=0)[:, None]
    target = z.gather(1, column)[:, 0]
    loss = torch.where(counts, normalizer - target, 0.0).sum()
    normalizer = torch.where(counts, normalizer, math.inf)  # an ignored row: all probabilities 0
    gradient = z.sub_(normalizer[:, None]).exp_().to(logits.dtype)
    at_target = (target - normalizer).exp() - counts.float()
    return loss, gradient.scatter_(1, column, at_target.to(gradient.dtype)[:, None])


def softmax_loss_only(logits, targets, vocab_size: int):
    """The first result of `softmax_loss`."""
    z = logits.float()
    z[:, vocab_size:] = -math.inf
    target = z.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets != IGNORE, z.logsumexp(dim=1) - target, 0.0).sum()


@functools.cache
def chunk_rows(n: int, most: int) -> int:
    """The largest divisor of `n` up to `most`: equal chunks are one shape to compile."""
    return max(rows for rows in range(1, min(n, most) + 1) if n % rows == 0)


def product_dtype(x) -> torch.dtype:
    """The dtype of matrix products on x's device: autocast's, or x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of `x @ weight.T`, whose gradients are made in the forward pass.

    The logits of a chunk are turned into their gradient where they lie and used at once, so that
    nothing of size V is kept for the backward pass. (Liger-Kernel's idea, in plain PyTorch.)
    """

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softmax_loss):
        """x (N, C), weight (V, C), targets int64 (N,) -> float32 scalar, in nats."""
        dtype = product_dtype(x)
        w = weight.to(dtype)
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        loss = torch.zeros((), device=x.device)
        rows = chunk_rows(len(x), CHUNK[x.device.type])
        for x_chunk, dx_chunk, target in zip(x.split(rows), dx.split(rows), targets.split(rows)):
            x_chunk = x_chunk.to(dtype)
            chunk_loss, gradient = softmax_loss(x_chunk @ w.T, target, vocab_size)
            loss += chunk_loss
            dx_chunk.copy_(gradient @ w)
            dw += gradient.T @ x_chunk
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None, None


class TrainingModel(nn.Module):
    """What training runs, compiled or not: token ids in, summed loss out. Shares all parameters.

    `model` itself stays uncompiled, for saving, sampling and whatever has odd shapes. Training and
    validation compile functions of their own, so that neither ever recompiles the other.
    """

    def __init__(self, model: GPT, compiled: bool):
        super().__init__()
        self.model = model
        self.use(compiled)

    def use(self, compiled: bool) -> None:
        """Switches between compiled and eager."""

        def hidden(idx):
            return self.model.hidden(idx)

        def hidden_for_validation(idx):
            return self.model.hidden(idx)

        maybe = functools.partial(torch.compile, dynamic=False) if compiled else lambda f: f
        self.compiled = compiled
        self.hidden, self.hidden_for_validation = maybe(hidden), maybe(hidden_for_validation)
        self.softmax_loss = maybe(softmax_loss)
        self.softmax_loss_only = maybe(softmax_loss_only)

    def forward(self, idx, targets):
        """Loss in nats, summed over the targets that count: int64 (B, T) each -> float32 scalar."""
        return self.loss(self.hidden(idx), targets)

    def loss(self, x, targets):
        """The same by what the head reads: (B, T, C)."""
        x = x.flatten(0, 1)
        weight, vocab_size = self.model.lm_head.weight, self.model.config.vocab_size
        return HeadLoss.apply(x, weight, targets.flatten(), vocab_size, self.softmax_loss)

    @torch.no_grad()
    def evaluate(self, idx, targets):
        """The same loss, without gradients."""
        x = self.hidden_for_validation(idx).flatten(0, 1)
        x = x.to(product_dtype(x))
        w, rows = self.model.lm_head.weight.to(x.dtype), chunk_rows(len(x), CHUNK[x.device.type])
        losses = [
            self.softmax_loss_only(x_chunk @ w.T, target, self.model.config.vocab_size)
            for x_chunk, target in zip(x.split(rows), targets.flatten().split(rows))
        ]
        return torch.stack(losses).sum()


# -------------------------------------------------------------------------------------------------
# Optimizer and schedule


class Muon(torch.optim.Muon):
    """PyTorch's Muon, but several matrices may stand in one weight, and the processes share them.

    A parameter group says how many matrices its weights hold, one above the other: `parts`. Each
    process orthogonalizes a share of all matrices and has the rest from the others; every process
    has every momentum, which costs little and is the same in all.
    """

    @torch.no_grad()
    def step(self) -> None:
        self.matrices = []
        super().step()
        if dist.is_initialized():
            owners = itertools.cycle(range(dist.get_world_size()))
            sent = [dist.broadcast(m, next(owners), async_op=True) for m in self.matrices]
            for work in sent:
                work.wait()

    def _init_group(self, group, params, grads, momenta):
        result = super()._init_group(group, params, grads, momenta)
        lists = params, grads, momenta
        split = [[part for t in tensors for part in t.chunk(group["parts"])] for tensors in lists]
        for tensors in lists:
            tensors.clear()
        rank, world_size = 0, 1
        if dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        for matrix, grad, momentum in zip(*split):
            if len(self.matrices) % world_size == rank:
                for tensors, tensor in zip(lists, (matrix, grad, momentum)):
                    tensors.append(tensor)
            else:  # another process's
                momentum.lerp_(grad, 1 - group["momentum"])
            self.matrices.append(matrix)
        return result


class MuonAndAdamW:
    """Two optimizers as one, so far as `train_step`, GradScaler and checkpoints need it."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.both = {"muon": muon, "adamw": adamw}

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.both.values() for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.both.values():
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.both.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {name: optimizer.state_dict() for name, optimizer in self.both.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, optimizer in self.both.items():
            optimizer.load_state_dict(state[name])


def configure_optimizer(model: GPT, config: Config, device_type: str):
    """AdamW, fused, or `MuonAndAdamW`: Muon has the matrices of the blocks, AdamW what is left.

    Weight decay is for the tensors of 2 or more dimensions only.
    """
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if config.optimizer == "muon" and ".h." in name and p.dim() == 2
    }
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups,
        lr=config.max_lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device_type in ("cuda", "cpu", "mps"),
    )
    if not matrices:
        return adamw
    groups = [  # the MLP's are larger: first, so that processes that take turns have alike much
        {"params": [p for name, p in matrices.items() if ".mlp." in name], "parts": 1},
        {"params": [p for name, p in matrices.items() if "attn.c_proj" in name], "parts": 1},
        {"params": [p for name, p in matrices.items() if "attn.c_attn" in name], "parts": 3},
    ]
    muon = Muon(
        groups,
        lr=config.muon_lr,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
    )
    for group in muon.param_groups:  # on the schedule of max_lr
        group["lr_scale"] = config.muon_lr / config.max_lr
    return MuonAndAdamW(muon, adamw)


def get_lr(step: int, config: Config) -> float:
    """The learning rate of a step: linear warm-up, then `schedule` from max_lr to min_lr."""
    c = config
    if step < c.warmup_steps:
        return c.max_lr * (step + 1) / c.warmup_steps
    if step >= c.max_steps:
        return c.min_lr
    progress = (step - c.warmup_steps) / (c.max_steps - c.warmup_steps)
    left = 1 - progress if c.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return c.min_lr + left * (c.max_lr - c.min_lr)


def batch_rows(position: int, config: Config) -> int:
    """The rows (windows of T tokens) of the step that begins at row `position` of the stream."""
    full, tokens = config.total_batch_size, position * config.T
    if tokens < config.batch_ramp_tokens:
        full = RAMP_START + (full - RAMP_START) * tokens // config.batch_ramp_tokens
    return max(1, full // config.T)


# -------------------------------------------------------------------------------------------------
# Data: one stream of windows, the same for any number of processes
#
#   tokens of all shards, in order:  0 1 2 3 4 5 6 7 8 9 ...
#   window 0 (T = 4):                0 1 2 3 4              inputs 0..3, targets 1..4
#   window 1:                                4 5 6 7 8      inputs 4..7, targets 5..8
#
# Row r of the stream is window r of its epoch, after that epoch's permutation; a step takes the
# next `batch_rows` rows, and each process a contiguous part of them.


class TokenStream:
    """The tokens of one split, as if its shards were one array. Shards are memory-mapped."""

    def __init__(self, shards: list[np.ndarray], names: list[str]):
        self.shards, self.names = shards, names
        self.starts = np.cumsum([0] + [len(shard) for shard in shards])
        self.mapped = [isinstance(shard, np.memmap) for shard in shards]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), which may lie in several shards.

        Raises UserError where the file of one is gone or shorter than it was.
        """
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        pieces = []
        while start < stop:
            if self.mapped[first]:
                self.check_file(first)
            end = min(stop, int(self.starts[first + 1]))
            pieces.append(self.shards[first][start - self.starts[first] : end - self.starts[first]])
            start, first = end, first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def check_file(self, shard: int) -> None:
        """Raises UserError where reading on would be the end without a word: SIGBUS."""
        mapped = self.shards[shard]
        try:
            size = os.stat(mapped.filename).st_size
        except OSError as error:
            size, problem = 0, error.strerror
        else:
            problem = f"{size:,} bytes"
        if size < mapped.offset + mapped.nbytes:
            raise UserError(
                f"{self.names[shard]}: {problem}, but {mapped.offset + mapped.nbytes:,} bytes when "
                "the run began; put it back and run the same command again"
            )

    def name_of(self, position: int) -> str:
        """The file that token `position` comes from."""
        return self.names[int(np.searchsorted(self.starts, position, side="right")) - 1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the length and of 16 M tokens in 1,024 places, or of all if there are less."""
        digest = hashlib.sha256(str(len(self)).encode())
        distance = math.ceil(len(self) / 1024)
        for start in range(0, len(self), max(1, distance)):
            end = min(start + min(distance, 16384), len(self))
            digest.update(self.read(start, end).astype("<u2").tobytes())
        return digest.hexdigest()[:16]


def open_shard(path: Path) -> np.ndarray:
    """A memory-mapped uint16 array of a `.npy` shard (numpy's) or a `.bin` one (llm.c's)."""
    try:
        if path.suffix == ".npy":
            shard = np.lib.format.open_memmap(path, mode="r")
        else:
            header = np.fromfile(path, dtype="<i4", count=256)
            if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
                raise ValueError("no llm.c shard (256 int32, magic 20240520, version 1)")
            if path.stat().st_size != 1024 + 2 * int(header[2]):
                raise ValueError(f"truncated: its header promises {int(header[2]):,} tokens")
            shard = np.memmap(path, dtype="<u2", mode="r", offset=1024)
    except Exception as error:  # numpy's parser of a damaged header raises anything
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a whole shard: {reason}; make it again") from None
    if shard.dtype != np.uint16 or shard.ndim != 1:
        raise UserError(
            f"{path}: {shard.dtype} of {shard.ndim} dimensions, and not uint16 of one; "
            "a shard of another program?"
        )
    return shard


def find_data(data: str) -> Path:
    """A path as given, or, where a relative one is not there, beside this file."""
    beside = Path(__file__).resolve().parent / data
    return beside if not Path(data).exists() and beside.exists() else Path(data)


WAYS_OUT = (
    'run "python fineweb.py" for the real data, or "python train_gpt2.py tiny" to see a GPT learn'
)


def open_tokens(data: str) -> tuple[TokenStream, TokenStream]:
    """(training, validation) tokens of a directory of shards or of a text file."""
    path = find_data(data)
    if path.is_file() and path.suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"{path}: {error}; a UTF-8 text file is needed") from None
        tokens = np.array(tokenizer.get_encoding().encode_ordinary(text), dtype=np.uint16)
        cut = len(tokens) * 9 // 10
        return TokenStream([tokens[:cut]], [str(path)]), TokenStream([tokens[cut:]], [str(path)])
    if path.is_file():
        raise SettingError(f"data={data!r}: neither a directory of shards nor a .txt file")
    if not path.is_dir():
        raise SettingError(f"data={data!r}: no such directory or file; {WAYS_OUT}")
    token_shards.read_manifest(path)  # where there is one, all that it lists must be here
    streams = []
    shards = sorted(f for f in path.iterdir() if f.suffix in token_shards.SUFFIXES)
    for split, other in (("train", "val"), ("val", "train")):
        files = [f for f in shards if split in f.name]
        if both := [f for f in files if other in f.name]:
            raise SettingError(f"{both[0]}: named both train and val; rename it")
        if not files:
            raise SettingError(
                f"data={data!r}: no shards (.npy, .bin) with {split!r} in the name; {WAYS_OUT}"
            )
        streams.append(TokenStream([open_shard(f) for f in files], [str(f) for f in files]))
    return streams[0], streams[1]


def check_shards(config: Config, processes: "Processes") -> None:
    """Compares the shards with the hashes in their manifest, if there is one: each process a part.

    Raises SettingError, in all of them, where a shard was altered.
    """
    path = find_data(config.data)
    if config.check_data and path.is_dir() and (manifest := token_shards.read_manifest(path)):
        start, shards = time.perf_counter(), manifest["shards"]
        altered = torch.zeros(len(shards))
        mine = range(processes.rank, len(shards), processes.world_size)
        for i, whole in zip(mine, token_shards.are_whole(path, [shards[i] for i in mine])):
            altered[i] = not whole
        altered = processes.sum(altered.to(processes.device))
        if altered.any():
            file = path / shards[int(altered.nonzero()[0])]["file"]
            raise SettingError(f"{file}: altered (SHA-256); {token_shards.AGAIN}")
        seconds = time.perf_counter() - start
        processes.say(f"{config.data}: {len(shards)} shards are as made ({seconds:.1f} s)")


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a random permutation of range(n), fixed by (seed, epoch), takes each index.

    A Feistel network: swap and mix the halves of the index's bits, eight times; a result of n or
    more goes round again, so that range(n) maps onto itself. It needs no memory however large n is,
    and no state to resume. (Black and Rogaway 2002, "Ciphers with arbitrary finite domains".)
    """
    keys = np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(8, np.uint64)
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = index.astype(np.uint64)
    todo = np.ones(len(result), dtype=bool)
    while todo.any():
        left, right = result[todo] >> half, result[todo] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64's finalizer
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed >> np.uint64(31)) & mask)
        result[todo] = (left << half) | right
        todo = result >= n
    return result.astype(np.int64)


class DataLoaderLite:
    """Serves this process's share of the one global stream of windows, a step at a time.

    A micro-batch has B rows (fewer early in a batch ramp); what a process's share leaves over of
    them is filled up with `IGNORE`.
    """

    def __init__(
        self,
        tokens: TokenStream,
        B: int,
        T: int,
        process_rank: int = 0,
        num_processes: int = 1,
        rows_at=None,
        shuffle: bool = False,
        seed: int = 0,
        vocab_size: int = tokenizer.VOCAB_SIZE,
    ):
        """rows_at(position): rows of the step that begins at row `position`; default: B each."""
        self.tokens, self.B, self.T, self.vocab_size = tokens, B, T, vocab_size
        self.rank, self.num_processes = process_rank, num_processes
        self.rows_at = rows_at or (lambda position: num_processes * B)
        self.shuffle, self.seed = shuffle, seed
        self.windows = (len(tokens) - 1) // T
        self.position = 0  # rows of the stream served so far
        self.pool, self.ahead = ThreadPoolExecutor(max_workers=1), None

    @property
    def epoch(self) -> int:
        """Of the next row, counted from 0."""
        return self.position // self.windows

    def windows_of(self, rows: np.ndarray) -> np.ndarray:
        """The windows that rows of the global stream hold."""
        if not self.shuffle:
            return rows % self.windows
        epochs, windows = np.divmod(rows, self.windows)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = permute(windows[here], self.windows, self.seed, int(epoch))
        return windows

    def micro_batch(self, rows: int) -> int:
        """Rows of a micro-batch in a step of `rows` rows: as few as will do, but B or a power of
        two, since each size is compiled once."""
        share = math.ceil(rows / self.num_processes)
        needed = math.ceil(share / math.ceil(share / self.B))
        return min(self.B, 1 << (needed - 1).bit_length())

    def batch(self, first: int, rows: int, B: int | None = None):
        """This process's share of rows [first, first + rows): x, y int64 (micro-steps, B, T).

        Raises UserError for a token id that the model does not have.
        """
        B = B or self.B
        begin, end = (first + rows * r // self.num_processes for r in (self.rank, self.rank + 1))
        micro_steps = math.ceil(math.ceil(rows / self.num_processes) / B)
        x = np.zeros((micro_steps * B, self.T), dtype=np.int64)
        y = np.full_like(x, IGNORE)
        for i, window in enumerate(self.windows_of(np.arange(begin, end))):
            start = int(window) * self.T
            row = self.tokens.read(start, start + self.T + 1)
            if row.max() >= self.vocab_size:
                at = start + int(row.argmax())
                raise UserError(
                    f"{self.tokens.name_of(at)}: token id {row.max()} at token {at} of the split; "
                    f"the model has {self.vocab_size}: not tokenized with GPT-2's tokenizer?"
                )
            x[i], y[i] = row[:-1], row[1:]
        batch = [torch.from_numpy(a).view(micro_steps, B, self.T) for a in (x, y)]
        return [a.pin_memory() for a in batch] if torch.cuda.is_available() else batch

    def next_step(self):
        """(x, y, rows): as `batch`, for the next step; the one after is prepared meanwhile."""
        rows, ahead = self.rows_at(self.position), self.ahead or self.prepare()
        x, y = ahead.result()
        self.position += rows
        self.ahead = self.prepare()
        return x, y, rows

    def prepare(self):
        """The future of the batch at the present position."""
        rows = self.rows_at(self.position)
        return self.pool.submit(self.batch, self.position, rows, self.micro_batch(rows))


# -------------------------------------------------------------------------------------------------
# Devices and processes


@dataclass
class Processes:
    """Where this process stands among all, and what it computes on."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products; float32 means no autocast

    @property
    def runs_ahead(self) -> bool:
        """Whether the device may still be computing what a call has returned."""
        return self.device.type == "cuda"

    def autocast(self):
        """A context in which matrix products are in `dtype`."""
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )

    def say(self, line: str, bold: bool = False) -> None:
        """Prints a line, on the first process: above the progress bar, if there is one.

        bold: on a terminal, where that is not unwanted (no-color.org)
        """
        if self.rank > 0:
            return
        if bold and sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            line = f"\033[1m{line}\033[0m"
        tqdm.write(line)
        sys.stdout.flush()

    def sum(self, tensor):
        """The sum of `tensor` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def barrier(self) -> None:
        """Returns when all processes have come here."""
        if self.world_size > 1:
            dist.barrier()


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device of a process, by the setting `device`. Raises UserError where it is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    device = torch.device(name)
    if device.type == "mps" and not mps:
        raise SettingError("device='mps': not on this machine; --device=cpu runs anywhere")
    if device.type == "cuda":
        if not cuda:
            raise SettingError(
                f"device={name!r}: torch {torch.__version__} sees no CUDA device here; "
                "--device=cpu runs anywhere"
            )
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(
                f"device='cuda:{index}': this machine has {torch.cuda.device_count()} CUDA "
                "devices; start fewer processes, or name another"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: bfloat16 where the device multiplies in it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    if device.type == "cpu":
        # Without units for it, bfloat16 is many times slower than float32 (pytorch#118499).
        fast = cpu_flags() & {"avx512_bf16", "amx_bf16"}
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16


def keep_freed_memory() -> None:
    """Has glibc keep the memory of freed tensors for the next ones.

    By default it returns large blocks to the kernel, which maps and clears them page by page when
    the next tensor needs them: a third of the time of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, in bytes
            mallopt(parameter, 2**31 - 1)


def set_up_processes(config: Config) -> Processes:
    """Joins the process group that torchrun set up, if any, and picks device and dtype."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "mps" and world_size > 1:
        raise SettingError("device='mps': one process only; start several with --device=cpu")
    if world_size > 1 and not dist.is_initialized():
        distributed.join(rank, world_size, device, config.timeout_s)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    elif device.type == "cpu":
        keep_freed_memory()
    return Processes(rank, world_size, device, pick_dtype(config.dtype, device))


# Dense bfloat16 or float16 peaks of the datasheets, in TFLOP/s; the first name that fits counts.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "GH200": 989.5, "H200": 989.5, "H100 PCIe": 756, "H100 NVL": 835,
    "H100": 989.5, "H800": 989.5, "H20": 148, "A100": 312, "A800": 312, "L40S": 362, "L40": 181,
    "L4": 121, "A40": 149.7, "A30": 165, "A10G": 70, "A10": 125, "RTX A6000": 154.8,
    "RTX 6000 Ada": 364.2,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Floating-point operations per second that a GPU of this name could do; None if unknown."""
    if dtype == torch.float32:
        return None
    for name, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return 1e12 * tflops
    return None


def fits(model: GPT, B: int, T: int, processes: Processes) -> bool:
    """Whether one forward and backward pass of B rows fits, next to AdamW's two moments."""
    moments = None
    try:
        moments = [torch.empty_like(p) for p in model.parameters() for _ in range(3)]  # + buckets
        idx = torch.zeros((B, T), dtype=torch.int64, device=processes.device)
        with processes.autocast():
            loss = TrainingModel(model, compiled=False)(idx, idx)
        loss.backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        del moments
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def pick_B(config: Config, model: GPT, processes: Processes) -> int:
    """Rows of a micro-batch: at most the setting B, and as even as can be (171 rows at B = 64 go as
    3 x 57, not 64 + 64 + 43).

    B = 0 means, on a GPU, the largest power of two that fits, of at most 65,536 tokens; elsewhere
    4,096 tokens, since more make no CPU faster.
    """
    rows = math.ceil(config.total_batch_size // config.T / processes.world_size)
    if config.B:
        most = config.B
    elif processes.device.type != "cuda":
        most = max(1, 4096 // config.T)
    else:
        most = 1 << max(0, (65536 // config.T).bit_length() - 1)
        while most > 1 and not fits(model, most, config.T, processes):
            most //= 2
        smallest = torch.tensor(most, device=processes.device)
        if processes.world_size > 1:
            dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        most = int(smallest)
    return math.ceil(rows / math.ceil(rows / most))


def warm_up(training_model, ddp_model, B: int, T: int, processes: Processes) -> None:
    """Compiles the training and the validation step on a dummy batch; on failure goes eager."""
    if not training_model.compiled:
        return
    started = time.perf_counter()
    idx = torch.zeros((B, T), dtype=torch.int64, device=processes.device)
    problem = ""
    try:
        with without_sync(ddp_model), processes.autocast():
            loss = ddp_model(idx, idx)
            loss.backward()
        with processes.autocast():
            training_model.evaluate(idx, idx)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split("\n")[:2])
    training_model.zero_grad(set_to_none=True)
    failures = processes.sum(torch.tensor(float(bool(problem)), device=processes.device))
    if failures > 0:
        training_model.use(compiled=False)
        processes.say(f"torch.compile failed, going on without it: {problem or 'on another rank'}")
    else:
        processes.say(f"compiled in {time.perf_counter() - started:.0f} s")


def without_sync(model):
    """DDP's no_sync, or nothing where there is one process."""
    return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()


# -------------------------------------------------------------------------------------------------
# Validation and samples


def validation_loss(
    model: TrainingModel, loader: DataLoaderLite, rows: int, processes, check=lambda: None
) -> float:
    """Mean loss per token, in nats, over the first `rows` windows: every process does a share.

    check: called before each batch, in all processes alike; may raise to end it
    """
    losses = []
    step_rows = loader.B * processes.world_size
    for first in range(0, rows, step_rows):
        check()
        x, y = loader.batch(first, min(step_rows, rows - first))
        x, y = (a[0].to(processes.device, non_blocking=True) for a in (x, y))
        with processes.autocast():
            losses.append(model.evaluate(x, y))
    total = torch.stack(losses).cpu().double().sum()
    if processes.device.type == "cuda":
        total = total.to(processes.device)
    return processes.sum(total).item() / (rows * loader.T)


def load_hellaswag(
    config: Config, processes: Processes, vocab_size: int = tokenizer.VOCAB_SIZE
) -> list[hellaswag.Question]:
    """The questions to score, the same on all processes; none where one of them has none."""
    if config.hellaswag_every == 0:
        return []
    if vocab_size < tokenizer.VOCAB_SIZE:
        processes.say(f"HellaSwag is left out: the model has {vocab_size:,} tokens, too few for it")
        return []
    data = str(find_data(config.hellaswag_data)) if config.hellaswag_data else None
    questions = hellaswag.load_questions(data, config.hellaswag_examples, processes.say)
    ready = processes.sum(torch.tensor(float(bool(questions)), device=processes.device)).item()
    if questions and ready < processes.world_size:
        processes.say("HellaSwag is left out: not all nodes have its data")
    return questions if ready == processes.world_size else []


def samples(model: GPT, config: Config, processes: Processes, check=lambda: None) -> list[str]:
    """`num_samples` continuations of `sample_prompt`, the same for any number of processes.

    check: called before each, as in `validation_loss`
    """
    encoding = tokenizer.get_encoding()
    prompt = encoding.encode_ordinary(config.sample_prompt) or [encoding.eot_token]
    texts = {}
    for first in range(0, config.num_samples, processes.world_size):
        check()
        i = first + processes.rank
        if i >= config.num_samples:
            continue
        generator = torch.Generator(device=processes.device).manual_seed(42 + i)
        idx = torch.tensor([prompt], device=processes.device)
        with processes.autocast():
            idx = model.generate(idx, config.sample_tokens, top_k=50, generator=generator)
        texts[i] = encoding.decode(idx[0].tolist())
    if processes.world_size > 1:
        parts = [None] * processes.world_size
        dist.all_gather_object(parts, texts)
        texts = {i: text for part in parts for i, text in part.items()}
    return [texts[i] for i in sorted(texts)]


# -------------------------------------------------------------------------------------------------
# Log and checkpoints


def save_checkpoint(run: "Run") -> None:
    """Writes `step_NNNNN/` on the first process, and removes the checkpoints no longer kept.

    Raises SettingError, and writes nothing, where a weight is not finite; UserError where there is
    no room.
    """
    log_dir, step = Path(run.config.log_dir), run.step
    if name := run.model.not_finite():
        raise SettingError(
            f"max_lr={run.config.max_lr}: {name} is not finite after step {step - 1}, so it is not "
            f"saved; {last_checkpoint(log_dir)}; try a lower one in another --log_dir"
        )
    run.processes.barrier()
    if run.processes.rank == 0:
        run.tracker.flush()
        state = {
            "step": step,
            "position": run.loader.position,
            "bad_steps": run.bad_steps,
            "settings": dataclasses.asdict(run.config),
            "data": run.loader.tokens.fingerprint,
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "spare_rows": run.model.spare_rows(),
            "rng": {"cpu": torch.get_rng_state()},
        }
        if run.processes.device.type == "cuda":
            state["rng"]["cuda"] = torch.cuda.get_rng_state()

        def fill(directory: Path) -> None:
            run.model.save_pretrained(directory)
            torch.save(state, directory / "train_state.pt")

        try:
            checkpoint.write_directory(log_dir / f"step_{step:05d}", fill)
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk has all three
            kept = ", ".join(path.name for path in checkpoint.list_checkpoints(log_dir).values())
            raise UserError(
                f"log_dir={str(log_dir)!r}: the checkpoint of step {step} could not be written "
                f"({str(error).strip()}); make room and run the same command again "
                f"(whole checkpoints: {kept or 'none'})"
            ) from None
        run.processes.say(f"step {step:5d} | saved {log_dir / f'step_{step:05d}'}")
        prune(run)
    run.processes.barrier()
    run.saved_step = step


def prune(run: "Run") -> None:
    """Removes the checkpoints that are no longer kept."""
    log_dir = run.log.path.parent
    best = run.log.best(checkpoint.list_checkpoints(log_dir))
    checkpoint.prune(log_dir, run.step, run.config.keep_checkpoints, best)


def last_checkpoint(log_dir: Path) -> str:
    """A few words on the newest checkpoint, for an error."""
    steps = list(checkpoint.list_checkpoints(log_dir))
    return f"the last good checkpoint is {f'step_{steps[-1]:05d}' if steps else 'none'}"


def load_train_state(directory: Path) -> dict:
    """`train_state.pt` of a checkpoint, read without running any code that may be in it."""
    path = directory / "train_state.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: cannot be read ({reason}); remove {directory}") from None


# -------------------------------------------------------------------------------------------------
# One training step


@dataclass
class Run:
    """All that a run in progress consists of."""

    config: Config
    processes: Processes
    model: GPT  # the raw model: saved, sampled from
    training_model: TrainingModel  # the same parameters, perhaps compiled
    ddp_model: nn.Module  # the same again, in DDP where there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: DataLoaderLite
    log: RunLog
    progress: Progress
    curves: Curves
    tracker: trackers.Nothing = dataclasses.field(default_factory=trackers.Nothing)
    step: int = 0  # steps done
    saved_step: int = 0  # of them, as many are in a checkpoint
    bad_steps: int = 0  # non-finite steps in a row


def train_step(run: Run, lr: float, stop_row, check=lambda: None):
    """One step of the optimizer over all processes; with AdamW on CUDA the host waits for nothing.

    Returns a float32 tensor: mean loss in nats, norm of the gradient before clipping, and the sum
    over the processes of `stop_row`. Where loss or norm is not finite, weights and optimizer stay
    as they were, on all processes alike. check: called before each micro-step; where it raises
    Stopped, the step was never begun.
    """
    config, processes, optimizer, scaler = run.config, run.processes, run.optimizer, run.scaler
    position = run.loader.position
    x, y, rows = run.loader.next_step()
    x, y = (a.to(processes.device, non_blocking=True) for a in (x, y))
    tokens = rows * config.T
    loss_sum = torch.zeros((), device=processes.device)
    for micro_step in range(len(x)):
        try:
            check()
        except Stopped:
            run.loader.position = position
            raise
        last = micro_step == len(x) - 1
        with contextlib.nullcontext() if last else without_sync(run.ddp_model):
            with processes.autocast():
                loss = run.ddp_model(x[micro_step], y[micro_step])
            # DDP averages over processes what is to be a sum, hence the world size.
            scaler.scale(loss * (processes.world_size / tokens)).backward()
        loss_sum += loss.detach()
    totals = processes.sum(torch.cat(((loss_sum / tokens)[None], stop_row)))

    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    finite = torch.isfinite(norm) & torch.isfinite(totals[0])
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif processes.device.type == "mps" or config.optimizer == "muon":
        if finite:  # the host waits for it: neither has kernels that would leave all as it is
            optimizer.step()
    else:
        # The fused kernels leave parameters and moments alone where this is 1, as they do for
        # GradScaler: no process has to read the norm to decide.
        optimizer.found_inf = (~finite).float()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return torch.cat((totals[:1], norm[None], totals[1:]))


# -------------------------------------------------------------------------------------------------
# The run


def duration(seconds: float) -> str:
    """A time span as people read it: 42s, 3m05s, 2h07m."""
    minutes, s = divmod(int(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"


def progress_bar(run: Run):
    """A bar with the time left below the lines, on a terminal only."""
    return tqdm(
        total=run.config.max_steps, initial=run.step, unit="step", dynamic_ncols=True,
        disable=run.processes.rank > 0 or not sys.stdout.isatty(), file=sys.stdout, leave=False,
    )  # fmt: skip


class Report:
    """Turns the results of steps into console lines, log lines, and the decision to go on.

    Where the device runs ahead, a step is told once the next one is launched, so that the device
    never waits for the console.
    """

    def __init__(self, run: Run, signals: StopSignals):
        self.run, self.signals = run, signals
        self.waiting = None  # the arguments of `tell` for the step launched last
        self.peak = None
        if run.processes.device.type == "cuda":
            self.peak = peak_flops(torch.cuda.get_device_name(), run.processes.dtype)
        self.last_dts, self.told = deque(maxlen=20), 0
        self.bar = progress_bar(run)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of the next step's time what came before it: validation, saving."""
        self.clock = time.perf_counter()

    def add(self, step: int, lr: float, tokens: int, position: int, results) -> None:
        """Takes in a step that was launched. Raises Stopped where a signal is to be obeyed."""
        earlier, self.waiting = self.waiting, (step, lr, tokens, position, results)
        if not self.run.processes.runs_ahead:
            self.flush()
        elif earlier and (number := self.tell(*earlier)):
            raise Stopped(number)

    def flush(self) -> None:
        """Tells the step that waits, if one does. Raises Stopped as `add` does."""
        waiting, self.waiting = self.waiting, None
        if waiting and (number := self.tell(*waiting)):
            raise Stopped(number)

    def tell(self, step: int, lr: float, tokens: int, position: int, results) -> int | None:
        """Tells one step, waiting for it; returns the number of a signal to stop for.

        Raises UserError after `max_bad_steps` non-finite steps in a row.
        """
        run, config = self.run, self.run.config
        loss, norm, *signal_counts = results.tolist()
        now = time.perf_counter()
        dt, self.clock = now - self.clock, now
        self.last_dts.append(dt)
        rate = tokens / dt
        mfu = None
        if self.peak:
            flops = run.model.flops_per_token(config.T) * rate / run.processes.world_size
            mfu = flops / self.peak
        left_s = statistics.median(self.last_dts) * (config.max_steps - step - 1)
        run.processes.say(
            f"step {step:5d} | loss: {loss:9.6f} | lr {lr:.4e} | norm: {norm:8.4f} | "
            f"dt: {1000 * dt:8.2f}ms | tok/sec: {rate:10.2f} | "
            f"mfu: {'n/a' if mfu is None else f'{mfu:.1%}':>5} | left: {duration(left_s):>6}"
        )
        self.bar.update()
        if run.processes.rank == 0:
            run.log.write(step, "train", loss)
            run.progress.write(step, position * config.T, dt)
            values = dict(loss=loss, lr=lr, norm=norm, tok_per_sec=rate)
            run.tracker.step(step, **values, **({} if mfu is None else dict(mfu=mfu)))
        self.told += 1
        if self.told == 10:
            self.tell_price(left_s)
        self.count_bad_steps(step, loss, norm)
        return self.signals.number_in(signal_counts)

    def tell_price(self, left_s: float) -> None:
        """What the steps still to be done take, in time and, if a price is known, in money."""
        config, world_size = self.run.config, self.run.processes.world_size
        price = f", {left_s / 3600 * world_size * config.gpu_hour_usd:,.2f} USD"
        self.run.processes.say(
            f"by the first ten steps the rest takes {duration(left_s)}"
            f"{price if config.gpu_hour_usd else ''}, and evaluations on top of that"
        )

    def close(self) -> None:
        """The end of the console's progress bar and of the tracker's run."""
        self.bar.close()
        self.run.tracker.close()

    def count_bad_steps(self, step: int, loss: float, norm: float) -> None:
        """Counts non-finite steps in a row. Raises SettingError when they are `max_bad_steps`."""
        run, config = self.run, self.run.config
        if math.isfinite(loss) and math.isfinite(norm):
            run.bad_steps = 0
            return
        if run.scaler.is_enabled() and math.isfinite(loss) and run.scaler.get_scale() >= 1:
            run.processes.say(f"step {step}: gradient overflow: update skipped, scale halved")
            return
        run.bad_steps += 1
        run.processes.say(
            f"step {step}: loss {loss}, norm {norm}: not finite, update skipped "
            f"({run.bad_steps} in a row, {config.max_bad_steps} stop the run)"
        )
        if run.bad_steps >= config.max_bad_steps:
            raise SettingError(
                f"max_bad_steps={config.max_bad_steps}: that many steps in a row up to step {step} "
                f"had no finite loss or gradient; {last_checkpoint(run.log.path.parent)}; "
                "try a lower --max_lr or --dtype=float32 in another --log_dir"
            )


def set_up_model(config: Config, state: dict | None, directory: Path | None) -> GPT:
    """The model on the CPU: of a checkpoint and its training state, of `init_from`, or random."""
    if state is not None:
        model = GPT.from_pretrained(directory)
        spare = state["spare_rows"]
        if isinstance(spare, torch.Tensor):  # as checkpoints had it before heads could be untied
            spare = {"transformer.wte.weight": spare}
        with torch.no_grad():
            for name, rows in spare.items():
                model.get_parameter(name)[model.config.vocab_size :] = rows
        return model
    if config.init_from != "scratch":
        try:
            return GPT.from_pretrained(config.init_from, block_size=config.T)
        except UserError as error:
            raise SettingError(f"init_from={config.init_from!r}: {error}") from None
    torch.manual_seed(config.seed)
    return GPT(
        GPTConfig(
            block_size=config.T, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd
        )
    )


def open_run(config: Config, processes: Processes):
    """(run, validation loader) by the settings and what is in `log_dir`.

    (None, None) if the run there is finished. Nothing is written before all that can be wrong
    with settings, data and checkpoint was checked.
    """
    log_dir = Path(config.log_dir)
    names = list(DEFINING)
    if config.init_from != "scratch":  # which then says what the shape is
        names = [name for name in names if name not in ("n_layer", "n_head", "n_embd")]
    facts = run_log.read_facts(log_dir, config.resume)
    if facts:
        run_log.check_same_run(config, facts["settings"], names, log_dir)
    newest = checkpoint.newest_whole(log_dir, processes.say)
    whole_end = newest == log_dir / f"step_{config.max_steps:05d}"
    if facts.get("finished_step") == config.max_steps and whole_end:
        processes.say(
            f"{log_dir}: this run is finished, at step {config.max_steps} of {config.max_steps}; "
            "a larger --max_steps goes on, another --log_dir starts afresh"
        )
        return None, None
    state = load_train_state(newest) if newest else None
    train_tokens, val_tokens = open_tokens(config.data)
    check_enough(config, train_tokens, val_tokens)
    check_shards(config, processes)
    tokenizer.load_ranks()  # checkpoints have it in them: what is wrong with it is told now
    for earlier in filter(None, (facts, state)):
        run_log.check_same_run(config, earlier["settings"], names, log_dir)
        run_log.check_same_data(config.data, train_tokens.fingerprint, earlier["data"], log_dir)
    step = state["step"] if state else 0
    steps = processes.sum(torch.tensor(float(step), device=processes.device))
    if steps != step * processes.world_size:
        raise UserError(f"log_dir={str(log_dir)!r}: must be one directory shared by all nodes")

    model = set_up_model(config, state, newest).to(processes.device)
    c = model.config  # of init_from, perhaps
    config = dataclasses.replace(config, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    run, val_loader = set_up_run(config, processes, model, train_tokens, val_tokens)
    if state:
        restore(run, state)
        run.step = run.saved_step = step
    tell_set_up(run, val_loader, newest, facts)
    if processes.rank == 0:
        run_log.write_facts(log_dir, facts_of_run(run))
        told = {at for at, stream, _ in run.log.read() if stream == "train"}
        run.log.cut(step)
        run.progress.cut(step)
        settings = dataclasses.asdict(config)
        run.tracker = trackers.start(config.tracker, log_dir, settings, step, told)
    warm_up(run.training_model, run.ddp_model, run.loader.B, config.T, processes)
    return run, val_loader


def check_enough(config: Config, train_tokens: TokenStream, val_tokens: TokenStream) -> None:
    """Raises SettingError where a split that is used has not even one window."""
    for split, tokens in (("train", train_tokens), ("val", val_tokens)):
        if len(tokens) <= config.T and (split == "train" or config.val_every):
            raise SettingError(
                f"data={config.data!r}: {len(tokens)} tokens of {split!r} are too few for a window "
                f"of T={config.T} and its next token; give more text or a smaller T"
            )


def set_up_run(config: Config, processes: Processes, model: GPT, train_tokens, val_tokens):
    """(run, validation loader) of a model that is on its device, at the start of the stream."""
    device_type = processes.device.type
    share = dict(
        B=pick_B(config, model, processes), T=config.T, process_rank=processes.rank,
        num_processes=processes.world_size, vocab_size=model.config.vocab_size,
    )  # fmt: skip
    loader = DataLoaderLite(
        train_tokens, **share, shuffle=config.shuffle, seed=config.seed,
        rows_at=lambda position: batch_rows(position, config),
    )  # fmt: skip
    training_model = TrainingModel(model, config.compile)
    ddp_model = training_model
    if processes.world_size > 1:
        ids = [processes.device.index] if device_type == "cuda" else None
        ddp_model = DistributedDataParallel(
            training_model, device_ids=ids, gradient_as_bucket_view=True
        )
    log_dir = Path(config.log_dir)
    run = Run(
        config=config, processes=processes, loader=loader, log=RunLog(log_dir),
        progress=Progress(log_dir), curves=Curves(log_dir, processes.say),
        model=model, training_model=training_model, ddp_model=ddp_model,
        optimizer=configure_optimizer(model, config, device_type),
        scaler=torch.amp.GradScaler(device_type, enabled=processes.dtype == torch.float16),
    )  # fmt: skip
    return run, DataLoaderLite(val_tokens, **share)


def restore(run: Run, state: dict) -> None:
    """Puts all but the model, which `set_up_model` did, where a checkpoint left it."""
    run.loader.position, run.bad_steps = state["position"], state["bad_steps"]
    run.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"]["cpu"])
    if run.processes.device.type == "cuda" and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"])


def facts_of_run(run: Run) -> dict:
    """The content of `run.json`."""
    device = run.processes.device
    return run_log.facts_of(
        run.config,
        data=run.loader.tokens.fingerprint,
        train_tokens=len(run.loader.tokens),
        parameters=run.model.num_parameters(),
        device=torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        dtype=str(run.processes.dtype).removeprefix("torch."),
        world_size=run.processes.world_size,
    )


def tell_set_up(run: Run, val_loader: DataLoaderLite, newest: Path | None, facts: dict) -> None:
    """Prints what is about to be trained, on what, and where it starts."""
    config, say, loader = run.config, run.processes.say, run.loader
    rows = config.total_batch_size // config.T
    micro_steps = math.ceil(math.ceil(rows / run.processes.world_size) / loader.B)
    dtype = str(run.processes.dtype).removeprefix("torch.")
    say(
        f"{run.model.num_parameters():,} parameters | {run.processes.world_size} x "
        f"{run.processes.device.type} in {dtype} | B={loader.B}, {micro_steps} micro-steps, "
        f"{config.total_batch_size:,} tokens a step"
    )
    position = 0
    for _ in range(config.max_steps):
        position += batch_rows(position, config)
    epochs = position / loader.windows
    say(
        f"{config.data}: {len(loader.tokens):,} tokens to train on ({epochs:.2f} epochs in "
        f"{config.max_steps} steps), {len(val_loader.tokens):,} for validation"
    )
    before = facts.get("settings", {}).get("max_steps", config.max_steps)
    if before != config.max_steps:
        say(f"max_steps was {before} and is {config.max_steps}: the schedule is of the new length")
    if newest:
        say(f"continuing from {newest}")


def train(config: Config) -> int:
    """Trains by the settings until max_steps or a signal; returns the exit code.

    0: finished; 128 + N: stopped by signal N with a checkpoint of the last whole step.
    Raises UserError for what the user can mend, or where another process is lost.
    """
    processes = set_up_processes(config)
    try:
        run, val_loader = open_run(config, processes)
        if run is None:
            return 0
        questions = load_hellaswag(config, processes, run.model.config.vocab_size)
        with StopSignals(processes) as signals:
            with contextlib.closing(Report(run, signals)) as report:
                try:
                    val_loss = train_to_the_end(run, val_loader, questions, report, signals)
                except Stopped as stopped:
                    return stop(run, report, stopped)
    except RuntimeError as error:
        distributed.raise_if_lost(error)
        raise

    if processes.rank == 0:
        prune(run)  # what a kill just before the end left
        finished = {"finished_step": run.step, "val_loss": val_loss}
        run_log.write_facts(Path(config.log_dir), facts_of_run(run) | finished)
    processes.say(
        f"finished: {Path(config.log_dir, f'step_{run.step:05d}')} is a Hugging Face model"
    )
    processes.barrier()
    return 0


def train_to_the_end(run: Run, val_loader, questions: list, report: Report, signals: StopSignals):
    """The loop, from `run.step` to max_steps; returns the last validation loss, in nats, or None.

    Raises Stopped where a signal is to be obeyed.
    """
    config, processes = run.config, run.processes
    val_rows = min(config.val_tokens // config.T, val_loader.windows)
    val_loss, epoch, first_step = None, run.loader.epoch, run.step

    for step in range(first_step, config.max_steps + 1):
        last = step == config.max_steps
        checkpoint_now = last or is_due(config.checkpoint_every, step)
        validate_now = config.val_every and (last or is_due(config.val_every, step))
        score_now = questions and (last or is_due(config.hellaswag_every, step))
        sample_now = config.sample_every and (last or is_due(config.sample_every, step))
        pause = checkpoint_now or validate_now or score_now or sample_now

        if pause:
            report.flush()

        # once in a while save, before anything that could go wrong in an evaluation
        if checkpoint_now and step > first_step:
            save_checkpoint(run)

        # once in a while validate
        if validate_now:
            val_loss = validation_loss(
                run.training_model, val_loader, val_rows, processes, signals.check
            )
            processes.say(f"step {step:5d} | validation loss: {val_loss:.4f}", bold=True)
            if processes.rank == 0:
                run.log.write(step, "val", val_loss)
                run.tracker.evaluation(step, val_loss=val_loss)

        # once in a while score HellaSwag
        if score_now:
            score = hellaswag.evaluate(run.model, questions, processes, signals.check)
            processes.say(f"step {step:5d} | HellaSwag {score}", bold=True)
            if processes.rank == 0:
                run.log.write(step, "hella", score.acc_norm)
                run.tracker.evaluation(step, hella=score.acc_norm)

        # once in a while sample, except at step 0, which is noise
        if sample_now and step > 0:
            for i, text in enumerate(samples(run.model, config, processes, signals.check)):
                processes.say(f"--- sample {i} at step {step}\n{text}\n---")
                run.tracker.text(step, f"sample_{i}", text)

        # once in a while draw
        if config.curves and processes.rank == 0 and (validate_now or score_now):
            run.curves.finish() if last else run.curves.refresh()

        if last:
            break
        if pause:
            report.restart_clock()

        # one step of the optimization
        if run.loader.epoch > epoch:
            epoch = run.loader.epoch
            processes.say(f"step {step:5d} | epoch {epoch + 1} of the data")
        lr = get_lr(step, config)
        tokens = batch_rows(run.loader.position, config) * config.T
        results = train_step(run, lr, signals.row(), signals.check_in_step)
        report.add(step, lr, tokens, run.loader.position, results)
    return val_loss


def stop(run: Run, report: Report, stopped: Stopped) -> int:
    """Saves all whole steps, says how to continue, and returns the exit code."""
    with contextlib.suppress(Stopped):
        report.flush()
    if run.step > run.saved_step:
        save_checkpoint(run)
    saved = f", saved {Path(run.config.log_dir, f'step_{run.step:05d}')}" if run.saved_step else ""
    where = f"after step {run.step - 1}" if run.step else "before the first step"
    run.processes.say(f"stopped by {stopped} {where}{saved}; the same command continues the run")
    return 128 + stopped.number


def is_due(every: int, step: int) -> bool:
    """Whether something done each `every` steps (0: never) is due at `step`."""
    return every > 0 and step % every == 0


# -------------------------------------------------------------------------------------------------
# Command line


def parse_config(arguments: list[str]) -> Config:
    """The settings of a command line, `[recipe] [--name=value ...]`, found consistent."""
    config = cli.parse(Config, RECIPES, arguments, __doc__.split("\n")[0])
    check_config(config)
    return config


def main() -> int:
    try:
        code = train(parse_config(sys.argv[1:]))
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise UserError(f"{reason}; give a smaller --B, or 0 for the most that fit") from None
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    run_main(main)
