"""hellaswag.py beside the plain loop: the same scores, how much faster, in how much memory.

    python tests/bench_hellaswag.py hellaswag/hellaswag_val.jsonl [--device=cuda] [--rounds=3]
        [--peer=build-nanogpt] [--only=speed]

The plain loop is build-nanogpt's: one example at a time, its four rows padded to the longest, full
logits. Prints

1. a small random model in float32, all examples: the largest difference of an ending's loss, and
   how many predictions differ;
2. GPT-2 124M, random, in the device's own precision, 1,000 examples: the same;
3. GPT-2 124M: examples a second of both, medians of alternating rounds; with --peer, a checkout of
   build-nanogpt, its own code in a process of its own beside them;
4. the memory of this process during an evaluation of all examples by the small model.
"""

import argparse
import ast
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hellaswag  # noqa: E402
import train_gpt2  # noqa: E402
from train_gpt2 import GPT, GPTConfig, Processes  # noqa: E402

FEW = 48  # examples in a turn of the slow loops


@torch.no_grad()
def plain_losses(model: GPT, examples: list[dict], processes: Processes) -> np.ndarray:
    """The summed loss of each ending, (examples, 4), as the plain loop has it."""
    losses = []
    for example in examples:
        _, tokens, mask, _ = hellaswag.render_example(example)
        tokens, mask = tokens.to(processes.device), mask.to(processes.device)
        with processes.autocast():
            logits, _ = model(tokens)
        flat = logits[:, :-1].flatten(0, 1)
        by_token = F.cross_entropy(flat.float(), tokens[:, 1:].flatten(), reduction="none")
        losses.append((by_token.view(4, -1) * mask[:, 1:]).sum(dim=1).double().cpu().numpy())
    return np.stack(losses)


def compare(name: str, model: GPT, examples: list[dict], processes: Processes) -> None:
    questions = [hellaswag.make_question(example, "completion") for example in examples]
    ours = hellaswag.ending_losses(model, questions, processes)
    plain = plain_losses(model, examples, processes)
    pairs = zip(hellaswag.predict(ours, questions), hellaswag.predict(plain, questions))
    differ = [int((a != b).sum()) for a, b in pairs]
    gap = np.abs(ours - plain)
    print(
        f"{name}, {len(examples):,} examples: losses of {plain.mean():.1f} nats differ by "
        f"{gap.mean():.2g} on average, {gap.max():.2g} at most; predictions that differ: "
        f"{differ[0]} of acc, {differ[1]} of acc_norm",
        flush=True,
    )


def definitions(path: Path) -> dict:
    """What a script imports and defines, without running the rest of it."""
    kept = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, kept)]
    names = {"__name__": path.stem, "__file__": str(path)}
    sys.modules[path.stem] = module = type(sys)(path.stem)
    module.__dict__.update(names)
    exec(compile(tree, path, "exec"), module.__dict__)
    return module.__dict__


@torch.no_grad()
def serve_peer(directory: Path, examples: list[dict], device: torch.device, dtype) -> None:
    """build-nanogpt's loop: a turn, and its examples/s, for each line that this process is sent."""
    sys.path.insert(0, str(directory))
    del sys.modules["hellaswag"], sys.modules["train_gpt2"]
    scoring, train = (definitions(directory / f"{name}.py") for name in ("hellaswag", "train_gpt2"))
    scoring["enc"] = hellaswag.tokenizer.get_encoding()
    model = train["GPT"](train["GPTConfig"](vocab_size=50304)).to(device).eval()
    for _ in sys.stdin:
        start = time.perf_counter()
        for example in examples:
            _, tokens, mask, _ = scoring["render_example"](example)
            tokens, mask = tokens.to(device), mask.to(device)
            with torch.autocast(device.type, dtype=dtype):
                logits, _ = model(tokens)
            train["get_most_likely_row"](tokens, mask, logits)
        print("rate", len(examples) / (time.perf_counter() - start), flush=True)


class Peer:
    """build-nanogpt in a process of its own, with nothing of ours done to its memory."""

    def __init__(self):
        command = [sys.executable, __file__, *sys.argv[1:], "--serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, bufsize=1, **pipes)

    def rate(self) -> float:
        """Examples a second of one more turn."""
        self.process.stdin.write("go\n")
        for line in self.process.stdout:
            if line.startswith("rate "):
                return float(line.split()[1])
        raise RuntimeError("the peer's process ended")


def every(examples: list[dict], count: int) -> list[dict]:
    """About `count` of the examples, evenly over all."""
    return examples[:: max(1, len(examples) // count)]


def speed(model: GPT, examples: list[dict], processes: Processes, rounds: int, peer) -> None:
    """Ours gets 16 times the examples, so that each takes some seconds."""
    few = every(examples, FEW)
    questions = [hellaswag.make_question(example, "completion") for example in every(examples, 768)]
    rates = {"build-nanogpt": [], "plain loop": [], "hellaswag.py": []}
    for turn in range(rounds + 1):
        theirs = peer.rate() if peer else None
        start = time.perf_counter()
        plain_losses(model, few, processes)
        between = time.perf_counter()
        hellaswag.ending_losses(model, questions, processes)
        end = time.perf_counter()
        if turn > 0:  # the first warms up
            rates["plain loop"].append(len(few) / (between - start))
            rates["hellaswag.py"].append(len(questions) / (end - between))
            if peer:
                rates["build-nanogpt"].append(theirs)
    rates = {name: values for name, values in rates.items() if values}
    base = statistics.median(rates["plain loop"])
    for name, values in rates.items():
        median = statistics.median(values)
        print(
            f"{name}: {median:.1f} examples/s ({min(values):.1f} to {max(values):.1f}), "
            f"{median / base:.2f} x"
        )


def resident_mb() -> float:
    """This process's memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def memory_over(model: GPT, examples: list[dict], processes: Processes) -> None:
    """Prints the memory after each tenth of the batches of one evaluation of all examples."""
    questions = [hellaswag.make_question(example, "completion") for example in examples]
    memory, told = [], 0

    def tell(losses, known) -> None:
        nonlocal told
        if known.mean() >= told / 10:
            told += 1
            memory.append(f"{resident_mb():.0f}")

    hellaswag.ending_losses(model, questions, processes, tell)
    print(f"memory after each tenth of {len(questions):,} examples: {', '.join(memory)} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="a checkout of build-nanogpt")
    parser.add_argument("--only", default="all", choices=("all", "speed", "memory"))
    parser.add_argument("--serve", action="store_true", help="what --peer starts")
    options = parser.parse_args()
    device = train_gpt2.pick_device(options.device, 0)
    examples = hellaswag.read_examples(options.data)
    torch.manual_seed(1337)
    exact = Processes(0, 1, device, torch.float32)
    fast = Processes(0, 1, device, train_gpt2.pick_dtype("auto", device))
    if options.serve:
        return serve_peer(options.peer, every(examples, FEW), device, fast.dtype)
    peer = Peer() if options.peer else None
    train_gpt2.keep_freed_memory()
    small = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64)).to(device)
    model = GPT(GPTConfig()).to(device)
    dtype = str(fast.dtype).removeprefix("torch.")
    if options.only == "all":
        compare("small model in float32", small, examples, exact)
        compare(f"124M in {dtype}", model, every(examples, 1000)[:1000], fast)
    if options.only != "memory":
        speed(model, examples, fast, options.rounds, peer)
    if options.only != "speed":
        memory_over(small, examples, exact)


if __name__ == "__main__":
    main()
