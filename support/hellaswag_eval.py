"""HellaSwag: which of four endings of a text has the lowest loss? Used in training and alone.

Three styles, which give different scores:

    completion  build-nanogpt's: the text unchanged; GPT-2 124M has acc 0.2859, acc_norm 0.2955
    harness     lm-evaluation-harness's: cleaned text; GPT-2 124M has acc 0.2892, acc_norm 0.3114
    choice      the endings are shown as A to D and the letter is scored: for larger models

`acc` takes the ending with the lowest summed loss; `acc_norm` the one with the lowest loss per
token (completion) or per character (harness).

Source: Zellers et al. 2019 (the dataset); build-nanogpt's hellaswag.py, whose names are kept.
"""

import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from support import tokenizer
from support.devices import without_cudnn_attention
from support.distributed import Runtime
from support.errors import UserError
from support.files import replacing
from support.fused_loss import CHUNK_ROWS, IGNORE_INDEX, cut
from support.launch import print0
from support.shards import find_data

STYLES = ("completion", "harness", "choice")
FOLDER = Path(__file__).resolve().parent.parent / "hellaswag"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{}.jsonl"
EXAMPLES = {"train": 39905, "val": 10042}
REMEDY = "put the file there, or name another one with --data (in training --hellaswag_data)"
# Tokens in one forward pass. On a CPU its working set should fit the caches.
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768, "mps": 16384}
LENGTH_STEP = 8  # rows are padded to a multiple of it, to limit the number of shapes

# -------------------------------------------------------------------------------------------------
# Data


def find_file(split: str = "val", data: str | None = None) -> Path:
    """The file with the examples of a split, downloaded if it is missing or incomplete.

    data: another file to use instead
    Raises UserError if the file does not exist and cannot be downloaded.
    """
    if data is None:
        path = FOLDER / f"hellaswag_{split}.jsonl"
        if not _is_complete(path, split):
            _download(path, split)
        return path
    if not os.path.isfile(data):  # Path raises for a name that is too long
        raise UserError(f"data={data!r}: no such file; python hellaswag.py downloads one")
    return Path(data)


def _is_complete(path: Path, split: str) -> bool:
    """Whether a file has one line for each example of the split."""
    return path.is_file() and path.read_bytes().count(b"\n") == EXAMPLES[split]


def _download(path: Path, split: str) -> None:
    """Downloads a split, in one process of this machine while the others wait for it."""
    import urllib.request
    from http.client import HTTPException  # an answer that is incomplete or not HTTP

    from filelock import FileLock, Timeout

    url, lock = URL.format(split), FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(exist_ok=True)
        with lock.acquire(blocking=False):
            if _is_complete(path, split):
                return
            print0(f"downloading {url}")
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
            if (lines := content.count(b"\n")) != EXAMPLES[split]:
                raise ValueError(f"{lines:,} lines instead of {EXAMPLES[split]:,}")
            with replacing(path) as partial:
                partial.write_bytes(content)
    except Timeout:  # another process downloads it; if that fails, this one would fail too
        with lock:
            if not _is_complete(path, split):
                raise UserError(f"{path}: another process could not download it") from None
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(
            f"{path}: missing or incomplete, and {url} does not answer with the complete file, or "
            f"it cannot be written ({error}); {REMEDY}"
        ) from None


def read_examples(path: Path, limit: int = 0) -> list[dict]:
    """The examples of a file, or its first `limit`. Raises UserError if one is not valid."""
    try:
        with open(path, "rb") as file:
            lines = ((n, line) for n, line in enumerate(file, start=1) if line.strip())
            first = itertools.islice(lines, min(limit, sys.maxsize) or None)
            examples = [_parse_example(path, number, line) for number, line in first]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; cannot be read") from None
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples


def _parse_example(path: Path, number: int, line: bytes) -> dict:
    """The example in line `number` of a file, its label an int. Raises UserError if it has none."""
    try:
        example = json.loads(line)
        endings, label = example["endings"], int(example["label"])
        texts = [example["activity_label"], example["ctx"], *endings]
        texts += [example[name] for name in ("ctx_a", "ctx_b") if name in example]
        if not isinstance(endings, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("activity_label, ctx and endings must be text")
        if len(endings) != 4 or not 0 <= label < 4:
            raise ValueError("there must be four endings, and label the index of one of them")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise UserError(f"{path}: line {number:,} is not a HellaSwag example ({reason})") from None
    return example | {"label": label}


def iterate_examples(split: str):
    """Yields the examples of a split (`train`, `val`) as dictionaries."""
    yield from read_examples(find_file(split))


# -------------------------------------------------------------------------------------------------
# Questions: an example in one of the styles, as tokens


class Question(NamedTuple):
    """One context and its four endings, as token ids."""

    context: list[int]
    endings: list[list[int]]
    lengths: list[float]  # of each ending, by which acc_norm divides its loss
    label: int


def load_shared_questions(
    data: str, examples: int, vocab_size: int, runtime: Runtime
) -> list[Question]:
    """The questions in style `completion`, the same on all ranks; [] if a rank cannot read them.

    data: path of a .jsonl, here or in the repository; "": the validation set
    examples: only the first ones; 0: all
    vocab_size: of the model, which must be at least GPT-2's
    Prints one line if the result is [].
    """
    if vocab_size < tokenizer.VOCAB_SIZE:
        print0(f"HellaSwag is skipped: it needs GPT-2's vocabulary, the model has {vocab_size:,}")
        return []
    try:
        path = find_file(data=str(find_data(data)) if data else None)
        questions = [make_question(e, "completion") for e in read_examples(path, examples)]
    except UserError as error:
        print0(f"HellaSwag is skipped: {error}")
        questions = []
    ready = runtime.sum_float(bool(questions))
    if questions and ready < runtime.world_size:
        print0("HellaSwag is skipped: not all nodes have its data")
    return questions if ready == runtime.world_size else []


def make_question(example: dict, style: str) -> Question:
    """An example as tokens, in one of STYLES."""
    encode, endings = tokenizer.get_encoding().encode_ordinary, example["endings"]
    if style == "completion":
        context = encode(example["ctx"])
        tokens = [encode(" " + ending) for ending in endings]
        lengths = [len(ending) for ending in tokens]
    elif style == "harness":
        ctx = example["ctx"]
        if "ctx_a" in example and "ctx_b" in example:  # else they are joined already
            ctx = example["ctx_a"] + " " + example["ctx_b"].capitalize()
        query = _clean(f"{example['activity_label']}: {ctx}")
        endings = [_clean(ending) for ending in endings]
        context, tokens = _encode_pairs(query, [" " + ending for ending in endings])
        lengths = [len(ending) for ending in endings]
    else:
        shown = "".join(f"{letter}. {ending}\n" for letter, ending in zip("ABCD", endings))
        query = f"{example['ctx']}\n{shown}Answer:"
        context, tokens = _encode_pairs(query, [" " + letter for letter in "ABCD"])
        lengths = [1] * 4
    return Question(context or [tokenizer.END_OF_TEXT_ID], tokens, lengths, example["label"])


def _clean(text: str) -> str:
    """The text without WikiHow's markup, as lm-evaluation-harness removes it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _encode_pairs(query: str, endings: list[str]) -> tuple[list[int], list[list[int]]]:
    """Tokens of a query, and of each ending if query and ending are encoded as one text."""
    encode = tokenizer.get_encoding().encode_ordinary
    stem = query.rstrip()
    context, spaces = encode(stem), query[len(stem) :]
    return context, [encode(stem + spaces + ending)[len(context) :] for ending in endings]


def render_example(example: dict):
    """An example in build-nanogpt's form: (data, tokens (4, N), mask (4, N), label).

    tokens: int64, context and ending in each row; mask: 1 on the endings
    """
    context, endings, _, label = make_question(example, "completion")
    rows = [torch.tensor(context + ending) for ending in endings]
    masks = [(torch.arange(len(row)) >= len(context)).long() for row in rows]
    tokens, mask = (pad_sequence(each, batch_first=True) for each in (rows, masks))
    data = {"label": label, "ctx_tokens": context, "ending_tokens": endings}
    return data, tokens, mask, label


# -------------------------------------------------------------------------------------------------
# Batches: the context is computed once for its four endings, which follow it in one row
#
#   tokens    A  man  is  on  a | roof  he  sits | roof  they | roof  he  | ...
#   positions 0   1    2   3  4 |  5    6    7   |  5     6   |  5    6   | ...
#   segments  0   0    0   0  0 |  1    1    1   |  2     2   |  3    3   | ...
#   targets                     |  he  sits down | they  fly  |  he  runs | ...
#
# A token sees those before it in its own segment and in segment 0. If context and ending are too
# long for the model, the context loses its first tokens.


def make_row(context: list[int], endings: list[list[int]], first: int) -> np.ndarray:
    """Token, position, segment and target of each token that the model reads: int32 (T, 4).

    first: index of the first of these endings among those of all questions; a segment is 1 + that
        of its ending
    """
    *before, last = context
    n = len(before)
    row = [(token, i, 0, IGNORE_INDEX) for i, token in enumerate(before)]
    for segment, ending in enumerate(endings, first + 1):
        tokens, positions = [last, *ending[:-1]], range(n, n + len(ending))
        row += zip(tokens, positions, [segment] * len(ending), ending)
    return np.array(row, dtype=np.int32)


def make_rows(questions: list[Question], block_size: int):
    """Yields the rows of all questions: one each, or one per ending if that is too long."""
    for i, (context, endings, *_) in enumerate(questions):
        if len(context) + max(map(len, endings)) <= block_size + 1:
            yield make_row(context, endings, 4 * i)
            continue
        for j, ending in enumerate(endings):
            seen = (context + ending)[-(block_size + 1) :]
            scored = min(len(ending), len(seen) - 1)
            yield make_row(seen[:-scored], [seen[-scored:]], 4 * i + j)


def group_rows(rows, batch_tokens: int) -> list[tuple[list[np.ndarray], int]]:
    """(rows of similar length, the length they are padded to) of at most `batch_tokens` each."""
    rows, groups = sorted(rows, key=len, reverse=True), []
    while rows:
        T = math.ceil(len(rows[0]) / LENGTH_STEP) * LENGTH_STEP
        count = max(1, batch_tokens // T)
        groups.append((rows[:count], T))
        rows = rows[count:]
    return groups


def make_batch(rows: list[np.ndarray], T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, positions, segments and targets of some rows, int64 (4, B, T); and the indices in
    (B * T) of the tokens that have a target, int64 (N,). The segment of padding is -1."""
    batch = np.full((len(rows), T, 4), (0, 0, -1, IGNORE_INDEX))
    for padded, row in zip(batch, rows):
        padded[: len(row)] = row
    batch = torch.from_numpy(batch.transpose(2, 0, 1).copy())
    return batch, (batch[3].flatten() != IGNORE_INDEX).nonzero()[:, 0]


# -------------------------------------------------------------------------------------------------
# Scoring


class Score(NamedTuple):
    """Shares of questions answered correctly, and the number of questions."""

    acc: float
    acc_norm: float
    questions: int

    def __str__(self):
        text = ""
        for name, p in (("acc", self.acc), ("acc_norm", self.acc_norm)):
            standard_error = math.sqrt(p * (1 - p) / max(1, self.questions - 1))
            text += f"{name} {p:.4f} +- {standard_error:.4f}, "
        return f"{text}{self.questions:,} examples"


def evaluate(
    model, questions: list[Question], runtime: Runtime, check_signals=lambda: None
) -> Score:
    """The score of a `GPT`; arguments as in `ending_losses`."""
    return score(ending_losses(model, questions, runtime, check_signals), questions)


def score(losses: np.ndarray, questions: list[Question]) -> Score:
    """The score by the losses of the endings, (questions, 4)."""
    labels = np.array([question.label for question in questions])
    acc, acc_norm = (np.mean(chosen == labels) for chosen in predict(losses, questions))
    return Score(float(acc), float(acc_norm), len(questions))


def predict(losses: np.ndarray, questions: list[Question]) -> tuple[np.ndarray, np.ndarray]:
    """The endings that `acc` and `acc_norm` choose: int64 (questions,) each."""
    lengths = np.array([question.lengths for question in questions], dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # an ending of markup only has length 0
        return (-losses).argmax(axis=1), (-losses / lengths).argmax(axis=1)


def ending_losses(
    model, questions: list[Question], runtime: Runtime, check_signals=lambda: None, title: str = ""
) -> np.ndarray:
    """The summed loss of each ending, in nats: float64 (questions, 4).

    All ranks call it and share the batches, which are the same for any number of ranks: so is the
    result.
    check_signals(): called by all ranks before each batch; may raise to end the evaluation
    title: of a progress bar; "" for none
    """
    from tqdm import tqdm

    device = runtime.device
    groups = group_rows(make_rows(questions, model.config.block_size), BATCH_TOKENS[device.type])
    ending_ids, losses = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, device=device)]
    steps = range(0, len(groups), runtime.world_size)
    with runtime.autocast():  # around all batches: the weights are cast once
        for first in tqdm(steps, desc=title, unit=" batches", disable=not title):
            check_signals()
            if first + runtime.rank < len(groups):
                batch, scored = make_batch(*groups[first + runtime.rank])
                ending_ids.append(batch[2].flatten()[scored] - 1)
                moved = (tensor.to(device, non_blocking=True) for tensor in (batch, scored))
                losses.append(token_losses(model, *moved))  # copied later: a GPU need not wait
    ending_ids, losses = torch.cat(ending_ids).numpy(), torch.cat(losses).cpu().numpy()
    sums = np.bincount(ending_ids, losses, minlength=4 * len(questions))
    sums = sum(runtime.all_gather(sums)).reshape(-1, 4)
    for row, question in zip(sums, questions):  # equal endings get exactly equal losses
        row[:] = row[[question.endings.index(ending) for ending in question.endings]]
    return sums


@torch.no_grad()
def token_losses(model, batch, scored) -> torch.Tensor:
    """The loss in nats of each of N tokens of `make_batch` that have a target: float32 (N,)."""
    tokens, positions, segments, targets = batch  # (B, T) each
    T = tokens.size(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
    same = segments[:, None, :] == segments[:, :, None]  # (B, T, T): query, key
    mask = causal & (same | (segments == 0)[:, None, :])
    with without_cudnn_attention():
        x = model.hidden(tokens, positions, mask[:, None]).flatten(0, 1)[scored]  # (N, C)
    most = CHUNK_ROWS[x.device.type] // 2  # as in training in eager mode
    chunks = zip(*cut(x, targets.flatten()[scored], most))
    return torch.cat([model.token_losses(model.logits(x), y) for x, y in chunks])[: len(scored)]
