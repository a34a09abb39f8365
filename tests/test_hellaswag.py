"""hellaswag.py: the score is the plain one, however it is packed, cut, shared, fetched or broken.

1. Losses and predictions are those of four rows, one example at a time, for every style, shape and
   batch, also beyond the window; packed endings do not see each other; `harness` is
   lm-evaluation-harness's own logic, written out here and, where it is installed, itself.
2. The data: files that are short, damaged or missing, and a server on loopback that misbehaves.
3. The command line, in processes of its own.
4. Training: each score once, at its step, the same after a kill and for any number of processes.

HELLASWAG_DATA=hellaswag_val.jsonl has lm-evaluation-harness score 600 examples of that file, too.
"""

import functools
import gc
import http.server
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, command_line, environment, losses, read_log, run_trainer
from torch.nn import functional as F

import hellaswag
import train_gpt2
from support import checkpoint, tokenizer
from support.errors import UserError

ALONE = train_gpt2.Processes(0, 1, torch.device("cpu"), torch.float32)
BATCHES = [(4096, 256, 16), (64, 7, 1), (1, 1, 5)]  # BATCH_TOKENS, HEAD_ROWS, LENGTH_STEP

# -------------------------------------------------------------------------------------------------
# Examples and models

WORDS = (
    "the a man woman boy roof water then she he they jumps sits over under carefully slowly 3 "
    "1,000 it's don't naïve Straße 日本語 привет 🙂 and, but. why? TV"
).split()
MARKS = ["[title]", "[step]", "[header]", "[substeps]", "[]"]


def text(rng: random.Random, most: int) -> str:
    """Up to `most` words, with marks, double spaces and spaces at the end among them."""
    count = rng.randint(1, most)
    words = [rng.choice(WORDS if rng.random() < 0.85 else MARKS) for _ in range(count)]
    between = [rng.choice([" "] * 9 + ["  "]) for _ in words[1:]] + [rng.choice(["", "", "", " "])]
    return "".join(part for pair in zip(words, between) for part in pair)


def make_examples(count: int, seed: int = 0, most: int = 12) -> list[dict]:
    """HellaSwag-like examples; every third lacks ctx_a and ctx_b, as some copies of it do."""
    rng, examples = random.Random(seed), []
    for number in range(count):
        a, b = text(rng, rng.choice([3, most])), rng.choice(["", text(rng, 3)])
        example = {
            "ind": 100 + number,
            "activity_label": text(rng, 3),
            "ctx": f"{a} {b}" if b else a,
            "label": rng.randrange(4),
            "endings": [text(rng, rng.choice([1, 4, most])) for _ in range(4)],
        }
        examples.append(example | ({"ctx_a": a, "ctx_b": b} if number % 3 else {}))
    return examples


def by_hand(ctx_a: str, ctx_b: str, endings: list[str], activity: str = "Roof", **more) -> dict:
    ctx = f"{ctx_a} {ctx_b}" if ctx_b else ctx_a
    return {
        "activity_label": activity, "ctx": ctx, "ctx_a": ctx_a, "ctx_b": ctx_b, "label": 1,
        "endings": endings, **more,
    }  # fmt: skip


ONLY_SPACES = by_hand("all within] [step]", "", ["but", "a", "single", "space"], "[not closed")
HAND_MADE = [
    ONLY_SPACES,
    by_hand("A man is on a roof.", "he", ["sits.", "pulls up roofing.", "is using wrap.", "x"]),
    by_hand(
        "How to clean a mirror [title] Wipe it. [step] Take a cloth  that is dry.", "",
        ["[title] Dry it. [step] Use paper.", "[substeps] Rub.", "It [header] is. ", "[step] N"],
        "Home and Garden",
    ),
    by_hand("[header] How to sing [title] Breathe [step]", "", ["a", "b", ".", "é"], "Arts"),
    by_hand("Ends with a mark [step] ", "the Boy's dog", ["[step]", "runs", "  two", "naps "]),
    by_hand("", "", ["Nothing", "stands", "before", "these"]),
    by_hand("", "", ["Nothing", "but", "an activity", "here"], "[title]"),
    by_hand("all within]", "", ["no", "context", "is", "left"], "[not closed"),
    by_hand("日本語 の 文 🙂", "ÉTÉ", ["日本", "🙂🙂🙂", "ß", "\u00a0nbsp"], "Straße"),
    by_hand("tab\tand\nline", "", ["\ttab", "line\n", "\n", "end"]),
    by_hand("Long. " * 75, "he", ["runs " * 3, "sits", "is " * 20, "x"]),
    by_hand("A short context", "", ["one ending is long " * 8, "x", "a b c", "d " * 12]),
    by_hand("", "", ["every ending " * 20, "is longer than " * 10, "the whole " * 15, "row " * 40]),
]  # fmt: skip
EXAMPLES = HAND_MADE + make_examples(15)

SHAPES = {
    "one head": dict(block_size=64, n_layer=1, n_head=1, n_embd=16),
    "short window": dict(block_size=24, n_layer=2, n_head=2, n_embd=32),
    "long window": dict(block_size=128, n_layer=3, n_head=4, n_embd=32),
}


@pytest.fixture(scope="module", autouse=True)
def keep_freed_memory():
    """As all programs here do: logits of some MB come and go."""
    train_gpt2.keep_freed_memory()


@functools.cache
def make_model(name: str = "short window", seed: int = 0) -> train_gpt2.GPT:
    """A random model whose attention and positions matter, unlike a freshly initialized one's."""
    torch.manual_seed(seed)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(**SHAPES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.2 / parameter.std())
    return model.eval()


def write_examples(path: Path, examples: list[dict]) -> Path:
    lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path


def questions_of(examples: list[dict], style: str = "completion") -> list[hellaswag.Question]:
    return [hellaswag.make_question(example, style) for example in examples]


def set_batches(monkeypatch, batch_tokens: int, head_rows: int, length_step: int) -> None:
    monkeypatch.setitem(hellaswag.BATCH_TOKENS, "cpu", batch_tokens)
    monkeypatch.setitem(hellaswag.HEAD_ROWS, "cpu", head_rows)
    monkeypatch.setattr(hellaswag, "LENGTH_STEP", length_step)


# -------------------------------------------------------------------------------------------------
# The oracle: every ending a text of its own, every row a pass of its own, all logits


def encode(string: str) -> list[int]:
    return tokenizer.get_encoding().encode_ordinary(string)


def harness_clean(string: str) -> str:
    """`preprocess` of lm_eval/tasks/hellaswag/utils.py."""
    string = string.strip()
    string = string.replace(" [title]", ". ")
    string = re.sub("\\[.*?\\]", "", string)
    return string.replace("  ", " ")


def harness_pair(context: str, continuation: str) -> tuple[list[int], list[int]]:
    """`loglikelihood` and `_encode_pair` of lm_eval/api/model.py."""
    if context == "":
        return [50256], encode(continuation)
    spaces = len(context) - len(context.rstrip())
    if spaces > 0:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    whole, alone = encode(context + continuation), encode(context)
    return alone or [50256], whole[len(alone) :]  # at ONLY_SPACES, the harness stops here


def plain_pairs(example: dict, style: str) -> list[tuple[list[int], list[int], float]]:
    """(context, ending, what `acc_norm` divides by) of each ending."""
    ctx, endings = example["ctx"], example["endings"]
    if style == "completion":
        tokens = [encode(" " + ending) for ending in endings]
        return [(encode(ctx) or [50256], ending, len(ending)) for ending in tokens]
    if style == "harness":
        if "ctx_a" in example:
            ctx = example["ctx_a"] + " " + example["ctx_b"].capitalize()
        query = harness_clean(example["activity_label"] + ": " + ctx)
        choices = [harness_clean(ending) for ending in endings]
        return [(*harness_pair(query, " " + choice), len(choice)) for choice in choices]
    a, b, c, d = endings
    query = f"{ctx}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
    return [(encode(query), encode(f" {letter}"), 1) for letter in "ABCD"]


@torch.no_grad()
def plain_losses(model, pairs) -> list[float]:
    """Of (context, ending) pairs as padded rows: what the window holds of the end of each."""
    T = model.config.block_size
    rows = [(context + ending)[-(T + 1) :] for context, ending, *_ in pairs]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, (row, (_, ending, *_)) in enumerate(zip(rows, pairs)):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, max(0, len(row) - len(ending)) : len(row)] = 1
    logits, _ = model(tokens[:, :-1])
    each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (each.view(len(rows), -1) * mask[:, 1:]).sum(dim=1).tolist()


@functools.cache
def plain(shape: str, style: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of EXAMPLES: losses (N, 4), and the choices of `acc` and `acc_norm`."""
    found, chosen, chosen_norm = [], [], []
    for example in EXAMPLES:
        pairs = plain_pairs(example, style)
        four = plain_losses(make_model(shape), pairs)
        found.append(four)
        chosen.append(np.argmax([-loss for loss in four]))
        with np.errstate(divide="ignore"):
            chosen_norm.append(np.argmax(-np.array(four) / [divisor for *_, divisor in pairs]))
    return np.array(found), np.array(chosen), np.array(chosen_norm)


# -------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("style", hellaswag.STYLES)
def test_questions_are_tokenized_as_written_out(style):
    for example in EXAMPLES + make_examples(300, seed=1):
        question, pairs = hellaswag.make_question(example, style), plain_pairs(example, style)
        assert [question.context] * 4 == [context for context, *_ in pairs]
        assert question.endings == [ending for _, ending, _ in pairs]
        assert list(question.lengths) == [divisor for *_, divisor in pairs]
        assert question.label == example["label"] and all(question.endings)


@pytest.mark.parametrize("style", hellaswag.STYLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_four_plain_rows(shape, style, monkeypatch):
    expected, chosen, chosen_norm = plain(shape, style)
    questions = questions_of(EXAMPLES, style)
    window = SHAPES[shape]["block_size"]
    if shape == "short window":  # what the examples are for
        assert sum(len(question.context) > window for question in questions) >= 2
        if style != "choice":
            assert sum(len(e) > window + 1 for q in questions for e in q.endings) >= 5
    for batches in BATCHES if shape == "short window" else BATCHES[:1]:
        set_batches(monkeypatch, *batches)
        found = hellaswag.ending_losses(make_model(shape), questions, ALONE)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-4)
        predicted = hellaswag.predict(found, questions)
        assert predicted[0].tolist() == chosen.tolist()
        assert predicted[1].tolist() == chosen_norm.tolist()
        labels = np.array([example["label"] for example in EXAMPLES])
        assert hellaswag.score(found, questions) == (
            np.mean(chosen == labels), np.mean(chosen_norm == labels), len(EXAMPLES),
        )  # fmt: skip


def test_every_length_around_the_window_is_scored(monkeypatch):
    """Contexts and endings of 1 to twice the window: no index error, and the last tokens count."""
    torch.manual_seed(3)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=6, n_layer=1, n_head=1, n_embd=8))
    rng = random.Random(0)
    questions = [
        hellaswag.Question(
            [rng.randrange(50257) for _ in range(n)],
            [[rng.randrange(50257) for _ in range(m)] for m in lengths],
            list(lengths),
            0,
        )
        for n in (*range(1, 9), 13)
        for lengths in ((1, 1, 1, 1), (1, 2, 3, 4), (5, 1, 6, 2), (7, 5, 6, 1), (8, 13, 7, 6))
    ]
    pairs = [[(question.context, ending) for ending in question.endings] for question in questions]
    expected = [plain_losses(model, four) for four in pairs]
    for batches in BATCHES:
        set_batches(monkeypatch, *batches)
        found = hellaswag.ending_losses(model, questions, ALONE)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_ending_does_not_see_the_others():
    """Changing one changes its own loss and nobody else's, in its row or in the next one."""
    model, rng = make_model("long window"), random.Random(0)
    questions = questions_of(EXAMPLES[:6])
    before = hellaswag.ending_losses(model, questions, ALONE)
    for j in range(4):
        endings = list(questions[1].endings)
        endings[j] = [rng.randrange(50257) for _ in range(len(endings[j]) + j)]
        changed = [questions[0], questions[1]._replace(endings=endings), *questions[2:]]
        differ = np.abs(hellaswag.ending_losses(model, changed, ALONE) - before)
        assert differ[1, j] > 0.1
        differ[1, j] = 0
        assert differ.max() < 1e-4
    other = [questions[0]._replace(context=[11, *questions[0].context[1:]]), *questions[1:]]
    differ = np.abs(hellaswag.ending_losses(model, other, ALONE) - before)
    assert differ[0].min() > 1e-3 and differ[1:].max() < 1e-4  # all four see their context


def test_padding_changes_nothing():
    model, questions = make_model(), questions_of(EXAMPLES)
    rows = list(hellaswag.make_rows(questions, 24))[:20]
    T = max(row.length for row in rows)
    batch, longer = hellaswag.make_batch(rows, T), hellaswag.make_batch(rows, T + 21)
    losses = hellaswag.token_losses(model, batch)
    torch.testing.assert_close(hellaswag.token_losses(model, longer), losses, atol=1e-4, rtol=0)
    padding = batch.segments == -1
    assert padding.any()
    noise = torch.where(padding, torch.randint(50257, batch.tokens.shape), batch.tokens)
    assert torch.equal(hellaswag.token_losses(model, batch._replace(tokens=noise)), losses)


def seen_by_each(model, idx, position, mask):
    """bool (T, T): on which tokens' embeddings (last) the result at each position depends."""
    leaf = model.transformer.wte(idx).detach().requires_grad_()
    handle = model.transformer.wte.register_forward_hook(lambda *_: leaf)
    x = model.hidden(idx, position, mask)[0] @ torch.randn(model.config.n_embd)
    handle.remove()
    gradients = [torch.autograd.grad(y, leaf, retain_graph=True)[0] for y in x]
    return torch.stack([gradient[0].abs().sum(dim=1) > 0 for gradient in gradients])


def test_a_token_sees_its_context_and_its_own_ending_only():
    """By the gradient, through three layers, in the very mask that scoring makes."""
    model, masks = make_model("long window"), []
    row = hellaswag.Row([5, 6, 7], [[8, 9, 10], [11], [12, 13], [14, 15, 16, 17]], [0, 1, 2, 3])
    batch = hellaswag.make_batch([row], 12)
    original = model.hidden
    model.hidden = lambda idx, position, mask: masks.append(mask) or original(idx, position, mask)
    hellaswag.token_losses(model, batch)
    del model.hidden
    assert batch.tokens[0].tolist() == [5, 6, 7, 8, 9, 12, 14, 15, 16, 0, 0, 0]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 5, 0, 0, 0]
    seen = seen_by_each(model, batch.tokens, batch.positions, masks[0])
    own = [0, 0, 0, 1, 1, 3, 4, 4, 4]
    for i in range(9):
        expected = [j <= i and own[j] in (0, own[i]) for j in range(9)] + [False] * 3
        assert seen[i].tolist() == expected, i
    idx = torch.randint(50257, (1, 12))
    assert torch.equal(seen_by_each(model, idx, None, None), torch.ones(12, 12).bool().tril())


def test_hidden_without_a_mask_is_what_it_was():
    """Bit for bit the textbook trunk; a causal mask and counted positions say the same."""
    model, idx = make_model(), torch.randint(50257, (3, 17))
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(17))
    for block in model.transformer.h:
        q, k, v = block.attn.c_attn(block.ln_1(x)).split(32, dim=2)
        q, k, v = (y.view(3, 17, 2, 16).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.c_proj(y.transpose(1, 2).reshape(3, 17, 32))
        x = x + block.mlp(block.ln_2(x))
    expected = model.transformer.ln_f(x)
    assert torch.equal(model.hidden(idx), expected)
    mask = torch.ones(17, 17, dtype=torch.bool).tril().expand(3, 1, 17, 17)
    masked = model.hidden(idx, torch.arange(17).expand(3, 17), mask)
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=1e-5)


def test_equal_endings_tie_and_the_first_one_is_chosen():
    """As where each has a row of its own: texts that are equal once cleaned have one loss."""
    rng = random.Random(0)
    examples = []
    for _ in range(40):
        good, bad = (" ".join(rng.choice(WORDS) for _ in range(count)) for count in (2, 30))
        endings = [bad, f"[step] {good}", f"[header] {good}", f"[step] {good} "]
        examples.append(by_hand(text(rng, 9), "", endings))
    questions = questions_of(examples, "harness")
    assert all(q.endings[1] == q.endings[2] == q.endings[3] for q in questions)
    found = hellaswag.ending_losses(make_model("long window"), questions, ALONE)
    assert np.array_equal(found[:, 1], found[:, 2]) and np.array_equal(found[:, 1], found[:, 3])
    assert set(hellaswag.predict(found, questions)[0]) == {1}


def test_the_score_is_the_share_of_right_choices():
    """Against plain sums; the first of equal losses is taken, an ending without text never."""
    rng = np.random.default_rng(0)
    found = rng.integers(1, 5, (60, 4)) / 2.0  # many ties
    lengths = rng.integers(0, 4, (60, 4))
    lengths[:, 3] += lengths.sum(axis=1) == 0
    labels = rng.integers(0, 4, 60)
    questions = [
        hellaswag.Question([1], [[1]] * 4, row.tolist(), int(label))
        for row, label in zip(lengths, labels)
    ]
    hits, hits_norm = [], []
    for four, divisors, label in zip(found.tolist(), lengths.tolist(), labels):
        hits.append(four.index(min(four)) == label)
        each = [loss / divisor if divisor else math.inf for loss, divisor in zip(four, divisors)]
        hits_norm.append(each.index(min(each)) == label)
    score = hellaswag.score(found, questions)
    assert score == (np.mean(hits), np.mean(hits_norm), 60)
    assert 0.1 < score.acc_norm < 0.5
    errors = [np.std(h, ddof=1) / math.sqrt(60) for h in (hits, hits_norm)]
    assert hellaswag.Score.error(score.acc, 60) == pytest.approx(errors[0])
    assert str(score) == (
        f"acc {np.mean(hits):.4f} +- {errors[0]:.4f}, "
        f"acc_norm {np.mean(hits_norm):.4f} +- {errors[1]:.4f}, 60 examples"
    )
    one = hellaswag.score(found[:1], questions[:1])
    assert "+- 0.0000" in str(one) and one.questions == 1
    assert f"{hellaswag.Score.error(0.2955, 10042):.4f}" == "0.0046"


@pytest.mark.parametrize("world_size", [2, 3, 5, 99])
def test_processes_share_the_examples(world_size, monkeypatch):
    """Each ending is scored once, by one of them, to the same last bit; 99 are too many."""

    class Part(train_gpt2.Processes):
        def sum(self, tensor):
            return tensor

    set_batches(monkeypatch, 256, 64, 16)
    questions = questions_of(EXAMPLES)
    whole = hellaswag.ending_losses(make_model(), questions, ALONE)
    parts = np.stack([
        hellaswag.ending_losses(
            make_model(), questions, Part(rank, world_size, ALONE.device, ALONE.dtype)
        )
        for rank in range(world_size)
    ])  # fmt: skip
    assert ((parts != 0).sum(axis=0) == 1).all()
    assert np.array_equal(parts.sum(axis=0), whole)
    if world_size < 10:
        assert (parts != 0).any(axis=(1, 2)).all()


def test_the_running_score_is_of_finished_examples(monkeypatch):
    set_batches(monkeypatch, 64, 64, 16)
    questions, told = questions_of(EXAMPLES), []
    final = hellaswag.ending_losses(
        make_model(), questions, ALONE, lambda *heard: told.append([a.copy() for a in heard])
    )
    counts = [known.sum() for _, known in told]
    assert counts == sorted(counts) and counts[-1] == len(questions) and len(set(counts)) > 10
    for values, known in told:
        assert np.array_equal(values[known], final[known])


def tensor_bytes() -> int:
    """What all tensors of this process hold."""
    found = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


@pytest.mark.parametrize("telling", [False, True])
def test_memory_stays_flat(monkeypatch, telling):
    """Between batches nothing is kept but a loss for each token."""
    set_batches(monkeypatch, 64, 64, 16)
    model, questions, held = make_model(), questions_of(make_examples(40)), []
    original = hellaswag.token_losses

    def token_losses(model, batch):
        held.append(0 if len(held) % 9 else tensor_bytes())
        return original(model, batch)

    monkeypatch.setattr(hellaswag, "token_losses", token_losses)
    hellaswag.ending_losses(model, questions, ALONE, (lambda *_: None) if telling else None)
    tokens = sum(len(ending) for question in questions for ending in question.endings)
    assert len(held) > 27
    held = held[::9]
    assert held[-1] - held[0] < (0 if telling else 4 * tokens) + 10_000  # batches differ by less
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_bfloat16_is_close_and_leaves_the_model_alone():
    model, questions = make_model(), questions_of(EXAMPLES)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half = train_gpt2.Processes(0, 1, ALONE.device, torch.bfloat16)
    exact = hellaswag.ending_losses(model, questions, ALONE)
    close = hellaswag.ending_losses(model, questions, half)
    assert not np.array_equal(exact, close)
    np.testing.assert_allclose(close, exact, rtol=0.03, atol=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


ACCELERATORS = [
    name
    for name, there in (
        ("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()),
    )
    if there
]  # fmt: skip


@pytest.mark.skipif(not ACCELERATORS, reason="no GPU here")
def test_a_gpu_gives_the_same_losses():
    import copy

    for name in ACCELERATORS:
        device = train_gpt2.pick_device(name, 0)
        model = copy.deepcopy(make_model()).to(device)
        processes = train_gpt2.Processes(0, 1, device, torch.float32)
        found = hellaswag.ending_losses(model, questions_of(EXAMPLES), processes)
        np.testing.assert_allclose(found, plain("short window", "completion")[0], atol=0.01)


# -------------------------------------------------------------------------------------------------
# lm-evaluation-harness itself, and build-nanogpt's names


def harness_examples() -> list[dict]:
    """Examples as the harness's task reads them: always with ctx_a and ctx_b."""
    examples = [example for example in HAND_MADE if example is not ONLY_SPACES]
    examples += [example for example in make_examples(60, seed=2, most=10) if "ctx_a" in example]
    if path := os.environ.get("HELLASWAG_DATA"):
        for number, example in enumerate(hellaswag.read_examples(Path(path))[::16][:600]):
            a, dot, b = example["ctx"].rpartition(". ")
            if number % 2 or not dot:
                a, dot, b = example["ctx"], "", ""
            if number % 5 == 0:  # the marks that copies of the dataset have lost
                a = a.replace(". ", " [title] ", 1).replace(", ", " [step] ", 1)
            examples.append(example | {"ctx_a": a + dot.strip(), "ctx_b": b})
    keys = ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "label", "endings")
    return [
        {key: example.get(key, number) for key in keys} for number, example in enumerate(examples)
    ]


def run_harness(directory: Path, data: Path, monkeypatch) -> tuple[dict, list[dict]]:
    """(results, samples) of lm-evaluation-harness's hellaswag task on a local copy of its data."""
    lm_eval = pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", directory.parent / "cache")
    task = Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"
    local = directory.parent / "local.yaml"
    local.write_text(
        f"include: {task}\ntask: hellaswag_local\ndataset_path: json\ntraining_split: null\n"
        f"dataset_kwargs:\n  data_files:\n    validation: {data}\n"
    )
    model = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=8)
    results = lm_eval.simple_evaluate(model, tasks=[str(local)], bootstrap_iters=0)
    return results["results"]["hellaswag_local"], results["samples"]["hellaswag_local"]


def test_harness_style_is_lm_evaluation_harness(tmp_path, monkeypatch):
    """Its own program on the same checkpoint, half of whose window is too short for many."""
    pytest.importorskip("lm_eval")
    model = make_model("one head")
    model.save_pretrained(tmp_path / "model")
    examples = harness_examples()
    questions = questions_of(examples, "harness")
    fit = [max(map(len, question.endings)) <= 64 for question in questions]  # else it refuses
    examples = [example for example, fits in zip(examples, fit) if fits]
    questions = [question for question, fits in zip(questions, fit) if fits]
    data = write_examples(tmp_path / "data.jsonl", examples)
    results, samples = run_harness(tmp_path / "model", data, monkeypatch)
    found = hellaswag.ending_losses(model, questions, ALONE)
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    theirs = [[-float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-4)
    score = hellaswag.score(found, questions)
    assert score.acc == results["acc,none"] and score.acc_norm == results["acc_norm,none"]
    chosen = hellaswag.predict(found, questions)
    for sample, question, *choices in zip(samples, questions, *chosen):
        hits = [float(choice == question.label) for choice in choices]
        assert hits == [sample["acc"], sample["acc_norm"]]
    longer = sum(len(q.context) + max(map(len, q.endings)) > 65 for q in questions)
    marked = sum("[" in example["ctx_a"] for example in examples)
    print(f"{len(questions)} examples, {longer} beyond the window, {marked} with marks: {score}")
    print({name: results[name] for name in ("acc,none", "acc_norm,none")})


def nanogpt_render_example(example):
    """build-nanogpt's function."""
    ctx, label, endings = example["ctx"], example["label"], example["endings"]
    data = {"label": label, "ctx_tokens": None, "ending_tokens": []}
    ctx_tokens = encode(ctx)
    data["ctx_tokens"] = ctx_tokens
    tok_rows, mask_rows = [], []
    for end in endings:
        end_tokens = encode(" " + end)
        tok_rows.append(ctx_tokens + end_tokens)
        mask_rows.append([0] * len(ctx_tokens) + [1] * len(end_tokens))
        data["ending_tokens"].append(end_tokens)
    max_len = max(len(row) for row in tok_rows)
    tokens = torch.zeros((4, max_len), dtype=torch.long)
    mask = torch.zeros((4, max_len), dtype=torch.long)
    for i, (tok_row, mask_row) in enumerate(zip(tok_rows, mask_rows)):
        tokens[i, : len(tok_row)] = torch.tensor(tok_row)
        mask[i, : len(mask_row)] = torch.tensor(mask_row)
    return data, tokens, mask, label


def test_render_example_is_build_nanogpts():
    for example in EXAMPLES:
        if example["ctx"]:
            data, tokens, mask, label = hellaswag.render_example(example)
            expected = nanogpt_render_example(example)
            assert (data, label) == (expected[0], expected[3])
            for ours, theirs in zip((tokens, mask), expected[1:3]):
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("split", ["val", "train", "test"])
def test_iterate_examples_yields_each_line(tmp_path, monkeypatch, split):
    """Those of the test split have no label."""
    examples = make_examples(9)
    if split == "test":
        for example in examples:
            del example["label"]
    monkeypatch.setattr(hellaswag, "FOLDER", tmp_path)
    monkeypatch.setattr(hellaswag, "EXAMPLES", {split: 9})
    write_examples(tmp_path / f"hellaswag_{split}.jsonl", examples)
    assert list(hellaswag.iterate_examples(split)) == examples


def test_the_dataset_is_known():
    """Where it is, and how many examples its splits have (Zellers et al. 2019)."""
    assert hellaswag.EXAMPLES == {"train": 39905, "val": 10042, "test": 10003}
    assert hellaswag.URL.format("val") == (
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
    )
    assert hellaswag.FOLDER == ROOT / "hellaswag"


# -------------------------------------------------------------------------------------------------
# Processes: a program that forks a new process for each command line, so that torch is imported
# once, and a server whose answers are as the address says

FORKS = """
import json, os, signal, sys, tempfile, traceback
from pathlib import Path

import hellaswag, train_gpt2
from support.errors import run_main

# what takes a second the first time
import filelock, tqdm, urllib.request
config = train_gpt2.GPTConfig(block_size=1, n_layer=1, n_head=1, n_embd=1)
with tempfile.TemporaryDirectory() as directory:
    train_gpt2.GPT(config).save_pretrained(directory)
    train_gpt2.GPT.from_pretrained(directory)
train_gpt2.tokenizer.get_encoding()


def prepare(case):
    os.environ.update(case.get("environment", {}))
    for name in ("URL", "FOLDER", "EXAMPLES"):
        if name in case:
            setattr(hellaswag, name, case[name])
    hellaswag.URL = hellaswag.URL.replace("PID", str(os.getpid()))
    hellaswag.FOLDER = Path(hellaswag.FOLDER)
    original, calls = hellaswag.score, []

    def score(*arguments):
        calls.append(1)
        if len(calls) == case.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    hellaswag.score = score
    sys.argv = [case["program"], *case["arguments"]]
    return {"hellaswag": hellaswag, "train_gpt2": train_gpt2}[case["program"]].main


def begin(case):
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]
    if child := os.fork():
        return child, files
    code = 1
    try:
        signal.alarm(120)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for file, descriptor in zip(files, (1, 2)):
            os.dup2(file.fileno(), descriptor)
        run_main(prepare(case))
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def result(child, files):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in files:
        file.seek(0)
    return [code, *(file.read() for file in files)]


for line in sys.stdin:
    begun = [begin(case) for case in json.loads(line)]
    print(json.dumps([result(*one) for one in begun]), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def forks():
    """A function: cases, run at the same time -> their code, out, err."""
    env = environment(PYTHONPATH=str(ROOT), NO_PROXY="*", no_proxy="*")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    driver = subprocess.Popen([sys.executable, "-c", FORKS], **pipes)

    def run(*cases: dict) -> list[SimpleNamespace]:
        driver.stdin.write(json.dumps(cases) + "\n")
        driver.stdin.flush()
        results = json.loads(driver.stdout.readline())
        return [SimpleNamespace(code=code, out=out, err=err) for code, out, err in results]

    yield run
    driver.stdin.close()
    driver.wait(timeout=60)


def command(*arguments, **settings) -> dict:
    return {"program": "hellaswag", "arguments": [str(a) for a in arguments], **settings}


def training(config, **settings) -> dict:
    return {"program": "train_gpt2", "arguments": command_line(config), **settings}


class Server(http.server.ThreadingHTTPServer):
    """Serves twelve examples at /good/, and something else at other addresses."""

    daemon_threads = True
    lines = [json.dumps(example) + "\n" for example in make_examples(12, most=6)]
    body = "".join(lines).encode()

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, kind: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{kind}/hellaswag_{{}}.jsonl"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        kind, whole = self.path.split("/")[1], self.server.body
        if kind == "garbage":
            self.wfile.write(b"this is no HTTP\r\n\r\n")
        if kind in ("garbage", "nothing"):
            return
        if kind.startswith("slow"):
            time.sleep(1)
        pages = {"short": whole[: len(whole) // 2], "page": b"<p>\nLog in\n</p>\n", "empty": b""}
        content = pages.get(kind, whole)
        self.send_response({"missing": 404, "slow_missing": 404, "broken": 500}.get(kind, 200))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if kind in ("cut", "kill") else content)
        if kind == "kill":
            self.wfile.flush()
            os.kill(int(self.path.split("/")[2]), signal.SIGKILL)


@pytest.fixture
def server():
    with Server() as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of the model that most command lines score."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    make_model().save_pretrained(directory)
    return directory


@pytest.fixture
def fetching(server, saved, tmp_path):
    """A function: kind of answer -> a command line whose data is fetched to tmp_path/hellaswag."""

    def case(kind: str = "good") -> dict:
        options = ("-m", saved, "-d", "cpu", "--dtype=float32", "--style=completion")
        settings = dict(FOLDER=str(tmp_path / "hellaswag"), EXAMPLES={"val": 12})
        return command(*options, URL=server.url(kind), **settings)

    return case


def assert_one_error(result, *words: str) -> None:
    """Exit code 2, and on stderr one line that says what is wrong."""
    assert result.code == 2, result.err
    assert re.fullmatch(r"error: .+\n", result.err), result.err
    for word in words:
        assert word in result.err


# -------------------------------------------------------------------------------------------------
# Data


def test_data_is_fetched_once(forks, fetching, server, tmp_path):
    first = forks(fetching())[0]
    assert first.code == 0, first.err
    path = tmp_path / "hellaswag" / "hellaswag_val.jsonl"
    assert path.read_bytes() == server.body
    assert first.out.startswith("fetching http://127.0.0.1") and "12 examples" in first.out
    again = forks(fetching())[0]
    assert again.code == 0 and again.out == first.out.split("\n", 1)[1]
    assert len(server.requests) == 1
    assert not list(path.parent.glob("*partial*")) + list(path.parent.glob(".*partial*"))


def test_four_processes_fetch_once(forks, fetching, server, tmp_path):
    results = forks(*[fetching("slow")] * 4)
    assert [result.code for result in results] == [0] * 4, results
    assert len(server.requests) == 1
    assert (tmp_path / "hellaswag" / "hellaswag_val.jsonl").read_bytes() == server.body
    assert len({result.out.splitlines()[-1] for result in results}) == 1


@pytest.mark.parametrize("cut", [-1, -40, 700, 0])
def test_a_truncated_file_is_fetched_again(forks, fetching, server, tmp_path, cut):
    path = tmp_path / "hellaswag" / "hellaswag_val.jsonl"
    path.parent.mkdir()
    path.write_bytes(server.body[:cut])
    for refused in forks(fetching("missing")) + forks(fetching("short")):
        assert_one_error(refused, "hellaswag_val.jsonl")
        assert path.read_bytes() == server.body[:cut]  # no worse than before
    result = forks(fetching())[0]
    assert result.code == 0 and "12 examples" in result.out
    assert path.read_bytes() == server.body


@pytest.mark.parametrize(
    "kind", ["missing", "broken", "short", "page", "empty", "cut", "nothing", "garbage"]
)
def test_a_bad_answer_leaves_no_file(forks, fetching, server, tmp_path, kind):
    result = forks(fetching(kind))[0]
    assert_one_error(result, "hellaswag_val.jsonl", server.url(kind).format("val"), "put the file")
    assert not (tmp_path / "hellaswag" / "hellaswag_val.jsonl").exists()
    assert len(server.requests) == 1
    assert forks(fetching())[0].code == 0


def test_a_process_killed_while_fetching_is_in_nobodys_way(forks, fetching, server, tmp_path):
    assert forks(fetching("kill/PID"))[0].code == -signal.SIGKILL
    assert not (tmp_path / "hellaswag" / "hellaswag_val.jsonl").exists()
    assert forks(fetching())[0].code == 0


def test_no_server_and_no_folder(forks, fetching, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and not listening
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/{{}}"
        assert_one_error(forks(fetching() | {"URL": url})[0], "does not answer", "put the file")
    (tmp_path / "file").write_text("in the way")
    assert_one_error(forks(fetching() | {"FOLDER": str(tmp_path / "file")})[0], "put the file")


def test_a_given_file_may_be_of_any_length(tmp_path):
    """Blank lines, labels as text, no newline at the end; a limit takes the first ones."""
    examples = make_examples(5)
    lines = [json.dumps(example | {"label": str(example["label"])}) for example in examples]
    path = tmp_path / "given.jsonl"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    assert hellaswag.find_file(data=str(path)) == path
    assert hellaswag.read_examples(path) == examples
    assert hellaswag.read_examples(path, 3) == examples[:3]
    assert hellaswag.read_examples(path, 99) == examples
    path.write_text("\n".join([*lines[:3], "{broken"]), encoding="utf-8")
    assert hellaswag.read_examples(path, 3) == examples[:3]  # what is not needed is not read
    with pytest.raises(UserError, match="line 4 is no HellaSwag example"):
        hellaswag.read_examples(path)


GOOD = by_hand("A man is on a roof.", "he", ["sits.", "pulls.", "is.", "x"])
BROKEN = {
    "not JSON": "hello\n",
    "not UTF-8": b"\xff\xfe\x00",
    "empty": "",
    "only blank lines": "\n\n",
    "a list": "[1, 2]\n",
    "a number": "7\n",
    "null": "null\n",
    "no label": json.dumps({k: v for k, v in GOOD.items() if k != "label"}),
    "no ctx": json.dumps({k: v for k, v in GOOD.items() if k != "ctx"}),
    "no endings": json.dumps({k: v for k, v in GOOD.items() if k != "endings"}),
    "three endings": json.dumps(GOOD | {"endings": ["a", "b", "c"]}),
    "endings are numbers": json.dumps(GOOD | {"endings": [1, 2, 3, 4]}),
    "endings are one text": json.dumps(GOOD | {"endings": "abcd"}),
    "ctx is null": json.dumps(GOOD | {"ctx": None}),
    "label 4": json.dumps(GOOD | {"label": 4}),
    "label -1": json.dumps(GOOD | {"label": -1}),
    "label is text": json.dumps(GOOD | {"label": "one"}),
    "cut off": json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:50],
}


@pytest.fixture(params=BROKEN)
def broken_file(request, tmp_path):
    path, content = tmp_path / "broken.jsonl", BROKEN[request.param]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_broken_data_is_refused_in_one_line(forks, saved, broken_file):
    case = command("-m", saved, "-d", "cpu", "--style=completion", "--data", broken_file)
    assert_one_error(forks(case)[0], "broken.jsonl")


@pytest.mark.parametrize("field", ["activity_label", "ctx_a", "ctx_b"])
def test_what_only_the_harness_style_needs_is_missed_in_one_line(forks, saved, tmp_path, field):
    example = GOOD | {field: None}
    if field == "activity_label":
        del example[field]
    data = write_examples(tmp_path / "data.jsonl", [example])
    case = command("-m", saved, "-d", "cpu", "--style=harness", "--data", data)
    assert_one_error(forks(case)[0], "data.jsonl")


# -------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory):
    """A log directory with two whole checkpoints and, as the newest, a damaged one."""
    directory = tmp_path_factory.mktemp("run") / "log"
    for step in (1, 2, 3):
        model = make_model(seed=step)
        checkpoint.write_directory(directory / f"step_{step:05d}", model.save_pretrained)
    with open(directory / "step_00003" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    return directory


def scores_in(output: str) -> dict[str, str]:
    """{style: score} as printed."""
    return dict(re.findall(r"^(\w+): (acc .*)$", output, re.MULTILINE))


def test_the_command_scores_in_three_styles(log_dir, tmp_path):
    """Of the newest whole checkpoint; --out has a line for each example and style."""
    data = write_examples(tmp_path / "data.jsonl", EXAMPLES)
    options = ["-m", log_dir, "-d", "cpu", "--dtype", "float32", "--data", data]
    done = subprocess.run(
        [sys.executable, ROOT / "hellaswag.py", *options, "--out", tmp_path / "out.jsonl"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step_00003: damaged, not used" in done.stderr
    assert "step_00002: 1," in done.stdout and "cpu in float32" in done.stdout
    bar = f"{len(EXAMPLES)}/{len(EXAMPLES)}"
    assert done.stderr.count(bar) >= 3 and "acc_norm 0." in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * len(EXAMPLES)
    assert list(scores_in(done.stdout)) == list(hellaswag.STYLES)
    for style in hellaswag.STYLES:
        questions = questions_of(EXAMPLES, style)
        found = hellaswag.ending_losses(make_model(seed=2), questions, ALONE)
        assert scores_in(done.stdout)[style] == str(hellaswag.score(found, questions))
        mine = [line for line in lines if line["style"] == style]
        np.testing.assert_allclose([line["losses"] for line in mine], found, atol=1e-3)
        assert [line["label"] for line in mine] == [example["label"] for example in EXAMPLES]
        assert [line["example"] for line in mine] == [
            example.get("ind", number) for number, example in enumerate(EXAMPLES)
        ]
        assert [line["lengths"] for line in mine] == [list(q.lengths) for q in questions]
        hits = [[line[k] == line["label"] for line in mine] for k in ("chosen", "chosen_norm")]
        assert scores_in(done.stdout)[style].startswith(f"acc {np.mean(hits[0]):.4f} ")
        assert f"acc_norm {np.mean(hits[1]):.4f} " in scores_in(done.stdout)[style]


def test_a_model_is_a_directory_or_the_newest_in_it(forks, log_dir, tmp_path):
    data = write_examples(tmp_path / "data.jsonl", EXAMPLES)
    options = ("-d", "cpu", "--dtype=float32", "--style=harness", "--limit=20", "--data", data)
    newest, second, first = forks(
        *[command("-m", m, *options) for m in (log_dir, *sorted(log_dir.iterdir())[1::-1])]
    )
    assert [result.code for result in (newest, second, first)] == [0] * 3
    assert scores_in(newest.out) == scores_in(second.out) != scores_in(first.out)
    assert list(scores_in(first.out)) == ["harness"]
    assert scores_in(first.out)["harness"].endswith(", 20 examples")
    questions = questions_of(EXAMPLES[:20], "harness")
    expected = hellaswag.evaluate(make_model(seed=2), questions, ALONE)
    assert scores_in(newest.out)["harness"] == str(expected)


def test_an_unknown_option_in_a_process_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "hellaswag.py", "--nonsense=3"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    done.code, done.err = done.returncode, done.stderr
    assert_one_error(done, "--nonsense=3", "--help")
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["stray"], "stray"),
        (["--sty=harness"], "--sty"),
        (["--style=fancy"], "fancy"),
        (["--limit=-1"], "limit"),
        (["--limit=many"], "many"),
        (["-m"], "--model"),
        (["-m", "unknown"], "'unknown' is neither a directory nor one of gpt2"),
        (["-m", "{tmp}"], "config.json"),
        (["-m", "{data}"], "neither a directory"),
        (["-d", "nonsense"], "nonsense"),
        (["-d", "cuda:x"], "cuda:x"),
        (["-d", "meta"], "meta"),
        (["-d", "CPU"], "CPU"),
        (["-d", "mps"], "mps"),
        (["--dtype=nonsense"], "nonsense"),
        (["--dtype=int8"], "int8"),
        (["--data={tmp}/none.jsonl"], "none.jsonl"),
        (["--data={tmp}"], "{tmp}"),
        (["--data="], "data"),
        (["--data=/proc/self/mem"], "/proc/self/mem"),  # readable by name, not by content
        (["--out={tmp}/none/out.jsonl"], "none/out.jsonl"),
        (["--out={tmp}"], "{tmp}"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(forks, saved, tmp_path, arguments, word):
    if word == "mps" and torch.backends.mps.is_available():
        pytest.skip("that device is there")
    if "/proc" in word and not Path("/proc/self/mem").exists():
        pytest.skip("Linux only")
    data = write_examples(tmp_path / "data.jsonl", EXAMPLES[:2])
    options = ["-m", saved, "-d", "cpu", "--style=completion", "--data", data]
    given = [a.format(tmp=tmp_path, data=data) for a in arguments]
    assert_one_error(forks(command(*options, *given))[0], word.format(tmp=tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_is_told_in_one_line(forks, saved, tmp_path):
    data = write_examples(tmp_path / "data.jsonl", EXAMPLES[:2])
    result = forks(command("-m", saved, "-d", "cpu", "--data", data, "--out", "/dev/full"))[0]
    last = result.err.splitlines()[-1]
    assert result.code == 2 and last.startswith("error: ") and "/dev/full" in last, result.err
    assert "Traceback" not in result.err


def test_a_model_of_another_vocabulary_is_refused(forks, tmp_path):
    """A GPT-2 of 1,000 tokens loads, and the text has ids that it does not know."""
    shape = dict(block_size=32, vocab_size=1000, n_layer=1, n_head=1, n_embd=8)
    train_gpt2.GPT(train_gpt2.GPTConfig(**shape)).save_pretrained(tmp_path / "model")
    data = write_examples(tmp_path / "data.jsonl", EXAMPLES[:2])
    case = command("-m", tmp_path / "model", "-d", "cpu", "--style=completion", "--data", data)
    result = forks(case)[0]
    last = result.err.splitlines()[-1]
    assert result.code == 2 and last.startswith("error: ") and "1000" in last.replace(",", "")


# -------------------------------------------------------------------------------------------------
# Training


def console_scores(output: str) -> dict[int, str]:
    """{step: score} as the trainer printed them."""
    return {int(s): score for s, score in re.findall(r"step +(\d+) \| HellaSwag (acc.*)", output)}


def test_training_scores_at_its_steps(forks, small, tmp_path, capsys):
    """As the program alone scores the checkpoint of that step, on the first examples if so set."""
    data = write_examples(tmp_path / "data.jsonl", make_examples(23, most=5))
    settings = dict(hellaswag_every=2, hellaswag_data=str(data), hellaswag_examples=19)
    config = small(**settings, max_steps=5, max_lr=0.05, checkpoint_every=1, keep_checkpoints=9)
    assert train_gpt2.train(config) == 0
    told, logged = console_scores(capsys.readouterr().out), losses(config, "hella")
    assert list(logged) == [0, 2, 4, 5]
    assert len(set(logged.values())) > 1  # else this shows nothing
    options = ("-d", "cpu", "--dtype=float32", "--style=completion", "--limit=19", "--data", data)
    steps = [Path(config.log_dir) / f"step_{step:05d}" for step in (2, 4, 5)]
    results = forks(*[command("-m", step, *options) for step in steps])
    for step, result in zip((2, 4, 5), results):
        assert scores_in(result.out)["completion"] == told[step], result.err
        assert f"acc_norm {logged[step]:.4f} +-" in told[step] and "19 examples" in told[step]
    for line in read_log(config):
        assert re.fullmatch(r"\d+ (train|hella) \d+\.\d+", line)


@pytest.mark.faults
def test_each_score_is_logged_once_whatever_is_killed(forks, small, tmp_path):
    """Killed in a score right after saving; and some steps, with a score, after saving."""
    data = write_examples(tmp_path / "data.jsonl", make_examples(13, most=5))
    settings = dict(hellaswag_every=2, hellaswag_data=str(data), max_steps=9, max_lr=0.05)
    whole = small(**settings, log_dir=str(tmp_path / "whole"))
    right_after = small(**settings, log_dir=str(tmp_path / "right_after"), checkpoint_every=4)
    later = small(**settings, log_dir=str(tmp_path / "later"), checkpoint_every=5)
    results = forks(training(whole), training(right_after, kill_at=3), training(later, kill_at=5))
    assert [result.code for result in results] == [0, -signal.SIGKILL, -signal.SIGKILL], results
    assert list(losses(right_after, "hella")) == [0, 2]
    assert list(losses(later, "hella")) == [0, 2, 4, 6]
    for result in forks(training(right_after), training(later)):
        assert result.code == 0 and "continuing from" in result.out
    assert read_log(whole) == read_log(right_after) == read_log(later)
    assert list(losses(whole, "hella")) == [0, 2, 4, 6, 8, 9]


@pytest.fixture(scope="module")
def shared_score(tmp_path_factory):
    """(settings, scores) of a run on one process; its 149 examples are five batches."""
    directory = tmp_path_factory.mktemp("shared")
    (directory / "text.txt").write_text((ROOT / "input.txt").read_text("utf-8")[:16000], "utf-8")
    rng = random.Random(0)
    examples = [
        by_hand(" ".join(rng.choice(WORDS[:20]) for _ in range(40)), "",
                [" ".join(rng.choice(WORDS[:20]) for _ in range(3)) for _ in range(4)])
        for _ in range(149)
    ]  # fmt: skip
    data = write_examples(directory / "data.jsonl", examples)
    rows = list(hellaswag.make_rows(questions_of(examples), 64))
    assert len(hellaswag.group_rows(rows, hellaswag.BATCH_TOKENS["cpu"])) == 5  # not 3 x some
    settings = SMALL | dict(
        data=str(directory / "text.txt"), T=64, max_steps=2, max_lr=0.05,
        hellaswag_every=2, hellaswag_data=str(data),
    )  # fmt: skip
    config = train_gpt2.Config(**settings, log_dir=str(directory / "log"))
    train_gpt2.train(config)
    scores = losses(config, "hella")
    assert list(scores) == [0, 2] and scores[0] != scores[2]
    return settings, scores


@pytest.mark.faults
def test_two_processes_under_torchrun_have_the_same_score(shared_score, tmp_path):
    settings, scores = shared_score
    config = train_gpt2.Config(**settings, log_dir=str(tmp_path / "log"))
    done = run_trainer(config, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(config, "hella") == scores
    assert list(console_scores(done.stdout)) == [0, 2]


def ranks(config, count: int) -> list[dict]:
    """The processes of a run as a launcher would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        training(config, environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def test_three_processes_have_the_same_score(forks, shared_score, tmp_path):
    settings, scores = shared_score
    config = train_gpt2.Config(**settings, log_dir=str(tmp_path / "log"))
    results = forks(*ranks(config, 3))
    assert [result.code for result in results] == [0] * 3, results
    assert losses(config, "hella") == scores
    assert [len(console_scores(result.out)) for result in results] == [2, 0, 0]


def test_processes_of_a_run_fetch_once(forks, shared_score, server, tmp_path):
    settings, _ = shared_score
    config = train_gpt2.Config(**settings | dict(hellaswag_data=""), log_dir=str(tmp_path / "log"))
    where = dict(FOLDER=str(tmp_path / "data"), EXAMPLES={"val": 12}, URL=server.url("slow"))
    results = forks(*[case | where for case in ranks(config, 2)])
    assert [result.code for result in results] == [0] * 2, results
    assert list(losses(config, "hella")) == [0, 2] and len(server.requests) == 1


def test_processes_without_data_train_on(forks, shared_score, server, tmp_path):
    """One waits for the server in vain, not one after the other: that can take minutes each."""
    settings, _ = shared_score
    config = train_gpt2.Config(**settings | dict(hellaswag_data=""), log_dir=str(tmp_path / "log"))
    where = dict(
        FOLDER=str(tmp_path / "data"), EXAMPLES={"val": 12}, URL=server.url("slow_missing")
    )
    results = forks(*[case | where for case in ranks(config, 2)])
    assert [result.code for result in results] == [0] * 2, results
    assert "".join(result.out for result in results).count("HellaSwag is left out") == 1
    assert list(losses(config)) == [0, 1] and losses(config, "hella") == {}
    assert len(server.requests) == 1


def test_where_another_node_lacks_the_data_nobody_scores(small, tmp_path, capsys):
    class Node(train_gpt2.Processes):
        def sum(self, tensor):
            return tensor  # the other one adds nothing

    data = write_examples(tmp_path / "data.jsonl", EXAMPLES[:3])
    config = small(hellaswag_every=1, hellaswag_data=str(data))
    node = Node(0, 2, ALONE.device, ALONE.dtype)
    assert train_gpt2.load_hellaswag(config, node) == []
    assert capsys.readouterr().out == "HellaSwag is left out: not all nodes have its data\n"


def test_scoring_recompiles_nothing(small, tmp_path, error_on_recompile, monkeypatch, capsys):
    """Compiled graphs are those of training and validation; a plain run has the same scores."""
    from torch._dynamo.utils import counters

    # what is compiled again, and when, does not depend on what the graphs are turned into
    quick = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(train_gpt2.torch, "compile", quick)
    set_batches(monkeypatch, 256, 64, 16)  # many shapes
    data = write_examples(tmp_path / "data.jsonl", make_examples(30, most=8))
    settings = dict(hellaswag_every=1, hellaswag_data=str(data), max_steps=4, max_lr=0.05)
    settings |= dict(val_every=2)
    counters.clear()
    config = small(**settings, compile=True)
    assert train_gpt2.train(config) == 0
    output = capsys.readouterr().out
    assert "compiled in" in output and "failed" not in output
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]
    eager = small(**settings, log_dir=str(tmp_path / "eager"))
    train_gpt2.train(eager)
    assert list(losses(config, "hella")) == [0, 1, 2, 3, 4]
    assert losses(config, "hella") == losses(eager, "hella")


def test_scoring_leaves_the_training_as_it_is(small, tmp_path, monkeypatch):
    data = write_examples(tmp_path / "data.jsonl", make_examples(10, most=8))
    for dtype in ("float32", "bfloat16"):
        runs = [
            small(dtype=dtype, log_dir=str(tmp_path / f"{dtype}_{every}"), hellaswag_every=every,
                  hellaswag_data=str(data))
            for every in (0, 1)
        ]  # fmt: skip
        for config in runs:
            train_gpt2.train(config)
        assert losses(runs[0]) == losses(runs[1]) and losses(runs[0], "hella") == {}
        weights = [Path(c.log_dir) / "step_00004" / "model.safetensors" for c in runs]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def assert_trained_without(config, output: str) -> None:
    """To the end, after one line on HellaSwag."""
    lines = [line for line in output.splitlines() if "HellaSwag" in line]
    assert len(lines) == 1 and lines[0].startswith("HellaSwag is left out: "), lines
    assert losses(config, "hella") == {} and list(losses(config)) == [0, 1]
    assert "finished:" in output


@pytest.mark.parametrize(
    "broken_file", ["not JSON", "no ctx", "endings are numbers"], indirect=True
)
def test_broken_data_does_not_stop_training(small, broken_file, capsys):
    config = small(hellaswag_every=1, hellaswag_data=str(broken_file), max_steps=2)
    assert train_gpt2.train(config) == 0
    assert_trained_without(config, capsys.readouterr().out)


@pytest.mark.parametrize("path", ["none.jsonl", "."])
def test_missing_data_does_not_stop_training(small, tmp_path, capsys, path):
    config = small(hellaswag_every=1, hellaswag_data=str(tmp_path / path), max_steps=2)
    assert train_gpt2.train(config) == 0
    assert_trained_without(config, capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["missing", "cut", "garbage"])
def test_a_bad_server_does_not_stop_training(small, tmp_path, capsys, monkeypatch, server, kind):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hellaswag, "FOLDER", tmp_path / "hellaswag")
    monkeypatch.setattr(hellaswag, "URL", server.url(kind))
    config = small(hellaswag_every=1, max_steps=2)
    assert train_gpt2.train(config) == 0
    assert_trained_without(config, capsys.readouterr().out)


def test_a_model_of_another_vocabulary_trains_without(small, tmp_path, capsys):
    """On shards of its own tokens."""
    shape = dict(block_size=32, vocab_size=1000, n_layer=1, n_head=1, n_embd=8)
    train_gpt2.GPT(train_gpt2.GPTConfig(**shape)).save_pretrained(tmp_path / "model")
    (tmp_path / "shards").mkdir()
    for split in ("train", "val"):
        np.save(tmp_path / "shards" / f"{split}_000.npy", np.arange(2000, dtype=np.uint16) % 1000)
    data = write_examples(tmp_path / "data.jsonl", EXAMPLES[:2])
    config = small(
        data=str(tmp_path / "shards"), init_from=str(tmp_path / "model"), max_steps=2,
        hellaswag_every=1, hellaswag_data=str(data),
    )  # fmt: skip
    assert train_gpt2.train(config) == 0
    assert_trained_without(config, capsys.readouterr().out)


def test_hellaswag_every_0_never_looks(small, tmp_path, monkeypatch, server, capsys):
    monkeypatch.setattr(hellaswag, "FOLDER", tmp_path / "hellaswag")
    monkeypatch.setattr(hellaswag, "URL", server.url("good"))
    assert train_gpt2.train(small(hellaswag_every=0)) == 0
    assert train_gpt2.train(small(hellaswag_every=0, hellaswag_data="nowhere", max_steps=5)) == 0
    assert server.requests == [] and not (tmp_path / "hellaswag").exists()
    assert "HellaSwag" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hellaswag_every", "hellaswag_examples"])
def test_negative_settings_are_refused(small, name):
    with pytest.raises(UserError, match=f"{name}=-1: must be 0 or more"):
        train_gpt2.check_config(small(**{name: -1}))
