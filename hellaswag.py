"""Scores a GPT-2 on HellaSwag: which of four endings does the model find likeliest?

    python hellaswag.py -m gpt2                          # OpenAI's GPT-2 124M, from the Hub
    python hellaswag.py -m log/step_19073 -d cuda        # a checkpoint (or log/: its newest one)
    python hellaswag.py -m gpt2 --style=harness --limit=1000 --out=results.jsonl

Three styles, which give different numbers:

    completion  build-nanogpt's: the text as it is; GPT-2 124M has acc 0.2859, acc_norm 0.2955
    harness     lm-evaluation-harness's: cleaned text; GPT-2 124M has acc 0.2892, acc_norm 0.3114
    choice      the endings are shown as A to D and the letter is scored: for larger models

`acc` takes the ending with the lowest summed loss; `acc_norm` with the lowest per token
(completion) or per character (harness). The context is computed once for its four endings, which
stand behind it in one row and do not see each other:

    tokens    A  man  is  on  a  roof | he  sits  down | they  fly | he  runs | ...
    position  0   1    2   3  4   5   |  6   7     8   |  6     7  |  6   7   | ...
    segment   0   0    0   0  0   0   |  1   1     1   |  2     2  |  3   3   | ...

A token sees those before it in its own segment and in segment 0. Where context and ending are too
long for the model, the context loses its first tokens.

The data is looked for in hellaswag/hellaswag_val.jsonl and else fetched once.
Source: Zellers et al. 2019 (the dataset); build-nanogpt's hellaswag.py, whose names are kept.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from support import huggingface, tokenizer
from support.cli import Parser
from support.errors import SettingError, UserError, run_main

STYLES = ("completion", "harness", "choice")
FOLDER = Path(__file__).resolve().parent / "hellaswag"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{}.jsonl"
EXAMPLES = {"train": 39905, "val": 10042, "test": 10003}
# Tokens in one forward pass. What the CPU takes at a time should stay in its caches.
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768, "mps": 16384}
HEAD_ROWS = {"cpu": 256, "cuda": 4096, "mps": 2048}  # of logits at a time
LENGTH_STEP = 8  # rows are padded to a multiple of it, so that there are few shapes

# -------------------------------------------------------------------------------------------------
# Data


def find_file(split: str = "val", data: str | None = None, say=print) -> Path:
    """The examples of a split, fetched if need be: by one process of a machine, for the others too.

    data: a file to take instead
    Raises UserError where there is none and it cannot be fetched.
    """
    if data is not None:
        if not Path(data).is_file():
            raise UserError(f"data={data!r}: no such file; python hellaswag.py fetches one")
        return Path(data)
    path = FOLDER / f"hellaswag_{split}.jsonl"
    if not is_whole(path, split):
        from filelock import FileLock, Timeout

        try:
            FOLDER.mkdir(exist_ok=True)
            lock = FileLock(FOLDER / f".{path.name}.lock")
            try:
                with lock.acquire(blocking=False):
                    if not is_whole(path, split):
                        fetch(split, path, say)
            except Timeout:  # another process is at it: what it cannot get, this one could not
                with lock:
                    if not is_whole(path, split):
                        raise UserError(f"{path}: another process could not fetch it") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}; put the file there") from None
    return path


def is_whole(path: Path, split: str) -> bool:
    """Whether a file has as many lines as the split has examples."""
    return path.is_file() and path.read_bytes().count(b"\n") == EXAMPLES[split]


def fetch(split: str, path: Path, say) -> None:
    """Fetches a split to `path`; what arrives is looked at before it gets that name."""
    import urllib.request
    from http.client import HTTPException  # an answer that is cut short, or is no HTTP

    url, partial = URL.format(split), path.with_name(f".{path.name}.partial")
    say(f"fetching {url}")
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            partial.write_bytes(response.read())
    except (OSError, HTTPException) as error:
        raise UserError(
            f"{path}: not here as a whole, and {url} does not answer ({error}); put the file there"
        ) from None
    if not is_whole(partial, split):
        lines = partial.read_bytes().count(b"\n")
        partial.unlink()
        raise UserError(
            f"{path}: {url} gave {lines:,} lines, and not {EXAMPLES[split]:,}; try again, or put "
            "the file there"
        )
    os.replace(partial, path)


def read_examples(path: Path, limit: int = 0, labelled: bool = True) -> list[dict]:
    """The examples of a file, or its first `limit`. Raises UserError where a line is none.

    labelled: False for the test split, whose answers are not public
    """
    examples, number = [], 0
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                number += 1
                if line.strip():
                    examples.append(json.loads(line))
                    check_example(examples[-1], labelled)
                if len(examples) == limit > 0:
                    break
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: line {number:,} is no HellaSwag example ({error!r})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; cannot be read") from None
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples


def check_example(example: dict, labelled: bool) -> None:
    """Makes the label a number. Raises ValueError and the like where fields are not as they are."""
    endings = example["endings"]
    texts = [example["activity_label"], example["ctx"], *endings]
    texts += [example[name] for name in ("ctx_a", "ctx_b") if name in example]
    if not isinstance(endings, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("activity_label, ctx and endings must be text")
    if labelled:
        example["label"] = int(example["label"])
    if len(endings) != 4 or labelled and not 0 <= example["label"] < 4:
        raise ValueError("not four endings and the number of one of them")


def iterate_examples(split: str):
    """Yields the examples of a split (`train`, `val`, `test`) as dictionaries."""
    yield from read_examples(find_file(split), labelled=split != "test")


# -------------------------------------------------------------------------------------------------
# Questions: an example in one of the styles, as tokens


class Question(NamedTuple):
    """One context, its four endings, and what `acc_norm` divides their losses by."""

    context: list[int]
    endings: list[list[int]]
    lengths: list[float]
    label: int


def make_question(example: dict, style: str) -> Question:
    """An example as tokens, in one of STYLES."""
    encode, endings = tokenizer.get_encoding().encode_ordinary, example["endings"]
    if style == "completion":
        context = encode(example["ctx"])
        tokens = [encode(" " + ending) for ending in endings]
        lengths = [len(ending) for ending in tokens]
    elif style == "harness":
        query, endings = clean(f"{example['activity_label']}: {whole_context(example)}"), [
            clean(ending) for ending in endings
        ]  # fmt: skip
        context, tokens = encode_pairs(query, [" " + ending for ending in endings])
        lengths = [len(ending) for ending in endings]
    else:
        letters = [chr(ord("A") + i) for i in range(len(endings))]
        shown = "".join(f"{letter}. {ending}\n" for letter, ending in zip(letters, endings))
        query = f"{example['ctx']}\n{shown}Answer:"
        context, tokens = encode_pairs(query, [" " + letter for letter in letters])
        lengths = [1] * len(letters)
    context = context or [tokenizer.END_OF_TEXT_ID]
    return Question(context, tokens, lengths, example["label"])


def whole_context(example: dict) -> str:
    """As the harness joins it; files without ctx_a and ctx_b have it joined already."""
    if "ctx_a" in example and "ctx_b" in example:
        return example["ctx_a"] + " " + example["ctx_b"].capitalize()
    return example["ctx"]


def clean(text: str) -> str:
    """Without the marks that WikiHow's articles left in the dataset, as the harness does it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def encode_pairs(query: str, endings: list[str]) -> tuple[list[int], list[list[int]]]:
    """Tokens of a query and of each ending as they come when both are encoded as one text."""
    encode = tokenizer.get_encoding().encode_ordinary
    stem = query.rstrip()
    context, spaces = encode(stem), query[len(stem) :]
    return context, [encode(stem + spaces + ending)[len(context) :] for ending in endings]


def render_example(example: dict):
    """An example as build-nanogpt has it: (data, tokens (4, N), mask (4, N), label).

    tokens: int64, context and ending in each row; mask: 1 on the endings
    """
    question = make_question(example, "completion")
    rows = [question.context + ending for ending in question.endings]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, len(question.context) : len(row)] = 1
    data = {
        "label": question.label,
        "ctx_tokens": question.context,
        "ending_tokens": question.endings,
    }
    return data, tokens, mask, question.label


# -------------------------------------------------------------------------------------------------
# Batches: questions side by side


class Row(NamedTuple):
    """A context with some endings behind it. owners: of each ending, its place among all."""

    context: list[int]
    endings: list[list[int]]
    owners: list[int]

    @property
    def length(self) -> int:
        """Tokens that the model reads: the last one of an ending is only predicted."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def make_rows(questions: list[Question], block_size: int):
    """Yields the rows of all questions: one each, or one per ending where that is too long."""
    owner = 0
    for context, endings, _, _ in questions:
        owners = [*range(owner, owner + len(endings))]
        owner += len(endings)
        if len(context) + max(map(len, endings)) <= block_size + 1:
            yield Row(context, endings, owners)
        else:
            for ending, place in zip(endings, owners):
                seen = (context + ending)[-(block_size + 1) :]
                scored = min(len(ending), len(seen) - 1)
                yield Row(seen[:-scored], [seen[-scored:]], [place])


class Batch(NamedTuple):
    """Rows of one length as tensors, and the tokens to score in them.

    tokens, positions, segments: int64 (B, T), as drawn on top of this file; segment -1 is padding
    before: int64 (N,), where, in (B * T), the token before each scored one stands
    targets: int64 (N,), the scored tokens
    owners: int64 (N,), the place among all of the ending that each belongs to
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    before: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor


def make_batch(rows: list[Row], T: int) -> Batch:
    """The batch of some rows, padded to T tokens each."""
    tokens, positions = np.zeros((2, len(rows), T), dtype=np.int64)
    segments = np.full((len(rows), T), -1, dtype=np.int64)
    before, targets, owners = [], [], []
    for b, row in enumerate(rows):
        n = len(row.context)
        tokens[b, :n], positions[b, :n], segments[b, :n] = row.context, range(n), 0
        at = n
        for segment, (ending, owner) in enumerate(zip(row.endings, row.owners), 1):
            end = at + len(ending) - 1
            tokens[b, at:end], positions[b, at:end] = ending[:-1], range(n, n + end - at)
            segments[b, at:end] = segment
            before += [b * T + n - 1, *range(b * T + at, b * T + end)]
            targets += ending
            owners += [owner] * len(ending)
            at = end
    arrays = (tokens, positions, segments, *map(np.array, (before, targets, owners)))
    return Batch(*map(torch.from_numpy, arrays))


def group_rows(rows, batch_tokens: int) -> list[tuple[list[Row], int]]:
    """(rows of similar length, the length they are padded to) of at most `batch_tokens` each.

    In an order that mixes short and long ones, so that a running score means something.
    """
    rows, groups = sorted(rows, key=lambda row: row.length, reverse=True), []
    while rows:
        T = math.ceil(rows[0].length / LENGTH_STEP) * LENGTH_STEP
        count = max(1, batch_tokens // T)
        groups.append((rows[:count], T))
        rows = rows[count:]
    order = np.random.default_rng(0).permutation(len(groups))
    return [groups[i] for i in order]


# -------------------------------------------------------------------------------------------------
# Scoring


@torch.no_grad()
def token_losses(model, batch: Batch) -> torch.Tensor:
    """The loss in nats of each token that a batch scores: float32 (N,)."""
    device = batch.tokens.device
    T = batch.tokens.size(1)
    segments, first = batch.segments, torch.ones(T, T, dtype=torch.bool, device=device).tril()
    mine = segments[:, None, :] == segments[:, :, None]  # (B, T, T): query, key
    mask = first & (mine | (segments == 0)[:, None, :])
    x = model.hidden(batch.tokens, batch.positions, mask[:, None]).flatten(0, 1)[batch.before]
    rows = HEAD_ROWS[device.type]
    losses = [
        F.cross_entropy(model.logits(x_chunk).float(), targets, reduction="none")
        for x_chunk, targets in zip(x.split(rows), batch.targets.split(rows))
    ]
    return torch.cat(losses)


def ending_losses(
    model, questions: list[Question], processes, tell=None, check=lambda: None
) -> np.ndarray:
    """The summed loss of each ending, in nats: float64 (questions, 4).

    The batches are the same for any number of processes, and dealt out among them, so the result
    is, too. `tell(losses, known)` hears after each batch what this process has so far. `check()` is
    called before each batch, in all processes alike, and may raise to end it.
    """
    device, losses = processes.device, np.zeros(4 * len(questions))
    known = np.zeros(len(losses), dtype=bool)
    groups = group_rows(make_rows(questions, model.config.block_size), BATCH_TOKENS[device.type])
    waiting = []  # a GPU is asked for results at the end only: it need not wait in between

    def collect() -> None:
        for owners, values in waiting:  # all tokens of an ending are in one batch
            endings, which = np.unique(owners, return_inverse=True)
            losses[endings] = np.bincount(which, weights=values.cpu().numpy())
            known[endings] = True
        waiting.clear()

    with processes.autocast():  # around all batches: the weights are cast once
        for first in range(0, len(groups), processes.world_size):
            check()
            if first + processes.rank >= len(groups):
                continue
            rows, T = groups[first + processes.rank]
            batch = make_batch(rows, T)
            moved = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
            waiting.append((batch.owners.numpy(), token_losses(model, moved)))
            if tell:
                collect()
                tell(losses.reshape(-1, 4), known.reshape(-1, 4).all(axis=1))
    collect()
    if processes.world_size > 1:
        losses = processes.sum(torch.from_numpy(losses).to(device)).cpu().numpy()
    losses = losses.reshape(-1, 4)
    for four, (_, endings, *_) in zip(losses, questions):  # equal ones tie, to the last bit
        four[:] = four[[endings.index(ending) for ending in endings]]
    return losses


class Score(NamedTuple):
    """Shares of questions answered rightly, and how many there were."""

    acc: float
    acc_norm: float
    questions: int

    @staticmethod
    def error(accuracy: float, questions: int) -> float:
        """The standard error of an accuracy."""
        return math.sqrt(accuracy * (1 - accuracy) / max(1, questions - 1))

    def __str__(self):
        acc, norm = ((a, self.error(a, self.questions)) for a in (self.acc, self.acc_norm))
        return "acc {:.4f} +- {:.4f}, acc_norm {:.4f} +- {:.4f}, {:,} examples".format(
            *acc, *norm, self.questions
        )


def predict(losses: np.ndarray, questions: list[Question]) -> tuple[np.ndarray, np.ndarray]:
    """The endings that `acc` and `acc_norm` choose: int64 (questions,) each."""
    lengths = np.array([question.lengths for question in questions], dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # an ending that was all marks is empty
        return (-losses).argmax(axis=1), (-losses / lengths).argmax(axis=1)


def score(losses: np.ndarray, questions: list[Question]) -> Score:
    """The score by the losses of the endings, (questions, 4)."""
    labels = np.array([question.label for question in questions])
    acc, acc_norm = (np.mean(chosen == labels) for chosen in predict(losses, questions))
    return Score(float(acc), float(acc_norm), len(questions))


def load_questions(data: str | None, examples: int, say) -> list[Question]:
    """The examples of a file (by default the validation set), or its first `examples`, in the style
    `completion`.

    Empty where it cannot be had, which is said: a training run goes on without.
    """
    try:
        found = read_examples(find_file(data=data, say=say), examples)
    except UserError as error:
        say(f"HellaSwag is left out: {error}")
        return []
    return [make_question(example, "completion") for example in found]


def evaluate(model, questions: list[Question], processes, check=lambda: None) -> Score:
    """The score of a model, its work shared by all processes: the same for any number of them.

    check: of `ending_losses`
    """
    return score(ending_losses(model, questions, processes, check=check), questions)


# -------------------------------------------------------------------------------------------------
# The command line


def parse(arguments: list[str]) -> argparse.Namespace:
    """The settings of a command line. Raises SettingError where it makes no sense."""
    parser = Parser(description="Scores a GPT-2 on HellaSwag.", allow_abbrev=False)
    add = parser.add_argument
    add("-m", "--model", default="gpt2", help="a Hub name, a checkpoint, a log directory [gpt2]")
    add("-d", "--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 [auto]")
    add("--int8", action="store_true", help="the model's matrices in 8 bits")
    add("--style", default="all", choices=("all", *STYLES), help="the way of scoring [all]")
    add("--limit", type=int, default=0, help="only so many examples [0: all]")
    add("--data", help="a .jsonl of examples [hellaswag/hellaswag_val.jsonl, fetched if need be]")
    add("--out", help="a .jsonl to write, one line for each example and style")
    options = parser.parse_args(arguments)
    if options.limit < 0:
        raise SettingError(f"limit={options.limit}: must be at least 0 examples")
    return options


@contextlib.contextmanager
def open_out(path: str | None):
    """A file to write to, or None. Raises SettingError where it can't be made or written."""
    if path is None:
        yield None
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise SettingError(f"out={path!r}: {error.strerror}; choose another file") from None


def score_style(model, examples: list[dict], style: str, processes, out) -> Score:
    """The score in one style, with a progress bar; `out` gets a line for each example."""
    from tqdm import tqdm

    questions = [make_question(example, style) for example in examples]
    labels = np.array([question.label for question in questions])
    bar = tqdm(total=len(questions), unit=" examples", desc=style, dynamic_ncols=True)

    def tell(losses, known) -> None:
        right = (predict(losses, questions)[1] == labels)[known].mean() if known.any() else 0
        bar.set_postfix_str(f"acc_norm {right:.4f}", refresh=False)
        bar.update(known.sum() - bar.n)

    with bar:
        losses = ending_losses(model, questions, processes, tell)
    if out:
        for number, (question, chosen, chosen_norm) in enumerate(
            zip(questions, *predict(losses, questions))
        ):
            line = {
                "style": style,
                "example": examples[number].get("ind", number),
                "label": question.label,
                "losses": losses[number].tolist(),
                "lengths": question.lengths,
                "chosen": int(chosen),
                "chosen_norm": int(chosen_norm),
            }
            out.write(json.dumps(line) + "\n")
    return score(losses, questions)


def main() -> int:
    import train_gpt2
    from support import quantize

    options = parse(sys.argv[1:])
    train_gpt2.check_system(options)
    device = train_gpt2.pick_device(options.device, 0)
    dtype = train_gpt2.pick_dtype(options.dtype, device)
    examples = read_examples(find_file(data=options.data), options.limit)
    directory, shape = huggingface.read_shape(options.model)
    tokenizer.check_vocabulary(options.model, shape["vocab_size"])
    if directory.parent == Path(options.model):  # the newest checkpoint of a log directory
        options.model = str(directory)
    model = train_gpt2.GPT.from_pretrained(directory)
    parameters = model.num_parameters()
    if options.int8:
        quantize.to_int8(model)
    model = model.to(device).eval()
    processes = train_gpt2.Processes(0, 1, device, dtype)
    train_gpt2.keep_freed_memory()
    kind = str(dtype).removeprefix("torch.") + (", weights in int8" if options.int8 else "")
    print(f"{options.model}: {parameters:,} parameters, {device.type} in {kind}")
    with open_out(options.out) as out:
        for style in STYLES if options.style == "all" else (options.style,):
            print(f"{style}: {score_style(model, examples, style, processes, out)}", flush=True)
    return 0


if __name__ == "__main__":
    run_main(main)
