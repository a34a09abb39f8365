"""How fast this machine trains, scores and samples GPT-2 124M, beside transformers in the same run.

    python bench.py                                       # all parts, into a table
    python bench.py --only=train,sample --json=out.json
    python bench.py --peer=../build-nanogpt               # and another program's GPT(GPTConfig)
    python bench.py --ladder                              # what each rung of the climb is worth

Each program runs in a process of its own; they take turns, so that what else the machine does hits
all alike. Shown are medians of the turns, the spread, and the ratio to transformers.

    matmul     the fastest product of two matrices found here, beside the datasheet's figure
    train      a step of AdamW on B x T tokens, and its parts
    hellaswag  examples scored; for the others the plain loop: one at a time, four padded rows
    sample     4 texts x 120 tokens, top_k 50; for a peer its generate, or build-nanogpt's loop
    optimizer  our update of all weights, by AdamW and by Muon with AdamW
    data       the loader and the tokenizers

The peers' code is run as it is; their optimizer is PyTorch's AdamW, fused on CUDA.
"""

import ast
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import hellaswag
import train_gpt2
from support import cli, quantize, tokenizer
from support.errors import SettingError, UserError, run_main

PARTS = ("matmul", "train", "hellaswag", "sample", "optimizer", "data")


@dataclass
class Config:
    """The settings: a line of the command line each."""

    only: str = "all"  # parts of those above, with commas between
    peer: str = ""  # the directory of another GPT-2 that is timed in the same way
    ladder: bool = False  # instead of the parts: the climb from plain float32, rung by rung
    rounds: int = 3  # timed turns of each program
    B: int = 0  # rows of a training step; 0: 4 on a CPU, 32 on a GPU
    T: int = 1024  # tokens in each
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width of the residual stream
    compile: bool = True  # time our training compiled as well
    hellaswag_data: str = ""  # a .jsonl; "": hellaswag/hellaswag_val.jsonl, else made-up examples
    json: str = ""  # a file for the figures
    plot: str = "ladder.png"  # a picture of the ladder
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of the matrix products: auto, float32, bfloat16, float16


# -------------------------------------------------------------------------------------------------
# The programs, each with the same three things to do


class Program:
    """Times itself: `train`, `hellaswag` and `sample` return numbers of one turn."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        self.config, self.device, self.dtype = config, device, dtype
        self.processes = train_gpt2.Processes(0, 1, device, dtype)
        torch.manual_seed(1337)
        self.model = self.make_model().to(device)
        self.optimizer = None

    def clock(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def batch(self):
        """x, y int64 (B, T): the tokens of input.txt, over and over."""
        B, T = self.config.B, self.config.T
        text = (Path(__file__).parent / "input.txt").read_text(encoding="utf-8")
        ids = torch.from_numpy(tokenizer.encode_plain(text).astype(np.int64))
        ids = ids.repeat(math.ceil((B * T + 1) / len(ids)))[: B * T + 1].to(self.device)
        return ids[:-1].view(B, T), ids[1:].view(B, T)

    def train(self) -> dict:
        """Two steps: one timed as a whole, one in parts; all in seconds."""
        if self.optimizer is None:
            self.optimizer, self.tokens = self.make_optimizer(), self.batch()
        start = self.clock()
        for _ in self.step():
            pass
        whole = self.clock() - start
        parts, last = {}, self.clock()
        for name in self.step():
            now = self.clock()
            parts[name], last = now - last, now
        return {"seconds": whole, "parts": parts, "peak_mb": self.peak_mb()}

    def step(self):
        """One step of training, yielding the name of each part when it is done."""
        x, y = self.tokens
        with self.processes.autocast():
            logits = self.all_logits(x)
            yield "forward"
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        yield "loss"
        yield from self.learn(loss)

    def learn(self, loss):
        """The second half of a step."""
        loss.backward()
        yield "backward"
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.decide(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        yield "optimizer"

    def decide(self, norm) -> None:
        """What a program does with the norm of the gradient before it steps."""

    def make_optimizer(self):
        """The AdamW that the program would use."""
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=fused)

    def peak_mb(self) -> float:
        """The most memory that was in use so far, in MB; of the GPU, if there is one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        try:
            import resource
        except ImportError:  # Windows
            return math.nan
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    @torch.no_grad()
    def hellaswag(self) -> dict:
        """The plain loop."""
        examples = find_examples(self.config, 24 if self.device.type == "cpu" else 200)
        start = self.clock()
        for example in examples:
            _, tokens, mask, _ = hellaswag.render_example(example)
            tokens, mask = tokens.to(self.device), mask.to(self.device)
            with self.processes.autocast():
                logits = self.all_logits(tokens)
            targets = tokens[:, 1:].flatten()
            losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
            losses = losses.view(4, -1) * mask[:, 1:]
            (losses.sum(dim=1) / mask[:, 1:].sum(dim=1)).argmin().item()
        return {"seconds": self.clock() - start, "count": len(examples)}

    def prompt(self):
        """Four rows of the prompt that all programs continue: int64 (4, T)."""
        ids = tokenizer.get_encoding().encode_ordinary("Hello, I'm a language model,")
        return torch.tensor([ids] * 4, device=self.device)

    def sample(self) -> dict:
        """The seconds that 120 more tokens for each row took, and how many there are."""
        start = self.clock()
        new = self.generate(self.prompt(), 120)
        return {"seconds": self.clock() - start, "count": 4 * new}


class Ours(Program):
    """train_gpt2.py, hellaswag.py and sample.py as they are."""

    compiled = False

    def make_model(self):
        train_gpt2.keep_freed_memory()
        c = self.config
        shape = dict(block_size=max(1024, c.T), n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
        return train_gpt2.GPT(train_gpt2.GPTConfig(**shape))

    def make_optimizer(self):
        self.training_model = train_gpt2.TrainingModel(self.model, self.compiled)
        return train_gpt2.configure_optimizer(self.model, train_gpt2.Config(), self.device.type)

    def step(self):
        x, y = self.tokens
        with self.processes.autocast():
            hidden = self.training_model.hidden(x)
            yield "forward"
            loss = self.training_model.loss(hidden, y)
        yield "loss"
        yield from self.learn(loss / y.numel())

    def decide(self, norm) -> None:
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()

    def hellaswag(self) -> dict:
        examples = find_examples(self.config, 256 if self.device.type == "cpu" else 10042)
        questions = [hellaswag.make_question(example, "completion") for example in examples]
        start = self.clock()
        hellaswag.ending_losses(self.model, questions, self.processes)
        return {"seconds": self.clock() - start, "count": len(examples)}

    def generate(self, idx, n: int) -> int:
        with self.processes.autocast():
            return self.model.generate(idx, n, top_k=50).size(1) - idx.size(1)

    def matmul(self) -> dict:
        """The highest rate of a few large products, in FLOP/s."""
        device, dtype = self.device, self.dtype
        sizes = [(2048, 2048, 2048), (4096, 768, 3072)]
        if device.type != "cpu":
            sizes = [(8192, 8192, 8192), (32768, 768, 3072), (16384, 4096, 4096)]
        rates = []
        for m, k, n in sizes:
            a = torch.randn(m, k, device=device, dtype=dtype)
            b = torch.randn(k, n, device=device, dtype=dtype)
            c = torch.empty(m, n, device=device, dtype=dtype)
            for _ in range(6):
                start = self.clock()
                for _ in range(3):
                    torch.mm(a, b, out=c)
                rates.append(3 * 2 * m * k * n / (self.clock() - start))
        return {"flops": max(rates[1:])}

    def optimizers(self) -> dict:
        """Seconds of an update, the gradients being there, by each of our optimizers."""
        if self.optimizer is None:
            settings = {kind: train_gpt2.Config(optimizer=kind) for kind in ("adamw", "muon")}
            make = train_gpt2.configure_optimizer
            kinds = {kind: make(self.model, c, self.device.type) for kind, c in settings.items()}
            self.optimizer = kinds
            for parameter in self.model.parameters():
                parameter.grad = 1e-3 * torch.randn_like(parameter)
        found = {}
        for kind, optimizer in self.optimizer.items():
            start = self.clock()
            for _ in range(3):
                optimizer.step()
            found[kind] = (self.clock() - start) / 3
        return found

    def loader(self, steps: int = 20, rows: int = 512, step_s: float = 1.0) -> dict:
        """What a run on a fast GPU has of the loader, in steps of 512 x 1,024 tokens a second.

        The GPU's work is a pause here; a shard ends in every other step.
        """
        with tempfile.TemporaryDirectory() as directory:
            rng, shards = np.random.default_rng(0), []
            for i in range(6):
                path = Path(directory) / f"train_{i}.npy"
                np.save(path, rng.integers(50257, size=1024 * 2 * rows + 1, dtype=np.uint16))
                shards.append(path)
            memory = self.memory_mb()
            maps = [np.load(path, mmap_mode="r") for path in shards]
            stream = train_gpt2.TokenStream(maps, [str(path) for path in shards])
            loader = train_gpt2.DataLoaderLite(stream, 32, 1024, rows_at=lambda position: rows)
            whole, waited = [], []
            for _ in range(steps):
                start = time.perf_counter()
                loader.next_step()
                waited.append(time.perf_counter() - start)
                time.sleep(step_s)
                whole.append(time.perf_counter() - start)
            memory = self.memory_mb() - memory
            loader.pool.shutdown()
            stream.shards = loader.tokens = None
        return {
            "share": statistics.median(waited[1:]) / statistics.median(whole[1:]),
            "longest": max(whole[1:]) / statistics.median(whole[1:]),
            "memory_mb": memory,
        }

    @staticmethod
    def memory_mb() -> float:
        """The memory of this process now, in MB; on Linux only."""
        try:
            return (
                int(Path("/proc/self/statm").read_text().split()[1])
                * os.sysconf("SC_PAGESIZE")
                / 1e6
            )
        except OSError:
            return math.nan

    def data(self) -> dict:
        """Tokens/s of the loader, in steps of B rows; MB/s of the tokenizers."""
        c, found = self.config, {}
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "train.npy"
            np.save(path, np.random.default_rng(0).integers(50257, size=4_000_000, dtype=np.uint16))
            stream = train_gpt2.TokenStream([np.load(path, mmap_mode="r")], [str(path)])
            loader = train_gpt2.DataLoaderLite(stream, c.B, c.T, shuffle=True)
            loader.next_step()
            start, steps = time.perf_counter(), max(1, 2_000_000 // (c.B * c.T))
            for _ in range(steps):
                loader.next_step()
            found["loader"] = steps * c.B * c.T / (time.perf_counter() - start)
            loader.pool.shutdown()
            stream.shards = loader.tokens = None
        text = (Path(__file__).parent / "input.txt").read_text(encoding="utf-8")
        for engine in ("tiktoken", "gigatoken"):
            with contextlib.suppress(UserError):
                encode = tokenizer.get_encoder(engine)
                encode(text)
                start = time.perf_counter()
                for _ in range(5):
                    encode(text)
                found[engine] = 5 * len(text.encode()) / 1e6 / (time.perf_counter() - start)
        return found


class OursCompiled(Ours):
    """This program, its training step through torch.compile."""

    compiled = True


class OursInt8(Ours):
    """This program, its matrices in 8 bits."""

    def make_model(self):
        return quantize.to_int8(super().make_model())


class Transformers(Program):
    """GPT2LMHeadModel, with its cache; it samples with weights of the dtype, not in autocast."""

    def make_model(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        c = self.config
        shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
        dropout = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        return GPT2LMHeadModel(GPT2Config(**shape, **dropout, n_positions=max(1024, c.T)))

    def all_logits(self, idx):
        return self.model(idx, use_cache=False).logits

    def generate(self, idx, n: int) -> int:
        self.model.to(self.dtype)
        found = self.model.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=True, top_k=50,
            pad_token_id=50256, eos_token_id=None,
        )  # fmt: skip
        return found.size(1) - idx.size(1)


class Peer(Program):
    """The GPT(GPTConfig) of another program's model.py or train_gpt2.py."""

    def make_model(self):
        found, c = load_definitions(Path(self.config.peer)), self.config
        shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
        model = found["GPT"](
            found["GPTConfig"](block_size=max(1024, c.T), vocab_size=50304, **shape)
        )
        self.needs_targets = model(torch.zeros(1, 2, dtype=torch.int64))[0].size(1) == 1
        return model

    def all_logits(self, idx):
        return self.model(idx, idx if self.needs_targets else None)[0]

    def step(self):
        x, y = self.tokens
        with self.processes.autocast():
            _, loss = self.model(x, y)
        yield "forward"
        yield from self.learn(loss)

    @torch.no_grad()
    def generate(self, idx, n: int) -> int:
        if hasattr(self.model, "generate"):
            with self.processes.autocast():
                return self.model.generate(idx, n, top_k=50).size(1) - idx.size(1)
        for _ in range(n):
            with self.processes.autocast():  # where build-nanogpt has it
                logits, _ = self.model(idx)
            p = F.softmax(logits[:, -1], dim=-1)
            likeliest, ids = torch.topk(p, 50, dim=-1)
            idx = torch.cat((idx, ids.gather(1, torch.multinomial(likeliest, 1))), dim=1)
        return n


# The ladder: each rung is on top of those before it. The lecture climbed the first seven on an A100
# in 1000, 333, 300, 130, 96, 93 and 90 ms (B = 16, T = 1024); the others are ours.
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


def lacking(rung: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a device does not have a rung, or None."""
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
    """What F.scaled_dot_product_attention computes, as a textbook has it."""
    T = q.size(2)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3))
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(dim=3) @ v


class Climber(Program):
    """Our model on one rung of the ladder."""

    rung = ""  # the highest one

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        reached = list(RUNGS)[: list(RUNGS).index(self.rung) + 1]
        self.has = {rung for rung in reached if lacking(rung, device, dtype) is None}
        super().__init__(config, device, dtype if "bfloat16" in self.has else torch.float32)

    def make_model(self):
        c = self.config
        shape = dict(block_size=max(1024, c.T), n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
        if "memory" in self.has:
            train_gpt2.keep_freed_memory()
        torch.set_float32_matmul_precision("high" if "TF32" in self.has else "highest")
        if "flash" not in self.has:
            F.scaled_dot_product_attention = plain_attention
        if "rows" not in self.has:
            train_gpt2.GPTConfig.rows = property(lambda config: config.vocab_size)
        return train_gpt2.GPT(train_gpt2.GPTConfig(**shape))

    def make_optimizer(self):
        compiled = "compile" in self.has
        self.whole = torch.compile(self.model) if compiled else self.model
        if "chunks" in self.has:
            self.whole = train_gpt2.TrainingModel(self.model, compiled)
        fused = {"fused": True} if "fused" in self.has else {"foreach": True}
        return torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), **fused)

    def train(self) -> dict:
        if self.optimizer is None:
            self.optimizer, self.tokens = self.make_optimizer(), self.batch()
        x, y = self.tokens
        start = self.clock()
        with self.processes.autocast():
            loss = self.whole(x, y)
            loss = loss / y.numel() if "chunks" in self.has else loss[1]
        for _ in self.learn(loss):
            pass
        return {"seconds": self.clock() - start, "loss": loss.item(), "peak_mb": self.peak_mb()}


PROGRAMS = {
    **{rung: type("Climber", (Climber,), {"rung": rung}) for rung in RUNGS},
    "transformers": Transformers,
    "ours": Ours,
    "ours, compiled": OursCompiled,
    "ours, int8": OursInt8,
    "peer": Peer,
}


def load_definitions(directory: Path) -> dict:
    """What a program imports and defines, without running the rest of it."""
    kept = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    found = {}
    sys.path.insert(0, str(directory))
    for name in ("hellaswag", "model", "train_gpt2"):
        path = directory / f"{name}.py"
        if path.exists():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            tree.body = [node for node in tree.body if isinstance(node, kept)]
            sys.modules[name] = module = type(sys)(name)
            exec(compile(tree, str(path), "exec"), module.__dict__)
            found |= module.__dict__
    return found


def find_examples(config: Config, count: int) -> list[dict]:
    """`count` examples, evenly over the validation set; made of input.txt where it is missing."""
    path = Path(config.hellaswag_data or hellaswag.FOLDER / "hellaswag_val.jsonl")
    if config.hellaswag_data or path.exists():
        examples = hellaswag.read_examples(path)
        return examples[:: max(1, len(examples) // count)][:count]
    words = (Path(__file__).parent / "input.txt").read_text(encoding="utf-8").split()
    rng, examples = np.random.default_rng(0), []
    for _ in range(count):
        a, b, *lengths = (
            rng.integers(0, len(words) - 200),
            rng.integers(15, 60),
            *rng.integers(5, 35, 4),
        )
        texts = [" ".join(words[a + b : a + b + n]) for n in lengths]
        examples.append(dict(ctx=" ".join(words[a : a + b]), endings=texts, label=0))
    return examples


# -------------------------------------------------------------------------------------------------
# Turns


def serve(pipe, name: str, config: Config, part: str) -> None:
    """A process of its own: does the part once for each message, and answers what it took."""
    try:
        device = train_gpt2.pick_device(config.device, 0)
        program = PROGRAMS[name](config, device, train_gpt2.pick_dtype(config.dtype, device))
        while pipe.recv():
            pipe.send(getattr(program, part)())
    except EOFError:
        pass
    except Exception:
        pipe.send(traceback.format_exc(limit=-1).strip().splitlines()[-1])


def turns(part: str, names: list[str], config: Config, rounds: int) -> dict[str, list]:
    """{program: the results of its turns}; the first turn of each, which warms up, comes on top."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, results = {}, [], {name: [] for name in names}
    for name in names:
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, config, part), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
    for turn in range(rounds + 1):
        for name in list(pipes):
            say(f"{part}: {name}, turn {turn} of {rounds}")
            start = time.perf_counter()
            try:
                with contextlib.suppress(OSError):  # it may have failed and gone: then hear why
                    pipes[name].send(True)
                result = pipes[name].recv()
            except (EOFError, OSError):
                result = "its process ended"
            if isinstance(result, str):
                say(f"{part}: {name} failed: {result}\n")
                del pipes[name], results[name]
                continue
            results[name].append(result | {"wall": time.perf_counter() - start})
    for pipe in pipes.values():
        with contextlib.suppress(OSError):
            pipe.send(False)
    for process in processes:
        process.join(10)
        process.kill()
    say("")
    return results


def say(text: str) -> None:
    """What is going on: one line of standard error, written over."""
    if sys.stderr.isatty() or text.endswith("\n"):
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------
# Figures


def summary(values: list[float]) -> dict:
    """The median, the least and the greatest of some values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def table(title: str, head: list[str], rows: list[list]) -> None:
    """Prints a Markdown table."""
    rows = [[*map(str, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    print(f"\n{title}\n")
    for row in (head, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    sys.stdout.flush()


def rates_table(title: str, unit: str, results: dict, amount) -> dict:
    """Prints and returns rates; amount(result): how much one turn did, per second of it."""
    rates = {
        name: summary([amount(result) / result["seconds"] for result in turns[1:]])
        for name, turns in results.items()
    }
    base = rates.get("transformers")
    rows = [
        [name, f"{r['median']:,.1f}", f"{r['least']:,.1f} to {r['most']:,.1f}",
         f"{r['median'] / base['median']:.2f} x" if base else "-"]
        for name, r in rates.items()
    ]  # fmt: skip
    table(title, ["program", unit, "spread", "of transformers"], rows)
    return rates


def measure_matmul(config: Config, facts: dict) -> float:
    """The fastest product so far, in FLOP/s: a shared machine is not as fast at all times."""
    result = turns("matmul", ["ours"], config, 1)["ours"]
    measured = max(facts.get("measured_flops", 0), *(turn["flops"] for turn in result))
    facts["measured_flops"] = measured
    return measured


def bench_matmul(config: Config, names: list[str], facts: dict) -> dict:
    """The part `matmul`: the fastest product, measured and by the datasheet, in FLOP/s."""
    measured, peak = measure_matmul(config, facts), facts["peak_flops"]
    known = f"{peak / 1e12:,.0f}" if peak else "unknown"
    title = f"Matrix products, {facts['dtype']}"
    table(title, ["measured TFLOP/s", "datasheet"], [[f"{measured / 1e12:.2f}", known]])
    return {"measured": measured, "datasheet": peak}


def bench_train(config: Config, names: list[str], facts: dict) -> dict:
    """The part `train`: speed, parts of a step and memory of each program."""
    names = [n for n in names if n != "ours, int8" and (config.compile or n != "ours, compiled")]
    results = turns("train", names, config, config.rounds)
    if "measured_flops" in facts:
        measure_matmul(config, facts)
    tokens = config.B * config.T
    flops = flops_per_token(config)
    title = f"Training, {facts['dtype']}, B={config.B}, T={config.T}"
    rates = rates_table(title, "tokens/s", results, lambda _: tokens)
    rows, found = [], {}
    for name, result in results.items():
        timed = result[1:]
        parts = {}
        for part in ("forward", "loss", "backward", "optimizer"):
            values = [turn["parts"][part] for turn in timed if part in turn["parts"]]
            parts[part] = 1e3 * statistics.median(values) if values else None
        seconds = statistics.median(turn["seconds"] for turn in timed)
        rate = flops * tokens / seconds
        of = [rate / facts[k] if facts.get(k) else None for k in ("peak_flops", "measured_flops")]
        peak = max(turn["peak_mb"] for turn in result)
        first = result[0]["wall"]
        rows.append(
            [name, f"{1e3 * seconds:,.0f}", *(f"{ms:,.0f}" if ms else "-" for ms in parts.values()),
             f"{peak:,.0f}", *(f"{100 * share:.0f} %" if share else "-" for share in of),
             f"{first:.1f}"]
        )  # fmt: skip
        found[name] = rates[name] | {
            "ms": 1e3 * seconds, "parts_ms": parts, "peak_mb": peak, "first_turn_s": first,
            "mfu": of[0], "of_measured_matmul": of[1],
        }  # fmt: skip
    head = ["program", "ms a step", "forward", "loss", "backward", "optimizer", "peak MB", "MFU",
            "of the measured product", "s to the end of the first two steps"]  # fmt: skip
    table("Its parts, in ms (each waited for)", head, rows)
    return found


def bench_hellaswag(config: Config, names: list[str], facts: dict) -> dict:
    """The part `hellaswag`: examples a second of each program."""
    names = [name for name in names if name not in ("ours, compiled", "ours, int8")]
    results = turns("hellaswag", names, config, config.rounds)
    title = f"HellaSwag, {facts['dtype']}"
    return rates_table(title, "examples/s", results, lambda result: result["count"])


def bench_sample(config: Config, names: list[str], facts: dict) -> dict:
    """The part `sample`: tokens a second of each program."""
    names = [name for name in names if name != "ours, compiled"]
    results = turns("sample", names, config, config.rounds)
    title = f"Sampling 4 x 120 tokens, {facts['dtype']}"
    return rates_table(title, "tokens/s", results, lambda result: result["count"])


def bench_optimizer(config: Config, names: list[str], facts: dict) -> dict:
    """The part `optimizer`: milliseconds of an update by each of our optimizers."""
    timed = turns("optimizers", ["ours"], config, config.rounds)["ours"][1:]
    found = {k: summary([1e3 * turn[k] for turn in timed]) for k in ("adamw", "muon")}
    rows = [[k, f"{ms['median']:,.1f}", f"{ms['least']:,.1f} to {ms['most']:,.1f}"]
            for k, ms in found.items()]  # fmt: skip
    table("An update of all weights", ["optimizer", "ms", "spread"], rows)
    return found


def bench_data(config: Config, names: list[str], facts: dict) -> dict:
    """The part `data`: tokens a second of the loader, MB a second of the tokenizers."""
    timed = turns("data", ["ours"], config, config.rounds)["ours"][1:]
    units = {"loader": "tokens/s", "tiktoken": "MB/s", "gigatoken": "MB/s"}
    found = {n: summary([turn[n] for turn in timed]) for n in units if n in timed[0]}
    rows = [[n, f"{r['median']:,.1f}", units[n], f"{r['least']:,.1f} to {r['most']:,.1f}"]
            for n, r in found.items()]  # fmt: skip
    table("Data, one process", ["what", "rate", "unit", "spread"], rows)
    found["in a run"] = run = turns("loader", ["ours"], config, 1)["ours"][1]
    title = "The loader in steps of 524,288 tokens a second, with the end of a shard in every other"
    head = ["waited for, of a step", "longest step / median", "MB"]
    row = [f"{run['share']:.3%}", f"{run['longest']:.3f}", f"{run['memory_mb']:,.0f}"]
    table(title, head, [row])
    return found


def bench_ladder(config: Config, device: torch.device, dtype: torch.dtype, facts: dict) -> dict:
    """Climbs one rung after the other, each in a process of its own, and draws it."""
    flops = flops_per_token(config)
    found, rows, before = {}, [], None
    for rung, what in RUNGS.items():
        if reason := lacking(rung, device, dtype):
            found[rung] = {"lacking": reason}
            rows.append([rung, what, f"not here: {reason}", "", "", "", "", ""])
            continue
        result = turns("train", [rung], config, config.rounds).get(rung)
        if not result:
            found[rung] = {"lacking": "failed"}
            rows.append([rung, what, "failed, see above", "", "", "", "", ""])
            continue
        seconds = summary([turn["seconds"] for turn in result[1:]])
        ms, rate = 1e3 * seconds["median"], config.B * config.T / seconds["median"]
        mfu = flops * rate / facts["peak_flops"] if facts["peak_flops"] else None
        peak = max(turn["peak_mb"] for turn in result)
        found[rung] = {
            "ms": ms, "least": 1e3 * seconds["least"], "most": 1e3 * seconds["most"],
            "tokens_per_s": rate, "mfu": mfu, "gain": before / ms if before else None,
            "peak_mb": peak, "first_step_s": result[0]["wall"], "loss": result[0]["loss"],
        }  # fmt: skip
        rows.append(
            [rung, what, f"{ms:,.0f}", f"{rate:,.0f}", f"{100 * mfu:.0f} %" if mfu else "-",
             f"{before / ms:.2f} x" if before else "", f"{peak:,.0f}", f"{result[0]['wall']:.1f}"]
        )  # fmt: skip
        before = ms
    title = f"The ladder: a step of B={config.B}, T={config.T}, each rung with all before it"
    head = [
        "rung",
        "what",
        "ms a step",
        "tokens/s",
        "MFU",
        "gain",
        "peak MB",
        "s to the first step",
    ]
    table(title, head, rows)
    draw_ladder(config.plot, found, title, facts)
    return found


def draw_ladder(path: str, found: dict, title: str, facts: dict) -> None:
    """A bar for each rung."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        say("no picture of the ladder: pip install matplotlib\n")
        return
    figure, axes = pyplot.subplots(figsize=(8, 0.5 + 0.45 * len(found)), layout="constrained")
    names = list(found)
    for place, name in enumerate(names):
        ms = found[name].get("ms", 0)
        axes.barh(place, ms, color="#4477aa")
        gain = found[name].get("gain")
        text = f" {ms:,.0f} ms" + (f", {gain:.2f} x" if gain else "")
        axes.text(ms, place, text if ms else f" {found[name]['lacking']}", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(rung.get("ms", 1) for rung in found.values()))
    axes.set_xlabel("ms a step")
    axes.set_title(f"{title}\n{facts['device']}, {facts['date']}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"plot={path!r}: {error.strerror}; choose another file") from None
    print(f"\nA picture of it: {path}")


def flops_per_token(config: Config) -> int:
    """Of a model of the settings' shape, by its own count."""
    shape = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
    with torch.device("meta"), train_gpt2.WithoutInit():
        model = train_gpt2.GPT(train_gpt2.GPTConfig(**shape))
    return model.flops_per_token(config.T)


def gather_facts(device: torch.device, dtype: torch.dtype) -> dict:
    """The machine and the versions, as they belong to every figure."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = [line.split(":")[1].strip() for line in lines if line.startswith("model name")][0]
    name = f"{name}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    packages = ("torch", "transformers", "numpy")
    return {
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "command": "python bench.py " + " ".join(sys.argv[1:]),
        "peak_flops": train_gpt2.peak_flops(name, dtype),
    }


def check(config: Config) -> list[str]:
    """The parts asked for. Raises SettingError where a setting is impossible."""
    train_gpt2.check_system(config)
    parts = list(PARTS) if config.only == "all" else config.only.split(",")
    for part in parts:
        if part not in PARTS:
            raise SettingError(f"only={config.only!r}: {cli.closest(part, PARTS)}")
    for name in ("rounds", "T", "n_layer", "n_head", "n_embd"):
        if getattr(config, name) < 1:
            raise SettingError(f"{name}={getattr(config, name)}: must be at least 1")
    if config.B < 0:
        raise SettingError(f"B={config.B}: must be at least 0")
    if config.n_embd % config.n_head:
        raise SettingError(f"n_embd={config.n_embd}: must be a multiple of n_head={config.n_head}")
    files = [Path(config.peer) / name for name in ("model.py", "train_gpt2.py")]
    if config.peer and not any(file.exists() for file in files):
        raise SettingError(f"peer={config.peer!r}: neither model.py nor train_gpt2.py is there")
    if config.hellaswag_data and not Path(config.hellaswag_data).is_file():
        raise SettingError(f"hellaswag_data={config.hellaswag_data!r}: no such file")
    return parts


def main() -> int:
    config = cli.parse(Config, {}, sys.argv[1:], "How fast GPT-2 is on this machine.")
    parts = check(config)
    device = train_gpt2.pick_device(config.device, 0)
    dtype = train_gpt2.pick_dtype(config.dtype, device)
    config = dataclasses.replace(config, B=config.B or (4 if device.type == "cpu" else 32))
    facts = gather_facts(device, dtype)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"{facts['device']}; {versions}; {facts['date']}")
    print(f"{facts['command']}", flush=True)
    names = ["transformers", "ours", "ours, compiled", "ours, int8"]
    names += ["peer"] if config.peer else []
    found = {"facts": facts}
    if config.ladder:
        found["ladder"] = bench_ladder(config, device, dtype, facts)
        parts = []
    for part in parts:
        found[part] = globals()[f"bench_{part}"](config, names, facts)
    if config.json:
        try:
            Path(config.json).write_text(json.dumps(found, indent=2), encoding="utf-8")
        except OSError as error:
            raise UserError(f"json={config.json!r}: {error.strerror}; choose another") from None
    return 0


if __name__ == "__main__":
    run_main(main)
