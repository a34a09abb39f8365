"""hellaswag.py beside the plain loop: the same scores, how much faster, in how much memory.

    python tests/bench_hellaswag.py hellaswag/hellaswag_val.jsonl [--device=cuda] [--rounds=3]

The plain loop is build-nanogpt's: one example at a time, its four rows padded to the longest, full
logits. Prints

1. a small random model in float32, all examples: the largest difference of an ending's loss, and
   how many predictions differ;
2. GPT-2 124M, random, in the device's own precision, 1,000 examples: the same;
3. GPT-2 124M: examples a second of both, medians of alternating rounds;
4. the memory of this process after each quarter of the small model's examples.
"""

import argparse
import statistics
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


def speed(model: GPT, examples: list[dict], processes: Processes, rounds: int) -> None:
    """Ours gets 16 times the examples, so that each takes some seconds."""
    few = examples[:: max(1, len(examples) // 48)]
    many = examples[:: max(1, len(examples) // 768)]
    questions = [hellaswag.make_question(example, "completion") for example in many]
    rates = {"plain loop": [], "hellaswag.py": []}
    for turn in range(rounds + 1):
        start = time.perf_counter()
        plain_losses(model, few, processes)
        between = time.perf_counter()
        hellaswag.ending_losses(model, questions, processes)
        end = time.perf_counter()
        if turn > 0:  # the first warms up
            rates["plain loop"].append(len(few) / (between - start))
            rates["hellaswag.py"].append(len(many) / (end - between))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = train_gpt2.pick_device(options.device, 0)
    train_gpt2.keep_freed_memory()
    examples = hellaswag.read_examples(options.data)
    torch.manual_seed(1337)
    exact = Processes(0, 1, device, torch.float32)
    fast = Processes(0, 1, device, train_gpt2.pick_dtype("auto", device))
    small = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64)).to(device)
    compare("small model in float32", small, examples, exact)
    model = GPT(GPTConfig()).to(device)
    dtype = str(fast.dtype).removeprefix("torch.")
    compare(f"124M in {dtype}", model, examples[:: len(examples) // 1000][:1000], fast)
    speed(model, examples, fast, options.rounds)

    questions = [hellaswag.make_question(example, "completion") for example in examples]
    quarter, memory = len(questions) // 4, []
    for i in range(4):
        hellaswag.ending_losses(small, questions[i * quarter : (i + 1) * quarter], exact)
        memory.append(f"{resident_mb():.0f}")
    print(f"memory after each quarter of the examples: {', '.join(memory)} MB")


if __name__ == "__main__":
    main()
