"""Trains GPT-2 from scratch: the 124M model on FineWeb-Edu, or a small one on `input.txt`.

    python train_gpt2.py tiny                                  # a small GPT in minutes on a CPU
    python train_gpt2.py                                       # GPT-2 124M on one GPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py     # the same run on eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
        --rdzv_endpoint=HOST:29500 train_gpt2.py               # on two nodes (shared log_dir)

The loss of the 124M run starts at about 10.98. Its goal is the validation loss of OpenAI's GPT-2 on
FineWeb-Edu, 3.2924, within 10 B tokens. Every setting of `Config` below can be given as
`--name=value`.

Writes to `log_dir`: `log.txt` (lines of `step stream value`), `run.json` (settings and versions),
and checkpoints `step_NNNNN/`, each a Hugging Face model plus the state for an exact resume. The
same command run again continues the run.

Sources: Radford et al. 2019 (GPT-2), Brown et al. 2020 (GPT-3: optimizer, schedule), and the
programs nanoGPT and build-nanogpt, whose names are kept.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from support import (
    autotune,
    checkpoint,
    cli,
    devices,
    hellaswag_eval,
    huggingface,
    model_files,
    muon,
    run_log,
    shards,
    tokenizer,
    validate_settings,
)  # fmt: skip
from support.cpu_attention import causal_attention
from support.devices import residual_dtype
from support.distributed import Runtime, initialize, leave_group, naming_lost_ranks, without_sync
from support.errors import SettingError, UserError, run_main
from support.fused_loss import IGNORE_INDEX, TrainingModel
from support.generation import causal_mask, generate_texts, stream
from support.huggingface import check_code, describe_kind, find_non_finite, padding_rows
from support.launch import print0, read_launch
from support.run_lock import RunLock
from support.run_output import RunOutput
from support.step_log import DelayedReports, StepLog, count_bad_steps
from support.stop_signals import Stopped, StopSignals

# -------------------------------------------------------------------------------------------------
# Settings: edit the defaults here, or give --name=value


@dataclass
class Config:
    """The settings, one per line."""

    # data
    data: str = "edu_fineweb10B"  # directory of token shards (.npy, .bin), or one .txt file
    check_data: bool = True  # verify the SHA-256 of the shards, if they have a manifest
    shuffle: bool = True  # new order of the windows in each epoch; False: file order
    seed: int = 1337  # of the initialization and of the order of the windows
    init_from: str = "scratch"  # scratch, gpt2[-medium|-large|-xl], or a Hugging Face directory

    # model: GPT-2 124M
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # channels of the residual stream
    T: int = 1024  # context length, in tokens

    # batch
    B: int = 0  # rows of a micro-batch, at most; 0: as many as suit the device
    total_batch_size: int = 524288  # tokens per step over all ranks: 2**19, GPT-3's 0.5 M
    batch_ramp_tokens: int = 0  # tokens over which the batch grows from 32,768; 0: no ramp

    # optimizer and schedule, as in GPT-3 (table 2.1 and appendix B)
    optimizer: str = "adamw"  # adamw; muon: Muon for the matrices of the blocks, AdamW for the rest
    schedule: str = "cosine"  # decay of the learning rate after the warm-up: cosine or linear
    max_lr: float = 6e-4  # learning rate after the warm-up
    embedding_lr: float = 0.0  # that of the token embedding, on the schedule of max_lr; 0: max_lr
    min_lr: float = 6e-5  # learning rate at the end: 10 %
    cooldown: float = 1.0  # share of the steps after the warm-up in which the learning rate falls
    warmup_steps: int = 715  # steps of linear warm-up: 375 M tokens
    max_steps: int = 19073  # steps of the run: 10 B tokens, one epoch of FineWeb-Edu 10B
    weight_decay: float = 0.1  # on tensors of 2 or more dimensions
    beta1: float = 0.9  # decay of AdamW's first moment
    beta2: float = 0.95  # decay of AdamW's second moment
    eps: float = 1e-8  # added to the root of the second moment
    grad_clip: float = 1.0  # largest global norm of the gradient; 0: no clipping
    muon_lr: float = 0.02  # Muon's learning rate after the warm-up, on the schedule of max_lr
    muon_momentum: float = 0.95  # decay of the gradient average that Muon orthogonalizes
    max_bad_steps: int = 3  # non-finite steps in a row after which the run stops

    # evaluation
    val_every: int = 250  # steps between validations; 0: never
    val_tokens: int = 10485760  # tokens of each validation, always the same ones
    hellaswag_every: int = 250  # steps between HellaSwag scores; 0: never
    hellaswag_data: str = ""  # a .jsonl; "": hellaswag/hellaswag_val.jsonl, downloaded if missing
    hellaswag_examples: int = 0  # score the first so many examples; 0: all 10,042
    sample_every: int = 250  # steps between samples; 0: never
    sample_prompt: str = "Hello, I'm a language model,"  # text that the samples continue
    sample_tokens: int = 32  # tokens added to the prompt
    num_samples: int = 4  # samples each time
    eval_only: bool = False  # evaluate init_from or the newest checkpoint once, and write nothing

    # output
    log_dir: str = "log"  # directory of the log and the checkpoints of this run
    checkpoint_every: int = 1000  # steps between checkpoints; 0: only the final one
    keep_checkpoints: int = 2  # newest checkpoints kept, besides the best one
    after_checkpoint: str = ""  # shell command after each one: 'aws s3 sync "$LOG_DIR" s3://...'
    resume: bool = True  # continue the run in log_dir; False: refuse if there is one
    curves: bool = True  # draw curves.png at each evaluation
    tracker: str = ""  # "", tensorboard or wandb

    # system
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of matrix products: auto, float32, bfloat16, float16
    compile: bool = True  # use torch.compile; eager mode if it fails
    timeout_s: int = 600  # seconds that a rank waits for another one before the run ends


RECIPES = {
    # One to four minutes on two CPU cores, too short for compiling to pay: 3.8 epochs of the play.
    "tiny": dict(
        data="input.txt", n_layer=4, n_head=4, n_embd=128, T=128, B=8, total_batch_size=2048,
        optimizer="muon", muon_momentum=0.9, beta2=0.99, max_lr=3e-3, min_lr=3e-4, warmup_steps=20,
        weight_decay=0.3, max_steps=200, val_every=50, val_tokens=8192, hellaswag_every=200,
        hellaswag_data="hellaswag/hellaswag_val.jsonl", hellaswag_examples=500, sample_every=100,
        sample_prompt="QUEEN MARETH:\n", sample_tokens=120, num_samples=1, log_dir="log_tiny",
        checkpoint_every=100, compile=False,
    ),
    "gpt2": dict(),
    # Sizes of GPT-2, learning rates of GPT-3's models of the same size (table 2.1).
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4, min_lr=3e-5),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, max_lr=2.5e-4, min_lr=2.5e-5),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, max_lr=2e-4, min_lr=2e-5),
    # GPT-2 124M with Muon in a third of the tokens; not measured at this size. embedding_lr is that
    # of modded-nanogpt's first run with Muon, whose head is tied too. max_lr stays a sixth of it,
    # and the other values of optimizer and schedule are those of a small model (BENCHMARKS.md).
    "speedrun": dict(
        optimizer="muon", muon_momentum=0.9, beta1=0.8, beta2=0.99, embedding_lr=3.6e-3,
        schedule="linear", min_lr=0.0, cooldown=0.7, warmup_steps=318, max_steps=6358,
    ),
    # OpenAI's GPT-2 continues on the user's text, with nanoGPT's batch and learning rate for that.
    "finetune": dict(
        init_from="gpt2", data="input.txt", total_batch_size=32768, max_lr=3e-5, min_lr=3e-6,
        warmup_steps=2, max_steps=20, val_every=5, val_tokens=8192, hellaswag_every=0,
        sample_every=20, sample_prompt="QUEEN MARETH:\n", sample_tokens=120, num_samples=1,
        log_dir="log_finetune", checkpoint_every=0,
    ),
    # GPT-3's context and batch ramp over the first 4 B tokens: the 375 M tokens of warm-up then
    # take 7,297 steps, and 10 B tokens take 34,250.
    "gpt3-124M": dict(
        T=2048, batch_ramp_tokens=4_000_000_000, warmup_steps=7297, max_steps=34250,
    ),
}  # fmt: skip
RAMP_START = 32768  # tokens per step at the start of a batch ramp (GPT-3, appendix B)

# Settings that may change when a run is continued; all others must match the checkpoint. The
# content of `data` must match too, and `max_steps` may only grow.
MAY_CHANGE = {
    "data", "check_data", "B", "max_steps", "max_bad_steps", "val_every", "val_tokens",
    "hellaswag_every", "hellaswag_data", "hellaswag_examples", "sample_every", "sample_prompt",
    "sample_tokens", "num_samples", "eval_only", "log_dir", "checkpoint_every", "keep_checkpoints",
    "after_checkpoint", "resume", "curves", "tracker", "device", "dtype", "compile", "timeout_s",
}  # fmt: skip


# -------------------------------------------------------------------------------------------------
# Model
#
# B rows, T tokens per row, C = n_embd channels, nh heads of size hs = C / nh, V token ids, L layers


@dataclass
class GPTConfig:
    """The configuration of a GPT; a checkpoint contains all of it."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    tied: bool = True  # the head is the token embedding; False for some models from elsewhere

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of 128, which is faster."""
        return math.ceil(self.vocab_size / 128) * 128

    @property
    def vocab_weights(self) -> tuple[str, ...]:
        """Names of the parameters that have a row for each id."""
        return ("transformer.wte.weight", "lm_head.weight")[: 1 if self.tied else 2]


class CausalSelfAttention(nn.Module):
    """Multi-head attention to the token itself and earlier ones: (B, T, C) -> (B, T, C).

    `positions` (of `GPT.hidden`) are for variants such as rotary embeddings; GPT-2 ignores them.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, positions=None, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in (q, k, v))  # (B,nh,T,hs)
        if cache is not None:
            k, v = cache.add(k, v)  # of all tokens so far
        if mask is None and k.size(2) == T:
            y = causal_attention(q, k, v)  # (B, nh, T, hs)
        else:  # without a mask: one token, which attends to all earlier ones
            y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Position-wise feed-forward network: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, positions=None, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), positions, mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: token and position embeddings, L blocks, a final norm, a head tied to the embedding.

    The padding rows of the embedding take part in no result. There is no dropout.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02) and biases 0; residual projections are scaled by 1/sqrt(2 n_layer)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(parameter, mean=0.0, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx, positions=None, mask=None, caches=None):
        """Final hidden states (B, T, C) of token ids (B, T).

        positions: int64 (T,) or (B, T), position of each token; default: one after the other
        mask: bool (B, 1, T, T), which tokens (last dimension) each attends to; default: causal
        caches: a `KVCache` per layer with the tokens before `idx`, to which `idx` is added
        """
        T, seen = idx.size(1), caches[0].seen if caches else 0
        if positions is None:
            positions = torch.arange(seen, seen + T, device=idx.device)
        if mask is None:
            mask = causal_mask(seen, T, idx.device)
        x = self.transformer.wte(idx)
        if "wpe" in self.transformer:
            x = x + self.transformer.wpe(positions)
        x = x.to(residual_dtype(x))
        for i, block in enumerate(self.transformer.h):
            x = block(x, positions, mask, caches[i] if caches else None)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Next-token logits (..., vocab_size) of hidden states (..., C), without padding ids."""
        return self.lm_head(x)[..., : self.config.vocab_size]

    def token_losses(self, logits, targets):
        """Cross-entropy of each target, in nats: (N, vocab_size), int64 (N,) -> float32 (N,).

        0 for targets of IGNORE_INDEX. Training, validation, HellaSwag and `forward` all call this.
        """
        logits = logits.float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")

    def forward(self, idx, targets=None):
        """(logits (B, T, vocab_size), mean loss in nats or None) of int64 (B, T) each."""
        logits = self.logits(self.hidden(idx))
        if targets is None:
            return logits, None
        losses = self.token_losses(logits.flatten(0, 1), targets.flatten())
        return logits, losses.sum() / (targets != IGNORE_INDEX).sum()

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, **more):
        """`idx` (B, T) continued by up to `max_new_tokens` ids; settings of `generation.stream`."""
        sampling = dict(temperature=temperature, top_k=top_k, generator=generator, **more)
        return torch.cat((idx, *stream(self, idx, max_new_tokens, **sampling)), dim=1)

    def num_parameters(self) -> int:
        """Number of parameters without padding rows: 124,439,808 for GPT-2 124M."""
        padding = sum(rows.numel() for rows in padding_rows(self).values())
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    def flops_per_token(self, T: int) -> int:
        """FLOPs of training per token: 6 per weight of a matrix product, 6 L C T for attention."""
        matmul = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * matmul + 6 * self.config.n_layer * self.config.n_embd * T

    def save_pretrained(self, directory) -> None:
        """Writes a directory that `AutoModelForCausalLM` and `AutoTokenizer` open."""
        huggingface.save_model(self, directory)

    @classmethod
    def from_pretrained(cls, source: str, **options) -> "GPT":
        """The GPT-2 of a Hugging Face directory or Hub name; options of `huggingface.load_model`"""
        return huggingface.load_model(cls, GPTConfig, source, **options)


# -------------------------------------------------------------------------------------------------
# Optimizer and schedule


def configure_optimizer(model: GPT, config: Config, device_type: str):
    """AdamW, or Muon for the matrices of the blocks and AdamW for all other parameters.

    Weight decay acts on tensors of 2 or more dimensions only. The learning rate of a group is the
    schedule of max_lr times its `lr_scale`, if it has one.
    """
    wte, matrices, others = model.transformer.wte.weight, {}, []
    for name, parameter in model.named_parameters():
        if config.optimizer == "muon" and ".h." in name and parameter.dim() == 2:
            matrices[name] = parameter
        elif parameter is not wte:
            others.append(parameter)
    scale = (config.embedding_lr or config.max_lr) / config.max_lr
    groups = [
        {"params": [wte], "weight_decay": config.weight_decay, "lr_scale": scale},
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.max_lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device_type in ("cuda", "cpu", "mps"),
    )
    if matrices:
        rates = config.muon_lr, config.muon_momentum, config.weight_decay
        first = muon.configure_muon(matrices, *rates)
        for group in first.param_groups:
            group["lr_scale"] = config.muon_lr / config.max_lr
        optimizer = muon.CombinedOptimizer(muon=first, adamw=optimizer)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters())), "each in exactly one group"
    return optimizer


def get_lr(step: int, config: Config) -> float:
    """The learning rate of a step: warm-up, max_lr, then `schedule` from max_lr to min_lr."""
    c = config
    if step < c.warmup_steps:
        return c.max_lr * (step + 1) / c.warmup_steps
    if step >= c.max_steps:
        return c.min_lr
    start = c.max_steps - c.cooldown * (c.max_steps - c.warmup_steps)  # of the decay
    if step < start:
        return c.max_lr
    progress = (step - start) / (c.max_steps - start)
    left = 1 - progress if c.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return c.min_lr + left * (c.max_lr - c.min_lr)


def batch_rows(position: int, config: Config) -> int:
    """Rows (windows of T tokens) of the step that begins at row `position` of the stream."""
    full, tokens = config.total_batch_size, position * config.T
    if tokens < config.batch_ramp_tokens:
        full = RAMP_START + (full - RAMP_START) * tokens // config.batch_ramp_tokens
    return max(1, full // config.T)


# -------------------------------------------------------------------------------------------------
# Data: one stream of windows, the same for any number of ranks
#
#   tokens of all shards, in order:  0 1 2 3 4 5 6 7 8 9 ...
#   window 0 (T = 4):                0 1 2 3 4              inputs 0..3, targets 1..4
#   window 1:                                4 5 6 7 8      inputs 4..7, targets 5..8
#
# Row r of the stream is window r of its epoch, after that epoch's permutation. A step takes the
# next `batch_rows` rows, and each rank a contiguous part of them.


class DataLoaderLite:
    """Serves this rank's share of the one global stream of windows, a step at a time.

    A micro-batch has B rows (fewer early in a batch ramp). Rows that are left over in a rank's last
    micro-batch are padded with targets of IGNORE_INDEX.
    """

    def __init__(
        self, tokens: shards.TokenStream, B: int, T: int, process_rank=0, num_processes=1,
        rows_at=None, shuffle=False, seed=0, vocab_size=tokenizer.VOCAB_SIZE, device="cpu",
    ):  # fmt: skip
        """rows_at(position): rows of the step that begins at row `position`; default: B each
        device: which the batches are for; if it is a GPU, they are in pinned memory
        """
        self.tokens, self.B, self.T, self.vocab_size = tokens, B, T, vocab_size
        self.rank, self.num_processes = process_rank, num_processes
        self.rows_at = rows_at or (lambda position: num_processes * B)
        self.shuffle, self.seed = shuffle, seed
        self.windows = (len(tokens) - 1) // T  # windows in an epoch
        self.position = 0  # rows of the stream served so far
        self.device = torch.device(device)
        use_device = functools.partial(devices.use_in_thread, self.device)
        self.pool, self.prepared = ThreadPoolExecutor(1, initializer=use_device), None

    @property
    def epoch(self) -> int:
        """Epoch of the next row, counted from 0."""
        return self.position // self.windows

    def windows_of(self, rows: np.ndarray) -> np.ndarray:
        """The windows at these rows of the stream, within their epochs."""
        if not self.shuffle:
            return rows % self.windows
        epochs, windows = np.divmod(rows, self.windows)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = shards.permute(windows[here], self.windows, self.seed, int(epoch))
        return windows

    def micro_batch(self, rows: int) -> int:
        """Rows of a micro-batch in a step of `rows` rows: as few as suffice, but B or a power of
        two, since each size is compiled once."""
        share = math.ceil(rows / self.num_processes)
        return min(self.B, 1 << (autotune.divide_evenly(share, self.B) - 1).bit_length())

    def batch(self, first: int, rows: int, B: int | None = None):
        """This rank's share of rows [first, first + rows): x, y int64 (micro-steps, B, T)."""
        B = B or self.B
        begin, end = (first + rows * r // self.num_processes for r in (self.rank, self.rank + 1))
        micro_steps = math.ceil(math.ceil(rows / self.num_processes) / B)
        x = np.zeros((micro_steps * B, self.T), dtype=np.int64)
        y = np.full_like(x, IGNORE_INDEX)
        for i, window in enumerate(self.windows_of(np.arange(begin, end))):
            row = self.tokens.read_window(int(window), self.T, self.vocab_size)
            x[i], y[i] = row[:-1], row[1:]
        batch = [torch.from_numpy(a).view(micro_steps, B, self.T) for a in (x, y)]
        return [a.pin_memory() for a in batch] if self.device.type == "cuda" else batch

    def next_step(self):
        """(x, y, rows): `batch` for the next step; the one after it is prepared in a thread."""
        rows, prepared = self.rows_at(self.position), self.prepared or self.prepare()
        x, y = prepared.result()
        self.position += rows
        self.prepared = self.prepare()
        return x, y, rows

    def prepare(self):
        """A future of the batch at the current position."""
        rows = self.rows_at(self.position)
        return self.pool.submit(self.batch, self.position, rows, self.micro_batch(rows))


# -------------------------------------------------------------------------------------------------
# Validation, HellaSwag and samples: the same result for any number of ranks. `check_signals` is
# called before each batch, on all ranks; it may raise Stopped.


def validation_loss(
    model: TrainingModel, loader: DataLoaderLite, rows: int, runtime: Runtime, check_signals
) -> tuple[float, float]:
    """Mean loss in nats per token, and in bits per byte of the text, over the first `rows` windows,
    which all ranks share."""
    losses, text_bytes = [], 0
    step_rows = loader.B * runtime.world_size
    for first in range(0, rows, step_rows):
        check_signals()
        x, y = loader.batch(first, min(step_rows, rows - first))
        text_bytes += tokenizer.count_bytes(y)
        x, y = (a[0].to(runtime.device, non_blocking=True) for a in (x, y))
        with runtime.autocast():
            losses.append(model.evaluate(x, y))
    total = torch.stack(losses).cpu().double().sum().item()
    total, text_bytes = map(sum, zip(*runtime.all_gather((total, text_bytes))))
    return total / (rows * loader.T), total / math.log(2) / max(1, text_bytes)


def validate(run: "Run", check_signals=lambda: None) -> None:
    """Logs the loss on each validation set, its perplexity, and bits per byte."""
    for name, loader in run.val_loaders.items():
        rows = min(run.config.val_tokens // run.config.T, loader.windows)
        loss, bpb = validation_loss(run.training_model, loader, rows, run.runtime, check_signals)
        run.output.log_validation(run.step, name, loss, bpb)


def load_questions(run: "Run") -> None:
    """Loads the questions of HellaSwag, if it is to be scored."""
    c, vocab_size = run.config, run.model.config.vocab_size
    if c.hellaswag_every:
        run.questions = hellaswag_eval.load_shared_questions(
            c.hellaswag_data, c.hellaswag_examples, vocab_size, run.runtime
        )


def score_hellaswag(run: "Run", check_signals=lambda: None) -> None:
    """Logs the HellaSwag score (acc_norm in `log.txt`)."""
    score = hellaswag_eval.evaluate(run.model, run.questions, run.runtime, check_signals)
    results = {"hellaswag": score.acc_norm}
    run.output.log_evaluation(run.step, "hella", results, f"HellaSwag {score}")


def print_samples(run: "Run", check_signals=lambda: None) -> None:
    """Prints `num_samples` continuations of `sample_prompt`, and gives them to the tracker."""
    c = run.config
    texts = generate_texts(
        run.model, c.sample_prompt, c.num_samples, c.sample_tokens, run.runtime, check_signals
    )
    for i, text in enumerate(texts):
        run.output.log_text(run.step, f"sample_{i}", text)


# -------------------------------------------------------------------------------------------------
# Checkpoints


def training_state(run: "Run") -> dict:
    """What `train_state.pt` holds: all that an exact resume needs beside the model."""
    state = {
        "step": run.step,
        "position": run.loader.position,
        "bad_steps": run.bad_steps,
        "settings": dataclasses.asdict(run.config),
        "data": run.loader.tokens.fingerprint,
        "log": run.output.log.texts(),
        "optimizer": muon.save_optimizer(run.optimizer),
        "scaler": run.scaler.state_dict(),
        "padding_rows": padding_rows(run.model),
        "rng": {"cpu": torch.get_rng_state()},
    }
    if run.runtime.device.type == "cuda":
        state["rng"]["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(run: "Run", state: dict) -> None:
    """Sets everything but the model's parameters to the state of a checkpoint."""
    run.step = run.saved_step = state["step"]
    run.loader.position, run.bad_steps = state["position"], state["bad_steps"]
    run.output.log.saved = state["log"]
    muon.load_optimizer(run.optimizer, state["optimizer"])
    if state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"]["cpu"])
    if run.runtime.device.type == "cuda" and "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"])


def save_checkpoint(run: "Run") -> None:
    """Writes `step_NNNNN/` on rank 0, on a GPU in the background.

    Raises SettingError, and writes nothing, if a weight is not finite; UserError, perhaps at a
    later step, if the disk is full.
    """
    log_dir, step = Path(run.config.log_dir), run.step
    checkpoint.check_finite(find_non_finite(run.model), log_dir, step, run.config.max_lr)
    run.runtime.barrier()
    if run.runtime.master_process:
        run.output.wait_for_checkpoint()  # so that there is one copy in the host's memory at a time
        content = huggingface.export_model(run.model), training_state(run)
        model, state = checkpoint.copy_to_host(content, run.runtime.asynchronous)

        def write_files(directory: Path) -> None:
            huggingface.write_model(model, directory)
            torch.save(state, directory / "train_state.pt")

        run.output.save_checkpoint(step, write_files)
    run.saved_step = step


# -------------------------------------------------------------------------------------------------
# One training step


@dataclass
class Run:
    """The state of a run in progress."""

    config: Config
    runtime: Runtime
    model: GPT  # uncompiled: saved, sampled from
    training_model: TrainingModel  # the same parameters, perhaps compiled
    ddp_model: nn.Module  # the same, in DDP if there are several ranks
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: DataLoaderLite
    val_loaders: dict[str, DataLoaderLite]  # by the name of their stream in log.txt
    output: RunOutput  # console, log files, tracker
    questions: list = field(default_factory=list)  # of HellaSwag
    step: int = 0  # steps done
    saved_step: int = 0  # steps that the newest checkpoint contains
    bad_steps: int = 0  # non-finite steps in a row


def train_step(run: Run, lr: float, signal_row, check_signals=lambda: None):
    """One update over all ranks; on CUDA the host does not wait for it.

    Returns (figures, signal counts): {name: float32 scalar on the device}, the mean loss in nats
    and the norm of the gradient before clipping; and the sum of `signal_row` over all ranks. If
    loss or norm is not finite, parameters and optimizer stay as they were on all ranks.
    check_signals: called before each micro-step; if it raises Stopped, the step was not begun.
    """
    position = run.loader.position
    try:
        loss = accumulate_gradients(run, check_signals)
    except Stopped:
        run.loader.position = position
        raise
    loss, *signal_counts = run.runtime.all_reduce(torch.cat((loss[None], signal_row)))
    norm = update_parameters(run, lr, loss)
    run.step += 1
    return dict(loss=loss, norm=norm), signal_counts


def accumulate_gradients(run: Run, check_signals) -> torch.Tensor:
    """Gradients of the next step's mean loss, over all ranks; returns this rank's part of it."""
    runtime = run.runtime
    x, y, rows = run.loader.next_step()
    x, y = (a.to(runtime.device, non_blocking=True) for a in (x, y))
    tokens = rows * run.config.T
    loss_sum = torch.zeros((), device=runtime.device)
    for micro_step in range(len(x)):
        check_signals()
        last = micro_step == len(x) - 1
        with contextlib.nullcontext() if last else without_sync(run.ddp_model):
            with runtime.autocast():
                loss = run.ddp_model(x[micro_step], y[micro_step])
            # DDP takes the mean over ranks of what must be a sum, hence the world size.
            run.scaler.scale(loss * (runtime.world_size / tokens)).backward()
        loss_sum += loss.detach()
    return loss_sum / tokens


def update_parameters(run: Run, lr: float, loss: torch.Tensor) -> torch.Tensor:
    """Clips the gradients and updates, if they and `loss` are finite; returns their norm before."""
    optimizer, scaler = run.optimizer, run.scaler
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.config.grad_clip or math.inf)
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    else:
        muon.step_if_finite(optimizer, norm.isfinite() & loss.isfinite(), run.runtime.device)
    optimizer.zero_grad(set_to_none=True)
    return norm


def log_step(run, step: int, lr: float, tokens: int, position: int, figures, signal_counts, end):
    """Logs a step, with results of `train_step` that have arrived on the host.

    Raises Stopped if a rank received a signal, UserError after `max_bad_steps` non-finite steps.
    """
    run.output.log_step(step, lr, tokens, position * run.config.T, figures, end)
    get_scale = run.scaler.get_scale if run.scaler.is_enabled() else lambda: 0.0
    limits = run.config.max_bad_steps, step, figures, get_scale, Path(run.config.log_dir)
    run.bad_steps = count_bad_steps(run.bad_steps, *limits)
    if number := StopSignals.number_in(signal_counts):
        raise Stopped(number)


# -------------------------------------------------------------------------------------------------
# The run: set-up


def build_model(config: Config, state: dict, directory: Path | None) -> GPT:
    """The model on the CPU: of a checkpoint and its training state, of `init_from`, or random."""
    if state:
        model = GPT.from_pretrained(directory)
        with torch.no_grad():
            for name, rows in state["padding_rows"].items():
                model.get_parameter(name)[model.config.vocab_size :] = rows
        return model
    if config.init_from != "scratch":
        return load_model(config, same_function=False)
    torch.manual_seed(config.seed)
    shape = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
    return GPT(GPTConfig(block_size=config.T, **shape))


def load_model(config: Config, **options) -> GPT:
    """The model of `init_from`. Raises SettingError if it cannot be loaded."""
    try:
        return GPT.from_pretrained(config.init_from, block_size=config.T, **options)
    except UserError as error:
        raise SettingError(f"init_from={config.init_from!r}: {error}") from None


def open_run(config: Config, runtime: Runtime) -> Run | None:
    """The run that the settings and the content of `log_dir` describe; None if it is finished.

    Checks settings, data and checkpoint, and writes nothing.
    """
    log_dir = Path(config.log_dir)
    with runtime.failing_together():
        record = run_log.read_run_json(log_dir, config.resume)
        check_resume = functools.partial(run_log.check_resume, vars(config), MAY_CHANGE)
        check_resume(record)
        newest = checkpoint.newest_valid(log_dir)
        finished = checkpoint.is_finished(newest, record, config.max_steps)
    found = {"newest checkpoint": newest and newest.name, "finished": finished}
    runtime.check_same(found, f"log_dir={config.log_dir!r} must be one directory of all nodes")
    if finished:
        print0(
            f"{log_dir}: this run is finished, at step {config.max_steps} of {config.max_steps}; "
            "give a larger --max_steps to continue it, or another --log_dir for a new run"
        )
        return None
    splits = open_data(config, runtime)
    with runtime.failing_together():
        state = checkpoint.load_state(newest / "train_state.pt") if newest else {}
        for earlier in (record, state):
            check_resume(earlier, splits["train"].fingerprint)
        model = build_model(config, state, newest)
        check_code(model)
    model.to(runtime.device)
    run = build_run(config, runtime, model, splits)
    if state:
        restore(run, state)
    lengths = {name: len(loader.tokens) for name, loader in run.val_loaders.items()}
    epochs = count_epochs(config, run.loader)
    run.output.print_setup(run.loader.B, epochs, lengths, newest, record)
    return run


def open_data(config: Config, runtime: Runtime) -> dict[str, shards.TokenStream]:
    """The checked splits of the data that the run uses: train, and val if it validates."""
    with runtime.failing_together():
        splits = shards.open_splits(config.data)
        if not config.val_every:
            splits = {"train": splits["train"]}
        shards.check_lengths(config.data, splits, config.T)
        found = {f"tokens of {name}": split.fingerprint for name, split in splits.items()}
        tokenizer.load_ranks()  # checkpoints contain the tokenizer: a missing file is reported now
    runtime.check_same(found, f"data={config.data!r} must be the same tokens on all nodes")
    if config.check_data:
        shards.verify_shards(config.data, runtime.rank, runtime.world_size, runtime.all_gather)
    return splits


def build_run(config: Config, runtime: Runtime, model: GPT, splits: dict) -> Run:
    """A run at the start of the stream, with a model that is on its device."""
    c = model.config  # of init_from, perhaps
    config = dataclasses.replace(config, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    compiled = config.compile and runtime.device.type != "mps"  # LayerNorm is wrong there
    training_model = ddp_model = TrainingModel(model, compiled)
    rows = math.ceil(config.total_batch_size // config.T / runtime.world_size)
    B = autotune.choose_micro_batch(rows, config.B, config.T, training_model, runtime)
    common = dict(
        B=B, T=config.T, process_rank=runtime.rank, num_processes=runtime.world_size,
        vocab_size=model.config.vocab_size, device=runtime.device,
    )  # fmt: skip
    loader = DataLoaderLite(
        splits["train"], **common, shuffle=config.shuffle, seed=config.seed,
        rows_at=lambda position: batch_rows(position, config),
    )  # fmt: skip
    val_loaders = {n: DataLoaderLite(t, **common) for n, t in splits.items() if n != "train"}
    device = runtime.device
    if runtime.world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        ddp_model = DistributedDataParallel(training_model, ids, gradient_as_bucket_view=True)
    return Run(
        config=config, runtime=runtime, model=model, training_model=training_model,
        ddp_model=ddp_model, optimizer=configure_optimizer(model, config, device.type),
        scaler=torch.amp.GradScaler(device.type, enabled=runtime.dtype == torch.float16),
        loader=loader, val_loaders=val_loaders, output=build_output(config, runtime, model, loader),
    )  # fmt: skip


def build_output(config: Config, runtime: Runtime, model: GPT, loader: DataLoaderLite) -> RunOutput:
    """The console, log files and tracker of a run."""
    name, world_size = devices.device_name(runtime.device), runtime.world_size
    record = dict(
        settings=dataclasses.asdict(config), data=loader.tokens.fingerprint,
        train_tokens=len(loader.tokens), parameters=model.num_parameters(), device=name,
        dtype=devices.dtype_name(runtime.dtype), world_size=world_size,
    )  # fmt: skip
    console = StepLog(
        config.max_steps, model.flops_per_token(config.T), devices.peak_flops(name, runtime.dtype),
        world_size, runtime.master_process, runtime.asynchronous,
    )  # fmt: skip
    writes = runtime.master_process and not config.eval_only
    return RunOutput(Path(config.log_dir), writes, console, record, runtime.asynchronous)


def count_epochs(config: Config, loader: DataLoaderLite) -> float:
    """How often the run, from its first step to its last, reads the training data."""
    position = steps = 0
    while position * config.T < config.batch_ramp_tokens and steps < config.max_steps:
        position, steps = position + batch_rows(position, config), steps + 1
    position += (config.max_steps - steps) * batch_rows(position, config)
    return position / loader.windows


# -------------------------------------------------------------------------------------------------
# The run: loop


@naming_lost_ranks()
def train(config: Config, process_ends: bool = False) -> int:
    """Trains by the settings until max_steps or a signal; returns the exit code.

    0: finished; 128 + N: stopped by signal N, with a checkpoint of the last complete step.
    process_ends: whether the process ends afterwards, and ignores any further signal until then
    Raises UserError for what the user can correct, and if another process is lost.
    """
    runtime = initialize(config.device, config.dtype, read_launch(), config.timeout_s)
    validate_settings.check_same(vars(config), runtime)
    if config.eval_only:
        return evaluate(config, runtime)
    with RunLock(config.log_dir, runtime) as lock:
        run = open_run(config, runtime)
        if run is None:
            return 0
        lock.acquire()
        run.output.start(run.step)
        models = run.training_model, run.ddp_model
        autotune.compile_or_fall_back(*models, run.loader.B, config.T, runtime)
        load_questions(run)
        reports = DelayedReports(functools.partial(log_step, run), runtime.asynchronous)
        with StopSignals(runtime, process_ends) as signals, run.output.steps(run.step, signals):
            try:
                train_loop(run, reports, signals)
            except Stopped as stopped:
                return stop(run, reports, stopped)
            tokens, memory = run.loader.position * config.T, devices.peak_memory_mib(runtime.device)
            run.output.finish(run.step, tokens, memory)
            final = checkpoint.step_directory(config.log_dir, run.step)
            print0(f"finished: {final} is {describe_kind(run.model)}")
        if runtime.master_process:  # what a kill just before the end, or after_checkpoint, left
            run.output.prune_checkpoints(run.step)
        runtime.barrier()
        return 0


@naming_lost_ranks("start it again")
def evaluate(config: Config, runtime: Runtime) -> int:
    """Validates, scores HellaSwag and samples once, and writes nothing; returns the exit code.

    The model is that of `init_from` or, if that is "scratch", the newest one in `log_dir`.
    """
    with runtime.failing_together():
        new = config.init_from == "scratch" and checkpoint.require_newest(Path(config.log_dir))
    source = runtime.all_gather(new)[0] or config.init_from
    with runtime.failing_together():
        directory = model_files.find_directory(str(source))
        print0(f"evaluating {directory}")
        config = dataclasses.replace(config, init_from=str(directory))
        model = load_model(config).to(runtime.device)
    run = build_run(config, runtime, model, open_data(config, runtime))
    run.step = checkpoint.step_of(directory)
    run.output.print_system()
    autotune.compile_or_fall_back(run.training_model, None, run.loader.B, config.T, runtime)
    load_questions(run)
    validate(run)
    if run.questions:
        score_hellaswag(run)
    if config.sample_every:
        print_samples(run)
    run.output.print_results()
    return 0


def train_loop(run: Run, reports: DelayedReports, signals: StopSignals) -> None:
    """Trains from `run.step` to max_steps. Raises Stopped if a rank received a signal."""
    config, epoch, first_step = run.config, run.loader.epoch, run.step

    for step in range(first_step, config.max_steps + 1):
        last = step == config.max_steps
        save_now = step > first_step and (last or is_due(config.checkpoint_every, step))
        validate_now = is_due(config.val_every, step, last)
        score_now = run.questions and is_due(config.hellaswag_every, step, last)
        sample_now = step > 0 and is_due(config.sample_every, step, last)
        pause = last or save_now or validate_now or score_now or sample_now

        if pause:
            reports.flush()

        # once in a while save, before an evaluation that may fail
        if save_now:
            save_checkpoint(run)

        # once in a while validate, score HellaSwag, sample
        if validate_now:
            validate(run, signals.check)
        if score_now:
            score_hellaswag(run, signals.check)
        if sample_now:
            print_samples(run, signals.check)

        # once in a while draw the curves
        if validate_now or score_now:
            run.output.draw_curves(last)

        if last:
            break
        if pause:
            run.output.console.restart_clock()

        # one training step
        if run.loader.epoch > epoch:
            epoch = run.loader.epoch
            print0(f"step {step:5d} | epoch {epoch + 1} of the data")
        lr = get_lr(step, config)
        tokens = batch_rows(run.loader.position, config) * config.T
        figures, signal_counts = train_step(run, lr, signals.row(), signals.check_in_step)
        reports.add(figures, signal_counts, step, lr, tokens, run.loader.position)


def is_due(every: int, step: int, last: bool = False) -> bool:
    """Whether what is done each `every` steps (0: never), and at the last one, is due at `step`."""
    return every > 0 and (last or step % every == 0)


def stop(run: Run, reports: DelayedReports, stopped: Stopped) -> int:
    """Saves all complete steps, prints how to continue, and returns the exit code."""
    with contextlib.suppress(Stopped):
        reports.flush()
    if run.step > run.saved_step:
        save_checkpoint(run)
    run.output.wait_for_checkpoint()
    saved = checkpoint.step_directory(run.config.log_dir, run.step)
    saved = f", saved {saved}" if run.saved_step else ""
    where = f"after step {run.step - 1}" if run.step else "before the first step"
    print0(f"stopped by {stopped} {where}{saved}; the same command continues the run")
    return 128 + stopped.number


# -------------------------------------------------------------------------------------------------
# Command line


def parse_config(arguments: list[str]) -> Config:
    """The valid settings of a command line, `[recipe] [--name=value ...]`."""
    config = cli.parse(Config, RECIPES, arguments, "Trains GPT-2. All settings by their groups:")
    validate_settings.validate(vars(config), RAMP_START)
    return config


def main() -> int:
    with autotune.naming_lack_of_memory():
        code = train(parse_config(sys.argv[1:]), process_ends=True)
    leave_group()
    return code


if __name__ == "__main__":
    run_main(main)
