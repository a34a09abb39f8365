"""HellaSwag's scores equal plain ones, however the examples are packed, cut and shared.

1. Losses and predictions are those of four rows, one example at a time, for every style, shape and
   batch, also beyond the window; packed endings do not see each other; `harness` is
   lm-evaluation-harness's own logic, written out here and, if it is installed, itself.
2. Reading the data.

HELLASWAG_DATA=hellaswag_val.jsonl has lm-evaluation-harness score 600 examples of that file, too.
"""

import copy
import functools
import gc
import json
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hellaswag_helpers import (
    ALONE,
    EXAMPLES,
    HAND_MADE,
    ONLY_SPACES,
    SHAPES,
    WORDS,
    make_example,
    make_examples,
    make_model,
    make_questions,
    set_batches,
    text,
    write_examples,
)
from model_helpers import record_cudnn
from torch.nn import functional as F

import hellaswag
import train_gpt2
from support import devices, hellaswag_eval, tokenizer
from support.distributed import Runtime
from support.errors import UserError
from train_gpt2 import GPT, GPTConfig

BATCHES = [(4096, 256, 16), (64, 7, 1), (1, 2, 5)]  # BATCH_TOKENS, CHUNK_ROWS, LENGTH_STEP


@pytest.fixture(scope="module", autouse=True)
def keep_freed_memory():
    """As in the programs: logits of some MB are allocated and freed again and again."""
    devices.keep_freed_memory()


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
    both, alone = encode(context + continuation), encode(context)
    return alone or [50256], both[len(alone) :]  # at ONLY_SPACES, the harness stops here


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


@pytest.mark.parametrize("style", hellaswag_eval.STYLES)
def test_questions_are_tokenized_as_written_out(style):
    for example in EXAMPLES + make_examples(300, seed=1):
        question, pairs = hellaswag_eval.make_question(example, style), plain_pairs(example, style)
        assert [question.context] * 4 == [context for context, *_ in pairs]
        assert question.endings == [ending for _, ending, _ in pairs]
        assert list(question.lengths) == [divisor for *_, divisor in pairs]
        assert question.label == example["label"] and all(question.endings)


@pytest.mark.parametrize("style", hellaswag_eval.STYLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_four_plain_rows(shape, style, monkeypatch):
    expected, chosen, chosen_norm = plain(shape, style)
    questions = make_questions(EXAMPLES, style)
    window = SHAPES[shape]["block_size"]
    if shape == "short window":  # what the examples are for
        assert sum(len(question.context) > window for question in questions) >= 2
        if style != "choice":
            assert sum(len(e) > window + 1 for q in questions for e in q.endings) >= 5
    for batches in BATCHES if shape == "short window" else BATCHES[:1]:
        set_batches(monkeypatch, *batches)
        found = hellaswag_eval.ending_losses(make_model(shape), questions, ALONE)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-4)
        predicted = hellaswag_eval.predict(found, questions)
        assert predicted[0].tolist() == chosen.tolist()
        assert predicted[1].tolist() == chosen_norm.tolist()
        labels = np.array([example["label"] for example in EXAMPLES])
        assert hellaswag_eval.score(found, questions) == (
            np.mean(chosen == labels), np.mean(chosen_norm == labels), len(EXAMPLES),
        )  # fmt: skip


def test_every_length_around_the_window_is_scored(monkeypatch):
    """Contexts and endings of 1 to twice the window: no index error, and the last tokens count."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=6, n_layer=1, n_head=1, n_embd=8))
    rng = random.Random(0)
    questions = [
        hellaswag_eval.Question(
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
        found = hellaswag_eval.ending_losses(model, questions, ALONE)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_ending_does_not_see_the_others():
    """Changing one changes its own loss and nobody else's, in its row or in the next one."""
    model, rng = make_model("long window"), random.Random(0)
    questions = make_questions(EXAMPLES[:6])
    before = hellaswag_eval.ending_losses(model, questions, ALONE)
    for j in range(4):
        endings = list(questions[1].endings)
        endings[j] = [rng.randrange(50257) for _ in range(len(endings[j]) + j)]
        changed = [questions[0], questions[1]._replace(endings=endings), *questions[2:]]
        differ = np.abs(hellaswag_eval.ending_losses(model, changed, ALONE) - before)
        assert differ[1, j] > 0.1
        differ[1, j] = 0
        assert differ.max() < 1e-4
    other = [questions[0]._replace(context=[11, *questions[0].context[1:]]), *questions[1:]]
    differ = np.abs(hellaswag_eval.ending_losses(model, other, ALONE) - before)
    assert differ[0].min() > 1e-3 and differ[1:].max() < 1e-4  # all four see their context


def test_padding_changes_nothing():
    model, questions = make_model(), make_questions(EXAMPLES)
    rows = list(hellaswag_eval.make_rows(questions, 24))[:20]
    T = max(map(len, rows))
    batch, scored = hellaswag_eval.make_batch(rows, T)
    losses = hellaswag_eval.token_losses(model, batch, scored)
    longer = hellaswag_eval.token_losses(model, *hellaswag_eval.make_batch(rows, T + 21))
    torch.testing.assert_close(longer, losses, atol=1e-4, rtol=0)
    padding = batch[2] == -1
    assert padding.any()
    noise = batch.clone()
    noise[0][padding] = torch.randint(50257, (int(padding.sum()),))
    assert torch.equal(hellaswag_eval.token_losses(model, noise, scored), losses)


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
    row = hellaswag_eval.make_row([5, 6, 7], [[8, 9, 10], [11], [12, 13], [14, 15, 16, 17]], 4)
    batch, scored = hellaswag_eval.make_batch([row], 15)
    original = model.hidden
    model.hidden = lambda idx, position, mask: masks.append(mask) or original(idx, position, mask)
    hellaswag_eval.token_losses(model, batch, scored)
    del model.hidden
    tokens, positions, segments, targets = batch
    assert tokens[0].tolist() == [5, 6, 7, 8, 9, 7, 7, 12, 7, 14, 15, 16, 0, 0, 0]
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 2, 2, 3, 2, 3, 4, 5, 0, 0, 0]
    assert segments[0].tolist() == [0, 0, 5, 5, 5, 6, 7, 7, 8, 8, 8, 8, -1, -1, -1]
    assert targets[0, 2:12].tolist() == [8, 9, 10, 11, 12, 13, 14, 15, 16, 17]
    assert scored.tolist() == list(range(2, 12))
    seen = seen_by_each(model, tokens, positions, masks[0])
    own = segments[0].tolist()
    for i in range(12):
        expected = [j <= i and own[j] in (0, own[i]) for j in range(12)] + [False] * 3
        assert seen[i].tolist() == expected, i
    idx = torch.randint(50257, (1, 12))
    assert torch.equal(seen_by_each(model, idx, None, None), torch.ones(12, 12).bool().tril())


@pytest.mark.gpt2
def test_hidden_without_a_mask_is_the_textbook_model():
    """Equal to the textbook model bit for bit; an explicit causal mask changes nothing."""
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
        examples.append(make_example(text(rng, 9), "", endings))
    questions = make_questions(examples, "harness")
    assert all(q.endings[1] == q.endings[2] == q.endings[3] for q in questions)
    found = hellaswag_eval.ending_losses(make_model("long window"), questions, ALONE)
    assert np.array_equal(found[:, 1], found[:, 2]) and np.array_equal(found[:, 1], found[:, 3])
    assert set(hellaswag_eval.predict(found, questions)[0]) == {1}


def test_the_score_is_the_share_of_correct_choices():
    """Against plain sums; the first of equal losses is taken, an ending without text never."""
    rng = np.random.default_rng(0)
    found = rng.integers(1, 5, (60, 4)) / 2.0  # many ties
    lengths = rng.integers(0, 4, (60, 4))
    lengths[:, 3] += lengths.sum(axis=1) == 0
    labels = rng.integers(0, 4, 60)
    questions = [
        hellaswag_eval.Question([1], [[1]] * 4, row.tolist(), int(label))
        for row, label in zip(lengths, labels)
    ]
    hits, hits_norm = [], []
    for four, divisors, label in zip(found.tolist(), lengths.tolist(), labels):
        hits.append(four.index(min(four)) == label)
        each = [loss / divisor if divisor else math.inf for loss, divisor in zip(four, divisors)]
        hits_norm.append(each.index(min(each)) == label)
    score = hellaswag_eval.score(found, questions)
    assert score == (np.mean(hits), np.mean(hits_norm), 60)
    assert 0.1 < score.acc_norm < 0.5
    errors = [np.std(h, ddof=1) / math.sqrt(60) for h in (hits, hits_norm)]
    assert str(score) == (
        f"acc {np.mean(hits):.4f} +- {errors[0]:.4f}, "
        f"acc_norm {np.mean(hits_norm):.4f} +- {errors[1]:.4f}, 60 examples"
    )
    one = hellaswag_eval.score(found[:1], questions[:1])
    assert "+- 0.0000" in str(one) and one.questions == 1
    assert "acc 0.2955 +- 0.0046," in str(hellaswag_eval.Score(0.2955, 0.5, 10042))


@pytest.mark.parametrize("world_size", [2, 3, 5, 99])
def test_processes_share_the_examples(world_size, monkeypatch):
    """Each ending is scored once, by one of them, to the same last bit; 99 are too many."""

    class Part(Runtime):
        def all_gather(self, value):
            return [value]

    set_batches(monkeypatch, 256, 64, 16)
    questions = make_questions(EXAMPLES)
    complete = hellaswag_eval.ending_losses(make_model(), questions, ALONE)
    parts = np.stack([
        hellaswag_eval.ending_losses(
            make_model(), questions, Part(rank, world_size, ALONE.device, ALONE.dtype)
        )
        for rank in range(world_size)
    ])  # fmt: skip
    assert ((parts != 0).sum(axis=0) == 1).all()
    assert np.array_equal(parts.sum(axis=0), complete)
    if world_size < 10:
        assert (parts != 0).any(axis=(1, 2)).all()


def tensor_bytes() -> int:
    """What all tensors of this process hold."""
    found = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def test_memory_stays_flat(monkeypatch):
    """Between batches nothing is kept but a loss for each token."""
    set_batches(monkeypatch, 64, 64, 16)
    model, questions, held = make_model(), make_questions(make_examples(40)), []
    original = hellaswag_eval.token_losses

    def token_losses(model, batch, scored):
        held.append(0 if len(held) % 9 else tensor_bytes())
        return original(model, batch, scored)

    monkeypatch.setattr(hellaswag_eval, "token_losses", token_losses)
    hellaswag_eval.ending_losses(model, questions, ALONE)
    tokens = sum(len(ending) for question in questions for ending in question.endings)
    assert len(held) > 27
    held = held[::9]
    assert held[-1] - held[0] < 4 * tokens + 10_000  # batches differ by less
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_cudnn_attention_is_for_the_training_step_only(small, monkeypatch):
    """Scoring has many shapes, for each of which cuDNN would build a plan; a step has one."""
    config, found = small(max_steps=1), record_cudnn(monkeypatch)
    train_gpt2.train(config)
    assert len(found) >= config.n_layer and all(found)
    found.clear()
    hellaswag_eval.ending_losses(make_model(), make_questions(EXAMPLES), ALONE)
    assert found and not any(found) and torch.backends.cuda.cudnn_sdp_enabled()


def test_bfloat16_is_close_and_does_not_change_the_model():
    model, questions = make_model(), make_questions(EXAMPLES)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half = Runtime(0, 1, ALONE.device, torch.bfloat16)
    exact = hellaswag_eval.ending_losses(model, questions, ALONE)
    close = hellaswag_eval.ending_losses(model, questions, half)
    assert not np.array_equal(exact, close)
    np.testing.assert_allclose(close, exact, rtol=0.03, atol=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


ACCELERATORS = [
    name
    for name, available in (
        ("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()),
    )
    if available
]  # fmt: skip


@pytest.mark.skipif(not ACCELERATORS, reason="no GPU here")
def test_a_gpu_gives_the_same_losses():
    for name in ACCELERATORS:
        device = devices.choose_device(name)
        model = copy.deepcopy(make_model()).to(device)
        runtime = Runtime(0, 1, device, torch.float32)
        found = hellaswag_eval.ending_losses(model, make_questions(EXAMPLES), runtime)
        np.testing.assert_allclose(found, plain("short window", "completion")[0], atol=0.01)


# -------------------------------------------------------------------------------------------------
# lm-evaluation-harness itself, and build-nanogpt's names


def harness_examples() -> list[dict]:
    """Examples as the harness's task reads them: always with ctx_a and ctx_b."""
    examples = [example for example in HAND_MADE if example is not ONLY_SPACES]
    examples += [example for example in make_examples(60, seed=2, most=10) if "ctx_a" in example]
    if path := os.environ.get("HELLASWAG_DATA"):
        for number, example in enumerate(hellaswag_eval.read_examples(Path(path))[::16][:600]):
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
    questions = make_questions(examples, "harness")
    fit = [max(map(len, question.endings)) <= 64 for question in questions]  # else it refuses
    examples = [example for example, fits in zip(examples, fit) if fits]
    questions = [question for question, fits in zip(questions, fit) if fits]
    data = write_examples(tmp_path / "data.jsonl", examples)
    results, samples = run_harness(tmp_path / "model", data, monkeypatch)
    found = hellaswag_eval.ending_losses(model, questions, ALONE)
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    theirs = [[-float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-4)
    score = hellaswag_eval.score(found, questions)
    assert score.acc == results["acc,none"] and score.acc_norm == results["acc_norm,none"]
    chosen = hellaswag_eval.predict(found, questions)
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


@pytest.mark.parametrize("split", ["val", "train"])
def test_iterate_examples_yields_each_line(tmp_path, monkeypatch, split):
    examples = make_examples(9)
    monkeypatch.setattr(hellaswag_eval, "FOLDER", tmp_path)
    monkeypatch.setattr(hellaswag_eval, "EXAMPLES", {split: 9})
    write_examples(tmp_path / f"hellaswag_{split}.jsonl", examples)
    assert list(hellaswag.iterate_examples(split)) == examples


def test_the_dataset_is_known():
    """Where it is, and how many examples its splits have (Zellers et al. 2019)."""
    assert hellaswag_eval.EXAMPLES == {"train": 39905, "val": 10042}
    assert hellaswag_eval.URL.format("val") == (
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
    )
    assert hellaswag_eval.FOLDER == ROOT / "hellaswag"


# -------------------------------------------------------------------------------------------------
# Data


def test_a_given_file_may_be_of_any_length(tmp_path):
    """Blank lines, labels as text, no newline at the end; a limit takes the first ones."""
    examples = make_examples(5)
    lines = [json.dumps(example | {"label": str(example["label"])}) for example in examples]
    path = tmp_path / "given.jsonl"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    assert hellaswag_eval.find_file(data=str(path)) == path
    assert hellaswag_eval.read_examples(path) == examples
    assert hellaswag_eval.read_examples(path, 3) == examples[:3]
    assert hellaswag_eval.read_examples(path, 99) == examples
    path.write_text("\n".join([*lines[:3], "{broken"]), encoding="utf-8")
    assert hellaswag_eval.read_examples(path, 3) == examples[:3]  # what is not needed is not read
    with pytest.raises(UserError, match="line 4 is not a HellaSwag example"):
        hellaswag_eval.read_examples(path)


@pytest.mark.parametrize("name", ["none.jsonl", "a" * 300, "", "."])
def test_a_path_that_is_no_file_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"data={name!r}: no such file"):
        hellaswag_eval.find_file(data=name)


@pytest.mark.parametrize(
    "content",
    [
        bytes(range(128, 256)) * 200,
        json.dumps({"ctx": "a" * 20_000}).encode(),
        ("{" + "x" * 20_000).encode("utf-16"),
        b"[" * 20_000,
        json.dumps(make_examples(1)[0] | {"label": math.inf}).encode(),
    ],
    ids=["not UTF-8", "other JSON", "UTF-16", "nested", "an infinite label"],
)
def test_a_file_of_another_kind_is_one_short_line(tmp_path, content):
    path = tmp_path / "other.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="line 1 is not a HellaSwag example") as error:
        hellaswag_eval.read_examples(path)
    assert len(str(error.value)) < 200 + len(str(path))
