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

The code of a peer runs unchanged; its optimizer is PyTorch's AdamW, fused on CUDA.

The file --json holds the machine under "facts", and the figures of each part under its name.
"""

import ast
import dataclasses
import functools
import importlib.metadata
import json
import math
import multiprocessing
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import train_gpt2
from support import cli, devices, hellaswag_eval, quantize
from support.distributed import Runtime
from support.errors import SettingError, run_main


@dataclass
class Config:
    """The settings, also on the command line."""

    only: str = "all"  # or of matmul,train,hellaswag,sample,optimizer
    peer: str = ""  # directory of another GPT-2 program to time in the same way
    ladder: bool = False  # instead of the parts: from plain float32 upwards, one change at a time
    rounds: int = 3  # timed turns of each program
    B: int = 0  # rows of a training step; 0: 4 on a CPU, 32 on a GPU, 16 there with --ladder
    T: int = 1024  # tokens in each row
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # width of the residual stream
    hellaswag_data: str = ""  # a .jsonl; "": hellaswag/hellaswag_val.jsonl, else downloaded
    json: str = ""  # a file for the figures
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of the matrix products: auto, float32, bfloat16, float16

    @property
    def shape(self) -> dict:
        """The arguments for the size of the model, which all programs share."""
        layers = dict(n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd)
        return dict(block_size=max(1024, self.T), **layers)


def choose_runtime(config: Config) -> Runtime:
    """Device and dtype of the settings, for one process."""
    device = devices.choose_device(config.device)
    return Runtime(0, 1, device, devices.choose_dtype(config.dtype, device))


# -------------------------------------------------------------------------------------------------
# The ladder: each rung adds one change to those before it

# Karpathy's lecture took the first seven on an A100 in 1000, 333, 300, 130, 96, 93 and 90 ms
# (B = 16, T = 1024).
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


def find_obstacle(rung: str, config: Config) -> str | None:
    """Why a rung does not exist on the device of the settings; None if it does."""
    runtime = choose_runtime(config)
    cuda = runtime.device.type == "cuda"
    if rung == "TF32" and not (cuda and torch.cuda.get_device_capability() >= (8, 0)):
        return "no tensor cores"
    if rung == "bfloat16" and runtime.dtype == torch.float32:
        return "no bfloat16 units"
    if rung == "memory" and (runtime.device.type != "cpu" or sys.platform != "linux"):
        return "the device's own allocator does it"
    return None


def plain_attention(q, k, v, mask=None, is_causal=False):
    """F.scaled_dot_product_attention as a textbook writes it."""
    T = q.size(2)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3))
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(dim=3) @ v


# -------------------------------------------------------------------------------------------------
# The programs


class Program:
    """A model and its work; `train`, `hellaswag` and `sample` do one turn and return its figures:
    seconds, the count of tokens or examples, and more."""

    def __init__(self, config: Config):
        self.config, self.runtime = config, choose_runtime(config)
        self.device = self.runtime.device
        torch.manual_seed(1337)
        self.model = self.build_model().to(self.device)

    def clock(self) -> float:
        """Seconds, once the device has finished its work."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def time(self, work) -> float:
        """The seconds that `work()` takes."""
        start = self.clock()
        work()
        return self.clock() - start

    def peak_mb(self) -> float:
        """The peak memory of the GPU, or of this process on other devices, in MB."""
        return (devices.peak_memory_mib(self.device) or math.nan) * 2**20 / 1e6

    @functools.cached_property
    def batch(self):
        """x, y int64 (B, T): random ids; the speed does not depend on them."""
        return torch.randint(50257, (2, self.config.B, self.config.T), device=self.device)

    @functools.cached_property
    def optimizer(self):
        """The AdamW that the program would use."""
        return torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=self.device.type == "cuda")

    def loss(self, x, y, mark):
        """The mean loss of a batch; calls mark("forward") and mark("loss") when each is done."""
        logits = self.logits(x)
        mark("forward")
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        mark("loss")
        return loss

    def step(self, mark=lambda part: None) -> torch.Tensor:
        """One training step; calls mark(part) when a part is done. Returns the loss."""
        with self.runtime.autocast():
            loss = self.loss(*self.batch, mark)
        loss.backward()
        mark("backward")
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mark("optimizer")
        return loss

    def train(self) -> dict:
        """A training step: its loss, and the seconds of its parts, each of which is waited for."""
        self.step()  # allocates what the last turn has given back, and fills the caches again
        parts, last = {}, self.clock()

        def mark(part: str) -> None:
            nonlocal last
            now = self.clock()
            parts[part], last = now - last, now

        loss, count = self.step(mark).item(), self.batch[0].numel()
        return {"seconds": sum(parts.values()), "count": count, "loss": loss, "parts": parts}

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

    @torch.no_grad()
    def sample(self) -> dict:
        """Continues four rows of 8 tokens by 120 each."""
        prompt = torch.randint(50257, (4, 8), device=self.device)
        start = self.clock()
        text = self.generate(prompt, 120)
        return {"seconds": self.clock() - start, "count": text[:, 8:].numel()}

    def generate(self, idx, n: int):
        """`idx` (B, T) continued by n ids each, top_k 50."""
        with self.runtime.autocast():
            return self.model.generate(idx, n, top_k=50)


class Ours(Program):
    """This repository's training, scoring and sampling, with some changes: rungs, and int8."""

    def __init__(self, config: Config, changes=tuple(RUNGS)):
        self.has = {change for change in changes if find_obstacle(change, config) is None}
        super().__init__(config)

    def build_model(self):
        if "bfloat16" not in self.has:
            self.runtime.dtype = torch.float32
        if "memory" in self.has:
            devices.keep_freed_memory()
        torch.set_float32_matmul_precision("high" if "TF32" in self.has else "highest")
        if "flash" not in self.has:
            F.scaled_dot_product_attention = plain_attention
        if "rows" not in self.has:
            train_gpt2.GPTConfig.padded_vocab_size = property(lambda config: config.vocab_size)
        model = build_gpt(self.config)
        return quantize.to_int8(model) if "int8" in self.has else model

    @functools.cached_property
    def optimizer(self):
        kind = self.device.type if "fused" in self.has else ""
        return train_gpt2.configure_optimizer(self.model, train_gpt2.Config(), kind)

    @functools.cached_property
    def training_model(self):
        return train_gpt2.TrainingModel(self.model, "compile" in self.has)

    def loss(self, x, y, mark):
        hidden = self.training_model.hidden(x)
        mark("forward")
        if "chunks" in self.has:
            loss = self.training_model.loss(hidden, y)
        else:  # all logits at once, differentiated by autograd
            parameters = self.training_model.head[0].used.values()
            loss = self.training_model.train_loss(hidden.flatten(0, 1), y.flatten(), *parameters)
        mark("loss")
        return loss / y.numel()

    def hellaswag(self) -> dict:
        examples = find_examples(self.config, 256 if self.device.type == "cpu" else 10042)
        questions = [hellaswag_eval.make_question(example, "completion") for example in examples]
        score = functools.partial(hellaswag_eval.ending_losses, self.model, questions, self.runtime)
        return {"seconds": self.time(score), "count": len(examples)}

    def matmul(self) -> dict:
        """The highest rate of a large product, in FLOP/s."""
        n = 2048 if self.device.type == "cpu" else 8192
        a, b, c = torch.randn(3, n, n, device=self.device, dtype=self.runtime.dtype)
        seconds = min(self.time(lambda: torch.mm(a, b, out=c)) for _ in range(30))
        return {"flops": 2 * n**3 / seconds}

    def optimizers(self) -> dict:
        """Seconds of an update by each of our optimizers, without making the gradients."""
        for parameter in self.model.parameters():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        seconds = {}
        for kind in ("adamw", "muon"):
            config = train_gpt2.Config(optimizer=kind)
            optimizer = train_gpt2.configure_optimizer(self.model, config, self.device.type)
            optimizer.step()  # also allocates the moments
            seconds[kind] = self.time(optimizer.step)
        return seconds


class Transformers(Program):
    """GPT2LMHeadModel; it samples with its KV cache and with weights in the dtype, not autocast."""

    def build_model(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = self.config.shape
        shape["n_positions"] = shape.pop("block_size")
        return GPT2LMHeadModel(GPT2Config(**shape)).eval()  # without dropout

    def logits(self, idx):
        return self.model(idx, use_cache=False).logits

    def generate(self, idx, n: int):
        return self.model.to(self.runtime.dtype).generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=True, top_k=50,
            pad_token_id=50256, eos_token_id=None,
        )  # fmt: skip


class Peer(Program):
    """The GPT(GPTConfig) in another program's model.py or train_gpt2.py."""

    def build_model(self):
        names = load_definitions(find_peer(self.config))
        model = names["GPT"](names["GPTConfig"](vocab_size=50304, **self.config.shape))
        # nanoGPT computes the logits of all positions only if it is given targets.
        self.needs_targets = model(torch.zeros(1, 2, dtype=torch.int64))[0].size(1) == 1
        return model

    def logits(self, idx):
        return self.model(idx, idx if self.needs_targets else None)[0]

    def loss(self, x, y, mark):
        _, loss = self.model(x, y)
        mark("forward")
        return loss

    def generate(self, idx, n: int):
        if hasattr(self.model, "generate"):
            return super().generate(idx, n)
        for _ in range(n):  # as in build-nanogpt
            with self.runtime.autocast():
                logits, _ = self.model(idx)
            p = F.softmax(logits[:, -1], dim=-1)
            likeliest, ids = torch.topk(p, 50, dim=-1)
            idx = torch.cat((idx, ids.gather(1, torch.multinomial(likeliest, 1))), dim=1)
        return idx


PROGRAMS = {
    "transformers": Transformers,
    "ours": functools.partial(Ours, changes=[rung for rung in RUNGS if rung != "compile"]),
    "ours, compiled": Ours,
    "ours, int8": functools.partial(Ours, changes=[*RUNGS, "int8"]),
    "peer": Peer,
}
for number, rung in enumerate(RUNGS, 1):
    PROGRAMS[rung] = functools.partial(Ours, changes=list(RUNGS)[:number])


def build_gpt(config: Config) -> train_gpt2.GPT:
    """This repository's model in the size of the settings."""
    return train_gpt2.GPT(train_gpt2.GPTConfig(**config.shape))


def find_peer(config: Config) -> Path:
    """The file of the other program's model. Raises SettingError if it is missing."""
    for path in (Path(config.peer, "model.py"), Path(config.peer, "train_gpt2.py")):
        if path.exists():
            return path
    raise SettingError(f"peer={config.peer!r}: has neither model.py nor train_gpt2.py")


def load_definitions(path: Path) -> dict:
    """The imports, classes and functions of a program, without running its other statements.

    What it imports from build-nanogpt's hellaswag.py is in ours.
    """
    kept = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, kept)]
    sys.path.append(str(path.parent))
    names = {"__name__": "peer"}
    exec(compile(tree, str(path), "exec"), names)
    return names


def find_examples(config: Config, count: int) -> list[dict]:
    """`count` examples of HellaSwag, evenly from the file."""
    path = hellaswag_eval.find_file(data=config.hellaswag_data or None)
    examples = hellaswag_eval.read_examples(path)
    return examples[:: max(1, len(examples) // count)][:count]


# -------------------------------------------------------------------------------------------------
# Turns, tables and parts

_programs = {}  # {name: Program} of this process, which is the process of one program


def do_turn(name: str, config: Config, part: str) -> dict:
    """The figures of one turn of a program, which is built in the first one."""
    if name not in _programs:
        _programs[name] = PROGRAMS[name](config)
    program = _programs[name]
    figures = getattr(program, part)() | {"peak_mb": program.peak_mb()}
    if program.device.type == "cuda":  # memory for the other programs of the part
        program.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return figures


def take_turns(part: str, names: list[str], config: Config) -> dict[str, list]:
    """{program: figures of `rounds` + 1 turns}, without programs that failed. Turn 0 warms up."""
    context = multiprocessing.get_context("spawn")
    processes = {name: ProcessPoolExecutor(1, context) for name in names}
    results = {name: [] for name in names}
    for turn in range(config.rounds + 1):
        for name in list(results):
            print(f"{part}: {name}, turn {turn} of {config.rounds}", file=sys.stderr, flush=True)
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


def find_rates(results: dict[str, list], config: Config, machine: dict) -> dict[str, dict]:
    """{program: its figures} of what `take_turns` returns: units a second, also in turn 0, peak_mb,
    ratio to transformers; of training steps also milliseconds and shares of the machine's peak."""
    rates = {}
    for name, (first, *timed) in results.items():
        rate = summarize([turn["count"] / turn["seconds"] for turn in timed])
        rate["first"] = first["count"] / first["seconds"]
        rate["peak_mb"] = max(turn["peak_mb"] for turn in (first, *timed))
        rates[name] = rate
        if "transformers" in rates:
            rate["of_transformers"] = rate["median"] / rates["transformers"]["median"]
        if "loss" in first:
            flops = flops_per_token(config) * rate["median"]
            for share, peak in (("mfu", "peak_flops"), ("of_measured_matmul", "measured_flops")):
                rate[share] = flops / machine[peak] if machine.get(peak) else None
            rate["ms"] = 1e3 * first["count"] / rate["median"]
            rate["first_turn_s"] = first["wall"]
        if "parts" in first:
            parts = rate["parts_ms"] = dict.fromkeys(STEP_PARTS)
            for part in first["parts"]:
                parts[part] = 1e3 * statistics.median(turn["parts"][part] for turn in timed)
    return rates


def flops_per_token(config: Config) -> int:
    """Of training a model of the settings' shape."""
    with torch.device("meta"):
        return build_gpt(config).flops_per_token(config.T)


SPREAD = "{least:,.1f} to {most:,.1f}"
STEP_PARTS = ("forward", "loss", "backward", "optimizer")


def print_table(title: str, columns: dict[str, str], records: dict[str, dict]) -> None:
    """Prints a Markdown table with a line for each record; "-" for figures that are None.

    columns: {heading: format of a cell, with the keys of a record}; records: {name: figures}
    """

    def format_cell(form: str, figures: dict) -> str:
        try:
            return form.format(**figures)
        except (KeyError, TypeError):  # TypeError: None has no such format
            return "-"

    rows = [["", *columns]]
    for name, figures in records.items():
        rows.append([name, *(format_cell(form, figures) for form in columns.values())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    print(f"\n{title}\n")
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    sys.stdout.flush()


def bench_programs(part: str, title: str, unit: str, config: Config, machine: dict) -> dict:
    """The rates of all programs that can do a part."""
    names = ["transformers", "ours"]
    names += {"train": ["ours, compiled"], "sample": ["ours, int8"]}.get(part, [])
    names += ["peer"] if config.peer else []
    rates = find_rates(take_turns(part, names, config), config, machine)
    columns = {unit: "{median:,.1f}", "spread": SPREAD}
    columns |= {"first turn": "{first:,.1f}"} if part == "sample" else {}  # warms the caches up
    columns |= {"of transformers": "{of_transformers:.2f} x", "peak MB": "{peak_mb:,.0f}"}
    print_table(f"{title}, {machine['dtype']}", columns, rates)
    return rates


def bench_train(config: Config, machine: dict) -> dict:
    """Speed, memory and parts of a step of each program."""
    title = f"Training, B={config.B}, T={config.T}"
    rates = bench_programs("train", title, "tokens/s", config, machine)
    columns = {"ms a step": "{ms:,.0f}"}
    columns |= {part: f"{{parts_ms[{part}]:,.0f}}" for part in STEP_PARTS}
    columns |= {"MFU": "{mfu:.0%}", "of the measured product": "{of_measured_matmul:.0%}"}
    columns |= {"s to the end of the first turn": "{first_turn_s:.1f}"}
    print_table("Its parts, in ms (each waited for)", columns, rates)
    return rates


def bench_ladder(config: Config, machine: dict) -> dict:
    """A training step on each rung of the ladder, one after the other."""
    found, before = {}, None
    for rung in RUNGS:
        obstacle = find_obstacle(rung, config)
        results = {} if obstacle else take_turns("train", [rung], config)
        if rung in results:
            step = find_rates(results, config, machine)[rung]
            step["loss"], step["tokens_per_s"] = results[rung][0]["loss"], step["median"]
            step["first_step_s"] = step.pop("first_turn_s")
            step["gain"], before = before and step["median"] / before, step["median"]
        else:
            step = {"lacking": obstacle or "failed"}
        found[rung] = step
    columns = {"what": "{what}", "ms a step": "{ms:,.1f}", "tokens/s": "{median:,.0f}"}
    columns |= {"spread": SPREAD, "gain": "{gain:.2f} x", "peak MB": "{peak_mb:,.0f}"}
    columns |= {"not here": "{lacking}"}
    title = f"The ladder: a step of B={config.B}, T={config.T}, each rung with all before it"
    print_table(title, columns, {rung: found[rung] | {"what": RUNGS[rung]} for rung in found})
    return found


def bench_matmul(config: Config, machine: dict) -> dict:
    """The fastest product, measured and by the datasheet, in FLOP/s."""
    if not (turns := take_turns("matmul", ["ours"], config).get("ours")):
        return {}
    machine["measured_flops"] = max(turn["flops"] for turn in turns)
    found = {"measured": machine["measured_flops"], "datasheet": machine["peak_flops"]}
    columns = {"measured FLOP/s": "{measured:.3g}", "datasheet": "{datasheet:.3g}"}
    print_table("Matrix products", columns, {machine["dtype"]: found})
    return found


def bench_optimizer(config: Config, machine: dict) -> dict:
    """Milliseconds of an update by each of our optimizers."""
    if not (turns := take_turns("optimizers", ["ours"], config).get("ours")):
        return {}
    found = {k: summarize([1e3 * turn[k] for turn in turns[1:]]) for k in ("adamw", "muon")}
    print_table("An update of all weights", {"ms": "{median:,.1f}", "spread": SPREAD}, found)
    return found


PARTS = {
    "matmul": bench_matmul,
    "train": bench_train,
    "hellaswag": functools.partial(bench_programs, "hellaswag", "HellaSwag", "examples/s"),
    "sample": functools.partial(bench_programs, "sample", "Sampling 4 x 120 tokens", "tokens/s"),
    "optimizer": bench_optimizer,
}


# -------------------------------------------------------------------------------------------------
# The command


def describe_machine(runtime: Runtime) -> dict:
    """The machine, the versions and the date that belong to every figure."""
    name = devices.device_name(runtime.device)
    if runtime.device.type != "cuda":
        model = re.search(r"model name\s*: (.*)", devices.read_text(Path("/proc/cpuinfo")))
        name = f"{model[1] if model else name}, {torch.get_num_threads()} threads"
    packages = ("torch", "transformers", "numpy")
    return {
        "device": name,
        "dtype": devices.dtype_name(runtime.dtype),
        "date": time.strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "command": "python bench.py " + " ".join(sys.argv[1:]),
        "peak_flops": devices.peak_flops(name, runtime.dtype),
    }


def validate(config: Config) -> list[str]:
    """The parts to run. Raises SettingError if a setting is not valid."""
    devices.validate_device_and_dtype(config.device, config.dtype)
    parts = list(PARTS) if config.only == "all" else config.only.split(",")
    for part in parts:
        if part not in PARTS:
            raise SettingError(f"only={config.only!r}: {cli.suggest(part, PARTS)}")
    for name, least in dict(B=0, rounds=1, T=1, n_layer=1, n_head=1, n_embd=1).items():
        if getattr(config, name) < least:
            raise SettingError(f"{name}={getattr(config, name)}: must be at least {least}")
    if config.n_embd % config.n_head:
        raise SettingError(f"n_embd={config.n_embd}: must be a multiple of n_head={config.n_head}")
    if config.peer:
        find_peer(config)
    if config.hellaswag_data and not Path(config.hellaswag_data).is_file():
        raise SettingError(f"hellaswag_data={config.hellaswag_data!r}: no such file")
    try:
        if config.json:
            open(config.json, "a").close()
    except OSError as error:
        raise SettingError(f"json={config.json!r}: {error.strerror}; choose another") from None
    return parts


def main() -> int:
    config = cli.parse(Config, {}, sys.argv[1:], "Speed of GPT-2 on this machine.")
    parts = validate(config)
    runtime = choose_runtime(config)
    B = 4 if runtime.device.type == "cpu" else 16 if config.ladder else 32
    config, machine = dataclasses.replace(config, B=config.B or B), describe_machine(runtime)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{machine['device']}; {versions}; {machine['date']}\n{machine['command']}", flush=True)
    run = {"ladder": bench_ladder} if config.ladder else {part: PARTS[part] for part in parts}
    found = {"facts": machine}
    for part, bench in run.items():
        found[part] = bench(config, machine)
        if config.json:
            Path(config.json).write_text(json.dumps(found, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
