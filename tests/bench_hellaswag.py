"""hellaswag.py beside the plain loop: the same scores, in how much memory. (bench.py: how fast.)

    python tests/bench_hellaswag.py hellaswag/hellaswag_val.jsonl [--device=cuda] [--only=memory]

The plain loop is build-nanogpt's: one example at a time, its four rows padded to the longest, full
logits. Prints

1. a small random model in float32, all examples: the largest difference of an ending's loss, and
   how many predictions differ;
2. GPT-2 124M, random, in the device's own precision, 1,000 examples: the same;
3. the memory of this process during an evaluation of all examples by the small model.
"""

import argparse
import sys
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
    parser.add_argument("--only", default="all", choices=("all", "memory"))
    options = parser.parse_args()
    device = train_gpt2.pick_device(options.device, 0)
    train_gpt2.keep_freed_memory()
    examples = hellaswag.read_examples(options.data)
    torch.manual_seed(1337)
    exact = Processes(0, 1, device, torch.float32)
    fast = Processes(0, 1, device, train_gpt2.pick_dtype("auto", device))
    small = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64)).to(device)
    if options.only == "all":
        compare("small model in float32", small, examples, exact)
        model = GPT(GPTConfig()).to(device)
        dtype = str(fast.dtype).removeprefix("torch.")
        compare(f"124M in {dtype}", model, examples[:: len(examples) // 1000][:1000], fast)
    memory_over(small, examples, exact)


if __name__ == "__main__":
    main()
