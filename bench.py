"""Speed of training, scoring and sampling GPT-2 124M on this machine, beside transformers.

    python bench.py                                       # all parts, as tables
    python bench.py --only=train,sample --json=out.json
    python bench.py --peer=../build-nanogpt               # also another program's GPT(GPTConfig)
    python bench.py --ladder                              # the gain of each optimization

Each program runs in a process of its own, and the programs take turns, so that other load on the
machine affects all of them. The tables show medians of the turns, their spread, and the ratio to
transformers.

    matmul     the fastest matrix product measured here, beside the datasheet's figure
    train      a training step on B x T tokens, and its parts
    hellaswag  scoring HellaSwag; the other programs score one example at a time, four padded rows
    sample     4 texts x 120 tokens, top_k 50; a peer without `generate` uses build-nanogpt's loop
    optimizer  an update of all weights by AdamW, and by Muon with AdamW
    data       the data loader, and the tokenizers on input.txt

The code of a peer runs unchanged; its optimizer is PyTorch's AdamW, fused on CUDA.

The file --json holds the machine under "facts", and the figures of each part under its name.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import multiprocessing
import platform
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import train_gpt2
from support import cli, devices, distributed, hellaswag_eval, quantize, tokenizer
from support.errors import SettingError, UserError, run_main
from support.shards import TokenStream


@dataclass
class Config:
    """The settings, also on the command line."""

    only: str = "all"  # or of matmul,train,hellaswag,sample,optimizer,data
    peer: str = ""  # directory of another GPT-2 program to time in the same way
    ladder: bool = False  # instead of the parts: from plain float32 upwards, one change at a time
    rounds: int = 3  # timed turns of each program
    B: int = 0  # rows of a training step; 0: 4 on a CPU, 32 on a GPU
    T: int = 1024  # tokens in each row
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width of the residual stream
    hellaswag_data: str = ""  # a .jsonl; "": hellaswag/hellaswag_val.jsonl, else random examples
    json: str = ""  # a file for the figures
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of the matrix products: auto, float32, bfloat16, float16

    @property
    def shape(self) -> dict:
        """The arguments for the size of the model, which all programs share."""
        block_size = max(1024, self.T)
        layers = dict(n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd)
        return dict(block_size=block_size, **layers)


# -------------------------------------------------------------------------------------------------
# The programs


class Program:
    """A model and its work; `train`, `hellaswag` and `sample` do one turn and return its figures.

    Figures are in seconds, tokens and examples unless they are named otherwise.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        self.config, self.device = config, device
        self.runtime = distributed.Runtime(0, 1, device, dtype)
        torch.manual_seed(1337)
        self.model = self.build_model().to(device)

    def clock(self) -> float:
        """Seconds, once the device has finished its work."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    @functools.cached_property
    def batch(self):
        """x, y int64 (B, T): the tokens of input.txt, repeated."""
        B, T = self.config.B, self.config.T
        ids = torch.from_numpy(tokenizer.encode_plain(read_text()).astype(np.int64))
        ids = ids.repeat(math.ceil((B * T + 1) / len(ids)))[: B * T + 1].to(self.device)
        return ids[:-1].view(B, T), ids[1:].view(B, T)

    def train(self) -> dict:
        """Two training steps: one timed in total, one in parts."""
        start = self.clock()
        for _ in self.step():
            pass
        seconds = self.clock() - start
        parts, last = {}, self.clock()
        for name in self.step():
            now = self.clock()
            parts[name], last = now - last, now
        return {"seconds": seconds, "parts": parts, "count": self.config.B * self.config.T}

    def step(self):
        """One training step; yields the name of each part when it is done."""
        x, y = self.batch
        with self.runtime.autocast():
            logits = self.logits(x)
            yield "forward"
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        yield "loss"
        yield from self.update(loss)

    def update(self, loss):
        """The second half of a step."""
        loss.backward()
        yield "backward"
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        yield "optimizer"

    @functools.cached_property
    def optimizer(self):
        """The AdamW that the program would use."""
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=fused)

    def peak_mb(self) -> float:
        """The peak memory of the GPU, or of this process on other devices, in MB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        try:
            import resource
        except ImportError:  # Windows
            return math.nan
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    @torch.no_grad()
    def hellaswag(self) -> dict:
        """Scores one example at a time: four padded rows, all logits."""
        examples = find_examples(self.config, 24 if self.device.type == "cpu" else 200)
        start = self.clock()
        for example in examples:
            _, tokens, mask, _ = hellaswag_eval.render_example(example)
            tokens, mask = tokens.to(self.device), mask.to(self.device)
            with self.runtime.autocast():
                logits = self.logits(tokens)
            targets = tokens[:, 1:].flatten()
            losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
            losses = losses.view(4, -1) * mask[:, 1:]
            (losses.sum(dim=1) / mask[:, 1:].sum(dim=1)).argmin().item()
        return {"seconds": self.clock() - start, "count": len(examples)}

    def sample(self) -> dict:
        """Continues four rows of one prompt by 120 tokens each."""
        ids = tokenizer.get_encoding().encode_ordinary("Hello, I'm a language model,")
        prompt = torch.tensor([ids] * 4, device=self.device)
        start = self.clock()
        new = self.generate(prompt, 120)
        return {"seconds": self.clock() - start, "count": 4 * new}


class Ours(Program):
    """This repository's training, scoring and sampling."""

    def __init__(self, *arguments, compiled: bool = False, int8: bool = False):
        self.compiled, self.int8 = compiled, int8
        super().__init__(*arguments)

    def build_model(self):
        distributed.initialize(self.config.device, self.config.dtype)  # torch's global settings
        return quantize.to_int8(build_gpt(self.config)) if self.int8 else build_gpt(self.config)

    @functools.cached_property
    def training_model(self):
        return train_gpt2.TrainingModel(self.model, self.compiled)

    @functools.cached_property
    def optimizer(self):
        return train_gpt2.configure_optimizer(self.model, train_gpt2.Config(), self.device.type)

    def step(self):
        x, y = self.batch
        with self.runtime.autocast():
            hidden = self.training_model.hidden(x)
            yield "forward"
            loss = self.training_model.loss(hidden, y)
        yield "loss"
        yield from self.update(loss / y.numel())

    def hellaswag(self) -> dict:
        examples = find_examples(self.config, 256 if self.device.type == "cpu" else 10042)
        questions = [hellaswag_eval.make_question(example, "completion") for example in examples]
        start = self.clock()
        hellaswag_eval.ending_losses(self.model, questions, self.runtime)
        return {"seconds": self.clock() - start, "count": len(examples)}

    def generate(self, idx, n: int) -> int:
        with self.runtime.autocast():
            return self.model.generate(idx, n, top_k=50).size(1) - idx.size(1)

    def matmul(self) -> dict:
        """The highest rate of a few large products, in FLOP/s."""
        sizes = [(2048, 2048, 2048), (4096, 768, 3072)]
        if self.device.type != "cpu":
            sizes = [(8192, 8192, 8192), (32768, 768, 3072), (16384, 4096, 4096)]
        rates, options = [], dict(device=self.device, dtype=self.runtime.dtype)
        for m, k, n in sizes:
            a, b = torch.randn(m, k, **options), torch.randn(k, n, **options)
            c = torch.empty(m, n, **options)
            for _ in range(6):
                start = self.clock()
                for _ in range(3):
                    torch.mm(a, b, out=c)
                rates.append(3 * 2 * m * k * n / (self.clock() - start))
        return {"flops": max(rates[1:])}

    def optimizers(self) -> dict:
        """Seconds of an update by each of our optimizers, without making the gradients."""
        for parameter in self.model.parameters():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        seconds = {}
        for kind in ("adamw", "muon"):
            config = train_gpt2.Config(optimizer=kind)
            optimizer = train_gpt2.configure_optimizer(self.model, config, self.device.type)
            optimizer.step()  # also allocates the moments
            start = self.clock()
            for _ in range(3):
                optimizer.step()
            seconds[kind] = (self.clock() - start) / 3
        return seconds


class Transformers(Program):
    """GPT2LMHeadModel; it samples with its KV cache and with weights in the dtype, not autocast."""

    def build_model(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        dropout = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        shape = self.config.shape
        shape["n_positions"] = shape.pop("block_size")
        return GPT2LMHeadModel(GPT2Config(**shape, **dropout))

    def logits(self, idx):
        return self.model(idx, use_cache=False).logits

    def generate(self, idx, n: int) -> int:
        self.model.to(self.runtime.dtype)
        ids = self.model.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=True, top_k=50,
            pad_token_id=50256, eos_token_id=None,
        )  # fmt: skip
        return ids.size(1) - idx.size(1)


class Peer(Program):
    """The GPT(GPTConfig) in another program's model.py or train_gpt2.py."""

    def build_model(self):
        names = load_definitions(Path(self.config.peer))
        model = names["GPT"](names["GPTConfig"](vocab_size=50304, **self.config.shape))
        # nanoGPT computes the logits of all positions only if it is given targets.
        self.needs_targets = model(torch.zeros(1, 2, dtype=torch.int64))[0].size(1) == 1
        return model

    def logits(self, idx):
        return self.model(idx, idx if self.needs_targets else None)[0]

    def step(self):
        x, y = self.batch
        with self.runtime.autocast():
            _, loss = self.model(x, y)
        yield "forward"
        yield from self.update(loss)

    @torch.no_grad()
    def generate(self, idx, n: int) -> int:
        if hasattr(self.model, "generate"):
            with self.runtime.autocast():
                return self.model.generate(idx, n, top_k=50).size(1) - idx.size(1)
        for _ in range(n):
            with self.runtime.autocast():  # the same part as in build-nanogpt
                logits, _ = self.model(idx)
            p = F.softmax(logits[:, -1], dim=-1)
            likeliest, ids = torch.topk(p, 50, dim=-1)
            idx = torch.cat((idx, ids.gather(1, torch.multinomial(likeliest, 1))), dim=1)
        return n


# The ladder: each rung adds one change to those before it. Karpathy's lecture took the first seven
# on an A100 in 1000, 333, 300, 130, 96, 93 and 90 ms (B = 16, T = 1024).
RUNGS = {
    "float32": "everything plain: eager, 50,257 rows, attention by hand",
    "TF32": "float32 products rounded to 19 bits, by the tensor cores",
    "bfloat16": "autocast: products in 16 bits",
    "compile": "torch.compile of model and loss",
    "flash": "F.scaled_dot_product_attention: no T x T matrix in memory",
    "rows": "50,304 instead of 50,257 rows of the embedding",
    "fused": "AdamW in one kernel",
    "chunks": "head and loss in chunks that make their gradients at once",
    "memory": "freed memory is kept for the next tensor",
}


def find_obstacle(rung: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a rung does not exist on a device; None if it does."""
    if rung == "TF32" and not (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    ):
        return "no tensor cores"
    if rung == "bfloat16" and dtype != torch.bfloat16:
        return "no bfloat16 units"
    if rung == "memory" and (device.type != "cpu" or sys.platform != "linux"):
        return "the device's own allocator does it"
    return None


def plain_attention(q, k, v, mask=None, is_causal=False):
    """F.scaled_dot_product_attention as a textbook writes it."""
    T = q.size(2)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3))
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(dim=3) @ v


class Climber(Program):
    """Our model on one rung of the ladder."""

    def __init__(self, rung: str, config: Config, device: torch.device, dtype: torch.dtype):
        reached = list(RUNGS)[: list(RUNGS).index(rung) + 1]
        self.has = {rung for rung in reached if find_obstacle(rung, device, dtype) is None}
        super().__init__(config, device, dtype if "bfloat16" in self.has else torch.float32)

    def build_model(self):
        if "memory" in self.has:
            devices.keep_freed_memory()
        torch.set_float32_matmul_precision("high" if "TF32" in self.has else "highest")
        if "flash" not in self.has:
            F.scaled_dot_product_attention = plain_attention
        if "rows" not in self.has:
            train_gpt2.GPTConfig.padded_vocab_size = property(lambda config: config.vocab_size)
        return build_gpt(self.config)

    @functools.cached_property
    def forward(self):
        compiled = "compile" in self.has
        if "chunks" in self.has:
            return train_gpt2.TrainingModel(self.model, compiled)
        return torch.compile(self.model) if compiled else self.model

    @functools.cached_property
    def optimizer(self):
        fused = {"fused": True} if "fused" in self.has else {"foreach": True}
        return torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), **fused)

    def train(self) -> dict:
        x, y = self.batch
        start = self.clock()
        with self.runtime.autocast():
            loss = self.forward(x, y)
            loss = loss / y.numel() if "chunks" in self.has else loss[1]
        for _ in self.update(loss):
            pass
        return {"seconds": self.clock() - start, "loss": loss.item()}


PROGRAMS = {
    **{rung: functools.partial(Climber, rung) for rung in RUNGS},
    "transformers": Transformers,
    "ours": Ours,
    "ours, compiled": functools.partial(Ours, compiled=True),
    "ours, int8": functools.partial(Ours, int8=True),
    "peer": Peer,
}


def build_gpt(config: Config) -> train_gpt2.GPT:
    """This repository's model in the size of the settings."""
    return train_gpt2.GPT(train_gpt2.GPTConfig(**config.shape))


def read_text() -> str:
    """The text of input.txt, 1 MB of plays."""
    return Path(__file__).with_name("input.txt").read_text(encoding="utf-8")


def load_definitions(directory: Path) -> dict:
    """The imports, classes and functions of a program, without running its other statements."""
    kept = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    names = {}
    sys.path.insert(0, str(directory))
    for name in ("hellaswag", "model", "train_gpt2"):
        path = directory / f"{name}.py"
        if path.exists():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            tree.body = [node for node in tree.body if isinstance(node, kept)]
            sys.modules[name] = module = type(sys)(name)
            exec(compile(tree, str(path), "exec"), module.__dict__)
            names |= module.__dict__
    return names


def find_examples(config: Config, count: int) -> list[dict]:
    """`count` examples, evenly from the validation set; pieces of input.txt if it is missing."""
    path = Path(config.hellaswag_data or hellaswag_eval.FOLDER / "hellaswag_val.jsonl")
    if config.hellaswag_data or path.exists():
        examples = hellaswag_eval.read_examples(path)
        return examples[:: max(1, len(examples) // count)][:count]
    words, rng, examples = read_text().split(), np.random.default_rng(0), []
    for _ in range(count):
        start, length = rng.integers(0, len(words) - 200), rng.integers(15, 60)
        end = start + length
        endings = [" ".join(words[end : end + n]) for n in rng.integers(5, 35, 4)]
        examples.append(dict(ctx=" ".join(words[start:end]), endings=endings, label=0))
    return examples


# -------------------------------------------------------------------------------------------------
# Turns, tables and parts


_programs = {}  # {name: Program} of this process, which is the process of one program


def do_turn(name: str, config: Config, part: str) -> dict:
    """The figures of one turn of a program, which is built in the first one."""
    if name not in _programs:
        device = devices.choose_device(config.device)
        dtype = devices.choose_dtype(config.dtype, device)
        _programs[name] = PROGRAMS[name](config, device, dtype)
    return getattr(_programs[name], part)() | {"peak_mb": _programs[name].peak_mb()}


def take_turns(part: str, names: list[str], config: Config, rounds: int) -> dict[str, list]:
    """{program: figures of `rounds` + 1 turns}, without programs that failed. Turn 0 warms up."""
    context = multiprocessing.get_context("spawn")
    processes = {name: ProcessPoolExecutor(1, context) for name in names}
    results = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in list(results):
            print(f"{part}: {name}, turn {turn} of {rounds}", file=sys.stderr, flush=True)
            start = time.perf_counter()
            try:
                figures = processes[name].submit(do_turn, name, config, part).result()
                results[name].append(figures | {"wall": time.perf_counter() - start})
            except Exception as error:  # any that the program raises, or the end of its process
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{part}: {name} failed: {reason}", file=sys.stderr, flush=True)
                del results[name]
                processes[name].shutdown()  # frees its memory for the others
    for process in processes.values():
        process.shutdown()
    return results


def summarize(values: list[float]) -> dict:
    """The median, the smallest and the largest of some values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def format_spread(summary: dict) -> list[str]:
    """The cells of a summary: the median, and the spread."""
    return [f"{summary['median']:,.1f}", f"{summary['least']:,.1f} to {summary['most']:,.1f}"]


def print_table(title: str, head: list[str], rows: list[list]) -> None:
    """Prints a Markdown table."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    print(f"\n{title}\n")
    for row in (head, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    sys.stdout.flush()


def print_rates(title: str, unit: str, results: dict) -> dict:
    """Prints and returns {program: its rates and peak_mb}. results: those of `take_turns`"""
    rates, rows, base = {}, [], "transformers"
    for name, turns in results.items():
        rate = summarize([turn["count"] / turn["seconds"] for turn in turns[1:]])
        rate["peak_mb"] = max(turn["peak_mb"] for turn in turns)
        rates[name] = rate
        ratio = f"{rate['median'] / rates[base]['median']:.2f} x" if base in rates else "-"
        rows.append([name, *format_spread(rate), ratio, f"{rate['peak_mb']:,.0f}"])
    print_table(title, ["program", unit, "spread", f"of {base}", "peak MB"], rows)
    return rates


STEP_PARTS = ("forward", "loss", "backward", "optimizer")


def bench_matmul(config: Config, machine: dict) -> dict:
    """The fastest product, measured and by the datasheet, in FLOP/s."""
    turns, peak = take_turns("matmul", ["ours"], config, 1)["ours"], machine["peak_flops"]
    machine["measured_flops"] = measured = max(turn["flops"] for turn in turns)
    known = f"{peak / 1e12:,.0f}" if peak else "unknown"
    title = f"Matrix products, {machine['dtype']}"
    print_table(title, ["measured TFLOP/s", "datasheet"], [[f"{measured / 1e12:.2f}", known]])
    return {"measured": measured, "datasheet": peak}


def compare(part: str, config: Config) -> dict[str, list]:
    """The turns of all programs that can do a part, by program."""
    names = ["transformers", "ours"]
    names += {"train": ["ours, compiled"], "sample": ["ours, int8"]}.get(part, [])
    names += ["peer"] if config.peer else []
    return take_turns(part, names, config, config.rounds)


def bench_rates(part: str, title: str, unit: str, config: Config, machine: dict) -> dict:
    """The rates of each program in a part."""
    return print_rates(f"{title}, {machine['dtype']}", unit, compare(part, config))


def bench_train(config: Config, machine: dict) -> dict:
    """Speed, memory and parts of a step of each program."""
    results = compare("train", config)
    title = f"Training, {machine['dtype']}, B={config.B}, T={config.T}"
    found, rows = print_rates(title, "tokens/s", results), []
    for name, (first, *timed) in results.items():
        rate = found[name]["median"]
        ms = 1e3 * config.B * config.T / rate
        parts = dict.fromkeys(STEP_PARTS)
        for part in first["parts"]:
            parts[part] = 1e3 * statistics.median(turn["parts"][part] for turn in timed)
        shares = find_shares(config, rate, machine)
        found[name] |= {"ms": ms, "parts_ms": parts, "first_turn_s": first["wall"]} | shares
        rows.append(
            [name, f"{ms:,.0f}"]
            + [f"{part_ms:,.0f}" if part_ms else "-" for part_ms in parts.values()]
            + [f"{share:.0%}" if share else "-" for share in shares.values()]
            + [f"{first['wall']:.1f}"]
        )
    head = ["program", "ms a step", *STEP_PARTS, "MFU", "of the measured product"]
    head.append("s to the end of the first two steps")
    print_table("Its parts, in ms (each waited for)", head, rows)
    return found


def flops_per_token(config: Config) -> int:
    """Of training a model of the settings' shape."""
    with torch.device("meta"):
        return build_gpt(config).flops_per_token(config.T)


def find_shares(config: Config, rate: float, machine: dict) -> dict:
    """The share of the datasheet's and of the measured peak that a training rate uses, or None.

    rate: tokens/s
    """
    flops = flops_per_token(config) * rate
    peaks = {"mfu": "peak_flops", "of_measured_matmul": "measured_flops"}
    return {k: flops / machine[peak] if machine.get(peak) else None for k, peak in peaks.items()}


def bench_optimizer(config: Config, machine: dict) -> dict:
    """Milliseconds of an update by each of our optimizers."""
    timed = take_turns("optimizers", ["ours"], config, config.rounds)["ours"][1:]
    found = {kind: summarize([1e3 * turn[kind] for turn in timed]) for kind in ("adamw", "muon")}
    rows = [[kind, *format_spread(ms)] for kind, ms in found.items()]
    print_table("An update of all weights", ["optimizer", "ms", "spread"], rows)
    return found


def bench_data(config: Config, machine: dict) -> dict:
    """The speed of the tokenizers and of the loader, each in one process."""
    found = time_tokenizers(config.rounds)
    units = dict.fromkeys(found, "MB/s") | {"loader": "tokens/s"}
    found["loader"] = time_loader()
    rows = [[name, units[name], *format_spread(rate)] for name, rate in found.items()]
    print_table("Data, in one process", ["what", "unit", "rate", "spread"], rows)
    return found


def time_tokenizers(rounds: int) -> dict:
    """{engine: summary of MB of text a second} of each tokenizer that is installed."""
    text, found = read_text(), {}
    for engine in ("tiktoken", "gigatoken"):
        with contextlib.suppress(UserError):  # not installed
            encode, seconds = tokenizer.get_encoder(engine), []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                encode(text)
                seconds.append(time.perf_counter() - start)
            found[engine] = summarize([len(text.encode()) / 1e6 / s for s in seconds[1:]])
    return found


def time_loader(steps: int = 20, rows: int = 512) -> dict:
    """Tokens/s of the loader in steps of 512 x 1,024; a shard ends in every other step."""
    rng, seconds = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        paths = [Path(directory, f"{number}.npy") for number in range(6)]
        for path in paths:
            np.save(path, rng.integers(50257, size=2 * rows * 1024 + 1, dtype=np.uint16))
        stream = TokenStream([np.load(path, mmap_mode="r") for path in paths], [*map(str, paths)])
        loader = train_gpt2.DataLoaderLite(stream, 32, 1024, rows_at=lambda position: rows)
        for _ in range(steps):
            start = time.perf_counter()
            loader.next_step()
            seconds.append(time.perf_counter() - start)
        loader.pool.shutdown()
    return summarize([rows * 1024 / s for s in seconds[1:]])


def bench_ladder(config: Config, machine: dict) -> dict:
    """A training step on each rung of the ladder, one after the other."""
    device = devices.choose_device(config.device)
    dtype = devices.choose_dtype(config.dtype, device)
    found, rows, before = {}, [], None
    for rung, meaning in RUNGS.items():
        obstacle = find_obstacle(rung, device, dtype)
        results = {} if obstacle else take_turns("train", [rung], config, config.rounds)
        if rung not in results:
            found[rung] = {"lacking": obstacle or "failed"}
            rows.append([rung, meaning, found[rung]["lacking"], "", "", "", ""])
            continue
        first, *timed = results[rung]
        ms = summarize([1e3 * turn["seconds"] for turn in timed])
        rate = 1e3 * config.B * config.T / ms["median"]
        step = ms | {"ms": ms["median"], "tokens_per_s": rate, "loss": first["loss"]}
        step["mfu"] = find_shares(config, rate, machine)["mfu"]
        step["gain"] = before / ms["median"] if before else None
        step["peak_mb"] = max(turn["peak_mb"] for turn in results[rung])
        step["first_step_s"] = first["wall"]
        gain = f"{step['gain']:.2f} x" if before else ""
        cells = [f"{rate:,.0f}", gain, f"{step['peak_mb']:,.0f}"]
        rows.append([rung, meaning, *format_spread(ms), *cells])
        found[rung], before = step, ms["median"]
    title = f"The ladder: a step of B={config.B}, T={config.T}, each rung with all before it"
    print_table(title, ["rung", "what", "ms a step", "spread", "tokens/s", "gain", "peak MB"], rows)
    return found


PARTS = {
    "matmul": bench_matmul,
    "train": bench_train,
    "hellaswag": functools.partial(bench_rates, "hellaswag", "HellaSwag", "examples/s"),
    "sample": functools.partial(bench_rates, "sample", "Sampling 4 x 120 tokens", "tokens/s"),
    "optimizer": bench_optimizer,
    "data": bench_data,
}


# -------------------------------------------------------------------------------------------------
# The command


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict:
    """The machine, the versions and the date that belong to every figure."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):  # TypeError: no such line
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    name = f"{name}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    packages = ("torch", "transformers", "numpy")
    return {
        "device": name,
        "dtype": devices.dtype_name(dtype),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "command": "python bench.py " + " ".join(sys.argv[1:]),
        "peak_flops": devices.peak_flops(name, dtype),
    }


def validate(config: Config) -> list[str]:
    """The parts to run. Raises SettingError if a setting is not valid."""
    devices.validate_device_and_dtype(config.device, config.dtype)
    parts = list(PARTS) if config.only == "all" else config.only.split(",")
    for part in parts:
        if part not in PARTS:
            raise SettingError(f"only={config.only!r}: {cli.suggest(part, PARTS)}")
    for name in ("B", "rounds", "T", "n_layer", "n_head", "n_embd"):
        least = 0 if name == "B" else 1
        if getattr(config, name) < least:
            raise SettingError(f"{name}={getattr(config, name)}: must be at least {least}")
    if config.n_embd % config.n_head:
        raise SettingError(f"n_embd={config.n_embd}: must be a multiple of n_head={config.n_head}")
    peers = [Path(config.peer) / name for name in ("model.py", "train_gpt2.py")]
    if config.peer and not any(file.exists() for file in peers):
        raise SettingError(f"peer={config.peer!r}: has neither model.py nor train_gpt2.py")
    if config.hellaswag_data and not Path(config.hellaswag_data).is_file():
        raise SettingError(f"hellaswag_data={config.hellaswag_data!r}: no such file")
    if not Path(config.json).parent.is_dir():
        raise SettingError(f"json={config.json!r}: no such directory; choose another")
    return parts


def main() -> int:
    config = cli.parse(Config, {}, sys.argv[1:], "Speed of GPT-2 on this machine.")
    parts = validate(config)
    device = devices.choose_device(config.device)
    config = dataclasses.replace(config, B=config.B or (4 if device.type == "cpu" else 32))
    machine = describe_machine(device, devices.choose_dtype(config.dtype, device))
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{machine['device']}; {versions}; {machine['date']}")
    print(f"{machine['command']}", flush=True)
    run = {"ladder": bench_ladder} if config.ladder else {part: PARTS[part] for part in parts}
    found = {"facts": machine}
    for part, bench in run.items():
        found[part] = bench(config, machine)
    if config.json:
        Path(config.json).write_text(json.dumps(found, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
