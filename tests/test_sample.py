"""Sampling: the cache changes nothing, the distributions are transformers', sample.py does it all.

Oracles: transformers' `generate` and logits processors, the plain loop over whole sequences, and
the ids that are decoded as one text.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, environment
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

import hellaswag
import sample
import train_gpt2
from support import cli, quantize, tokenizer
from support.errors import UserError
from train_gpt2 import GPT, GPTConfig, sample_ids

V, END = tokenizer.VOCAB_SIZE, tokenizer.END_OF_TEXT_ID


def make(seed: int = 0, **shape) -> GPT:
    """A small random GPT that says different things at different places."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(n_layer=2, n_head=2, n_embd=32, block_size=32) | shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def random_ids(*shape, seed: int = 0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def generators(*seeds) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# -------------------------------------------------------------------------------------------------
# The model's generate


@pytest.mark.parametrize("prompt", [1, 9, 16, 40])
@pytest.mark.parametrize("slide", [1, 4, 16])
def test_ids_with_the_cache_are_those_without(prompt, slide):
    """Within the window and past it, by the stated rule: so many dropped when it is full."""
    model, ids = make(block_size=16), random_ids(3, prompt)
    found = model.generate(ids, 45, temperature=0, slide=slide)
    start = max(0, prompt - 16)
    for place in range(prompt, prompt + 45):
        if place - start > 16:
            start += slide
        with torch.no_grad():
            likeliest = model(found[:, start:place])[0][:, -1].argmax(dim=1)
        assert torch.equal(found[:, place], likeliest), place


def test_greedy_text_is_that_of_transformers(tmp_path):
    """The same weights, float32, 200 tokens after each of several prompts."""
    model = make(n_layer=3, n_embd=64, n_head=4, block_size=256)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    for prompt in ("Hello, I'm a language model,", "é中\U0001f600", "The answer is"):
        ids = torch.tensor([tokenizer.get_encoding().encode_ordinary(prompt)])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False,
            pad_token_id=END, eos_token_id=None,
        )  # fmt: skip
        assert expected.size(1) == ids.size(1) + 200
        assert torch.equal(model.generate(ids, 200, temperature=0), expected)


@pytest.mark.parametrize("settings", [{}, dict(top_k=40), dict(top_p=0.8), dict(temperature=0.7)])
def test_a_row_is_the_same_in_any_batch(settings):
    """Four rows with a generator each, and each of them alone: the same ids."""
    model, ids = make(), random_ids(4, 5)
    together = model.generate(ids, 40, **settings, generator=generators(1, 2, 3, 1))
    for row, seed in enumerate((1, 2, 3, 1)):
        alone = model.generate(ids[row : row + 1], 40, **settings, generator=generators(seed))
        assert torch.equal(alone[0], together[row])
    same = model.generate(ids[:1].repeat(2, 1), 40, **settings, generator=generators(1, 2))
    assert not torch.equal(same[0], same[1])


@pytest.mark.parametrize("top_k, top_p, temperature", [
    (None, None, 1.3), (5, None, 1.0), (None, 0.6, 1.0), (8, 0.5, 0.7), (None, 1e-6, 1.0),
    (1, None, 2.0), (None, 0.999, 1.0),
])  # fmt: skip
def test_samples_have_transformers_distribution(top_k, top_p, temperature):
    """Of 60,000 draws: none where transformers leaves no probability, else as often as it says."""
    logits = torch.randn(1, 24, generator=torch.Generator().manual_seed(3)) * 2
    expected = logits / temperature
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    expected = F.softmax(expected, dim=1)[0]
    generator = torch.Generator().manual_seed(0)
    draws = sample_ids(logits.repeat(60_000, 1), temperature, top_k, top_p, generator)
    share = torch.bincount(draws[:, 0], minlength=24) / len(draws)
    assert share[expected == 0].sum() == 0
    torch.testing.assert_close(share, expected, atol=0.01, rtol=0)


def test_a_row_that_stopped_says_only_so():
    """Its ids are those it had without stopping, up to the first stop; the others go on."""
    model, ids = make(), random_ids(4, 3)
    free = model.generate(ids, 20, temperature=0)
    stop = free[0, 3 + 6].item()
    found = model.generate(ids, 20, temperature=0, stop=stop)
    for row, (expected, text) in enumerate(zip(free[:, 3:].tolist(), found[:, 3:].tolist())):
        end = expected.index(stop) if stop in expected else 20
        assert text == expected[:end] + [stop] * (20 - end), row
    alone = model.generate(ids[:1], 20, temperature=0, stop=stop)
    assert alone.size(1) == 3 + free[0, 3:].tolist().index(stop) + 1


def test_only_the_last_position_gets_logits_and_the_cache_is_taken_once(monkeypatch):
    model, shapes, memories = make(), [], []
    model.lm_head.register_forward_hook(lambda _, x, y: shapes.append(tuple(x[0].shape)))
    add = train_gpt2.KVCache.add

    def spy(cache, k, v):
        result = add(cache, k, v)
        memories.append((id(cache), cache.memory.data_ptr(), cache.memory.size(3)))
        return result

    monkeypatch.setattr(train_gpt2.KVCache, "add", spy)
    model.generate(random_ids(3, 7), 10)
    assert shapes == [(3, 32)] * 10
    assert len(memories) == 20 and len(set(memories)) == 2  # two layers
    assert {length for _, _, length in memories} == {17}


def test_training_sees_no_cache():
    """The function that is trained has the operations it had: no cache, one causal attention."""
    model, ids = make(), random_ids(2, 8)
    with torch.no_grad():
        plain = model.hidden(ids)
        caches = [train_gpt2.KVCache(8) for _ in range(2)]
        assert torch.equal(model.hidden(ids, caches=caches), plain)


def test_ten_thousand_ids_of_a_padded_model_are_the_tokenizers(tmp_path):
    """A foreign model with 50,304 rows, whose spare ones would be the likeliest of all."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=50304, n_positions=8, n_embd=32, n_layer=1, n_head=1)
    ).eval()
    with torch.no_grad():
        theirs.transformer.wte.weight[V:].normal_(std=30)
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert model.config.vocab_size == V
    ids = model.generate(torch.full((200, 1), 262), 50, top_k=500, slide=8)[:, 1:]
    assert ids.numel() == 10_000 and ids.max() < V
    tokenizer.get_encoding().decode_batch(ids.tolist())
    x = random_ids(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], theirs(x).logits[..., :V], atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------
# In and out


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """(transformers' GPT-2 with a head of its own, its directory)."""
    torch.manual_seed(0)
    shape = dict(n_positions=32, n_embd=32, n_layer=2, n_head=2)
    theirs = GPT2LMHeadModel(GPT2Config(**shape, tie_word_embeddings=False)).eval()
    directory = tmp_path_factory.mktemp("untied")
    theirs.save_pretrained(directory)
    assert not torch.equal(theirs.lm_head.weight, theirs.transformer.wte.weight)
    return theirs, directory


def test_an_untied_head_is_kept(untied, tmp_path):
    """Logits, loss and the way back are those of transformers; the head counts as parameters."""
    theirs, directory = untied
    ours, ids = GPT.from_pretrained(directory), random_ids(2, 32)
    assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, atol=1e-4, rtol=0)
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again[name], tensor), name
    with torch.no_grad():
        quantize.to_int8(ours)
        torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, atol=0.02, rtol=0)


def test_an_untied_model_is_tuned_and_resumed_exactly(untied, small, tmp_path):
    """Both matrices learn, and a run of 2 + 2 steps ends in the bits of one of 4."""
    settings = dict(init_from=str(untied[1]), max_lr=0.01)
    whole = small(**settings, log_dir=str(tmp_path / "whole"), checkpoint_every=2)
    train_gpt2.train(whole)
    halves = small(**settings, log_dir=str(tmp_path / "halves"))
    (tmp_path / "halves").mkdir()
    os.rename(tmp_path / "whole/step_00002", tmp_path / "halves/step_00002")
    train_gpt2.train(halves)
    states = [GPT.from_pretrained(f"{c.log_dir}/step_00004").state_dict() for c in (whole, halves)]
    start = GPT.from_pretrained(untied[1]).state_dict()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert not torch.equal(states[0][name], start[name])
    moments = [
        train_gpt2.load_train_state(Path(c.log_dir) / "step_00004")["optimizer"]["state"]
        for c in (whole, halves)
    ]
    for i in moments[0]:
        assert torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"])


def test_a_checkpoint_with_the_spare_rows_of_the_embedding_alone_continues(small):
    """As train_state.pt had them before heads could be untied."""
    config = small()
    train_gpt2.train(config)
    directory = Path(config.log_dir) / "step_00004"
    state = train_gpt2.load_train_state(directory)
    (rows,) = state["spare_rows"].values()
    old = train_gpt2.set_up_model(config, state | {"spare_rows": rows}, directory)
    new = train_gpt2.set_up_model(config, state, directory)
    assert rows.abs().sum() > 0 and torch.equal(old.transformer.wte.weight[V:], rows)
    assert torch.equal(old.transformer.wte.weight, new.transformer.wte.weight)


def test_fine_tuning_has_a_recipe_with_its_own_rate(untied):
    config = cli.parse(
        train_gpt2.Config, train_gpt2.RECIPES, ["finetune", f"--init_from={untied[1]}"], ""
    )
    assert config.max_lr < train_gpt2.Config.max_lr / 10
    assert config.init_from == str(untied[1]) and config.log_dir != train_gpt2.Config.log_dir


# -------------------------------------------------------------------------------------------------
# 8 bits


def test_rounded_rows_are_within_half_a_step():
    """Each row has its own scale; a row of zeros stays zero."""
    weight = torch.randn(50, 40) * torch.logspace(-3, 3, 50)[:, None]
    weight[7] = 0
    rounded, scale = quantize.round_rows(weight)
    assert rounded.dtype == torch.int8 and rounded.abs().max() == 127
    error = (rounded.float() * scale.float()[:, None] - weight).abs()
    assert (error <= scale.float()[:, None] * 0.5 + weight.abs() * 0.005).all()
    assert error[7].sum() == 0


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_in_8_bits_is_the_one_with_the_rounded_weights(rows, dtype, bias):
    """By the kernel or not."""
    linear = torch.nn.Linear(64, 96, bias=bias)
    rounded, scale = quantize.round_rows(linear.weight)
    layer = quantize.Int8Linear(rounded, scale, linear.bias)
    x = torch.randn(rows, 64)
    with torch.no_grad():
        expected = F.linear(x, rounded.float() * scale.float()[:, None], linear.bias)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = layer(x[None])
    assert found.shape == (1, rows, 96) and found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found[0].float(), expected, atol=tolerance, rtol=tolerance)


def test_gpt2_takes_a_quarter_of_its_bytes():
    with torch.device("meta"), train_gpt2.WithoutInit():
        model = GPT(GPTConfig())
    size = 4 * model.num_parameters()
    model = model.to_empty(device="cpu")
    model.tie()
    assert quantize.bytes_of(model) == pytest.approx(size, rel=0.01)
    assert quantize.bytes_of(quantize.to_int8(model)) < 0.26 * size


# -------------------------------------------------------------------------------------------------
# The program, on a model that learned a little


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The log directory of a run of 60 steps, with checkpoints of steps 30 and 60."""
    directory = tmp_path_factory.mktemp("run")
    settings = SMALL | dict(
        data=str(ROOT / "input.txt"), log_dir=str(directory / "log"), n_embd=64, T=64,
        total_batch_size=256, B=4, max_steps=60, max_lr=5e-3, val_every=60, checkpoint_every=30,
    )  # fmt: skip
    train_gpt2.train(train_gpt2.Config(**settings))
    return directory / "log"


def test_8_bits_cost_little_on_text(run):
    """A trained model, real text: the losses are within 0.02 nats."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[-20000:]
    ids = torch.tensor(tokenizer.get_encoding().encode_ordinary(text)[: 64 * 20 + 1])
    x, y = ids[:-1].view(20, 64), ids[1:].view(20, 64)
    model = GPT.from_pretrained(run)
    with torch.no_grad():
        before = model(x, y)[1].item()
        after = quantize.to_int8(model)(x, y)[1].item()
    assert before < 7.5  # it has learned something
    assert 0 < abs(after - before) < 0.02


# The string by whose ids llama.cpp's converter tells which pre-tokenizer a model has, and the hash
# that stands for GPT-2's (convert_hf_to_gguf.py, get_vocab_base_pre; MIT).
GGUF_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, "
    "'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
GGUF_HASH = "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454"


def test_llama_cpp_knows_the_tokenizer_and_every_tensor(run):
    """By the converter's own check of the ids, and by the names and merges that `gguf` reads."""
    directory = run / "step_00060"
    ids = AutoTokenizer.from_pretrained(directory).encode(GGUF_TEXT)
    assert hashlib.sha256(str(ids).encode()).hexdigest() == GGUF_HASH
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    special = gguf.SpecialVocab(directory, load_merges=True)
    assert len(special.merges) == 50_000
    assert special.special_token_ids["bos"] == special.special_token_ids["eos"] == END
    layers = GPT.from_pretrained(directory).config.n_layer
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, layers)
    for name in load_file(directory / "model.safetensors"):
        assert names.get_name(name, try_suffixes=(".weight", ".bias")), name


def call(*arguments, stdin: bytes = b"", **kwargs) -> subprocess.CompletedProcess:
    """`sample.py` in a process of its own; standard output as bytes."""
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)]
    kwargs = dict(env=environment(), timeout=120, cwd=kwargs.pop("cwd", ROOT)) | kwargs
    return subprocess.run(command, input=stdin, capture_output=True, **kwargs)


def texts_of(*arguments, monkeypatch) -> tuple[str, str]:
    """What `sample.py` in this process prints: (standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert sample.main() == 0
    return out.getvalue(), err.getvalue()


def expected_text(directory: Path, prompt: str, n: int, seed: int, **settings) -> str:
    """One text by the model's own generate."""
    ids = torch.tensor([tokenizer.get_encoding().encode(prompt, allowed_special="all")])
    model = GPT.from_pretrained(directory)
    ids = model.generate(ids, n, generator=generators(seed), **settings)[0].tolist()
    return tokenizer.get_encoding().decode(ids)


def test_one_text_stands_alone_and_its_source_on_standard_error(run, tmp_path):
    """The newest checkpoint of a log directory, from another directory, as a user starts it."""
    done = call(
        os.path.relpath(run, tmp_path), "--prompt=QUEEN MARETH:\n", "--max_new_tokens=30",
        "--dtype=float32", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = expected_text(run / "step_00060", "QUEEN MARETH:\n", 30, 1337, top_k=50)
    assert done.stdout.decode() == expected + "\n"
    error = done.stderr.decode()
    assert "step_00060 (model.safetensors, step 60): cpu in float32" in error
    assert re.search(r"30 tokens in [\d.]+ s, [\d,]+ tokens/s\n$", error)
    assert list(tmp_path.iterdir()) == []


def test_three_models_are_one_block(run, tmp_path, monkeypatch):
    """A heading for each text, with file and step; every text by its own model and seed."""
    GPT.from_pretrained(run / "step_00030").save_pretrained(tmp_path / "theirs")
    models = (run, run / "step_00030", tmp_path / "theirs")
    arguments = ("--num=2", "--max_new_tokens=12", "--prompt=PENNY:", "--dtype=float32")
    out, _ = texts_of(*models, *arguments, monkeypatch=monkeypatch)
    names = [
        f"{run / 'step_00060'} (model.safetensors, step 60)",
        f"{run / 'step_00030'} (model.safetensors, step 30)",
        f"{tmp_path / 'theirs'} (model.safetensors)",
    ]
    directories = [run / "step_00060", run / "step_00030", run / "step_00030"]
    expected = ""
    for name, directory in zip(names, directories):
        for i in range(2):
            text = expected_text(directory, "PENNY:", 12, 1337 + i, top_k=50)
            expected += f"--- {name}, text {i + 1} of 2\n{text}\n\n"
    assert out == expected
    alone, _ = texts_of(*models, *arguments[1:], monkeypatch=monkeypatch)
    assert alone.count("---") == 3 and "text 1" not in alone


@pytest.mark.parametrize("settings", [
    ["--temperature=0"], ["--top_k=0", "--top_p=0.9"], ["--seed=5", "--temperature=0.5"],
    ["--max_new_tokens=150", "--slide=1"], ["--max_new_tokens=150"],
])  # fmt: skip
def test_settings_reach_the_model(run, monkeypatch, settings):
    out, _ = texts_of(run, "--dtype=float32", "--prompt=A", *settings, monkeypatch=monkeypatch)
    given = dict(setting.removeprefix("--").split("=") for setting in settings)
    top_p = float(given["top_p"]) if "top_p" in given else None
    expected = expected_text(
        run / "step_00060", "A", int(given.get("max_new_tokens", 100)),
        int(given.get("seed", 1337)),
        temperature=float(given.get("temperature", 1)), top_k=int(given.get("top_k", 50)) or None,
        top_p=top_p, slide=int(given.get("slide", 16)),
    )  # fmt: skip
    assert out == expected + "\n"


def test_streamed_text_is_the_text(run, monkeypatch):
    arguments = [run, "--num=3", "--max_new_tokens=40", "--dtype=float32", "--prompt=é中\U0001f600"]
    whole, _ = texts_of(*arguments, monkeypatch=monkeypatch)
    assert texts_of(*arguments, "--stream", monkeypatch=monkeypatch)[0] == whole
    assert texts_of(*arguments, "--stream", "True", monkeypatch=monkeypatch)[0] == whole
    assert texts_of("--stream", *arguments, monkeypatch=monkeypatch)[0] == whole


def test_a_stream_comes_piece_by_piece(run, monkeypatch):
    """What is written before the last token is made is most of the text."""
    written, made = [], []
    monkeypatch.setattr(sample, "write", lambda *parts: written.append("".join(parts)))
    stream = GPT.stream

    def spy(self, *args, **kwargs):
        for new in stream(self, *args, **kwargs):
            made.append(len("".join(written)))
            yield new

    monkeypatch.setattr(GPT, "stream", spy)
    texts_of(run, "--stream", "--max_new_tokens=30", monkeypatch=monkeypatch)
    assert len(made) == 30 and made[0] < made[15] < made[29] < len("".join(written))


def test_no_half_character_is_written():
    """Random texts as random tokens: every prefix that is given out is whole characters."""
    rng = random.Random(0)
    encoding = tokenizer.get_encoding()
    for _ in range(300):
        text = "".join(rng.choice("aé中\U0001f600\U0001d11e \n") for _ in range(12))
        ids = [encoding.encode_single_token(bytes([byte])) for byte in text.encode()]
        decoder, shown = sample.Decoder(), ""
        for id in ids:
            shown += decoder([id])
            assert text.startswith(shown)
        assert shown + decoder([], last=True) == text
        ids = [rng.randrange(V) for _ in range(30)]  # what a model says need not be UTF-8 at all
        decoder = sample.Decoder()
        shown = "".join(decoder([id]) for id in ids) + decoder([], last=True)
        assert shown == encoding.decode(ids)


def test_prompts_from_a_file_and_from_standard_input(run, tmp_path, monkeypatch):
    (tmp_path / "a b.txt").write_bytes("Ünited\r\nwe\r\n".encode())
    settings = ("--max_new_tokens=5", "--temperature=0", "--dtype=float32")
    from_file, _ = texts_of(
        run, *settings, f"--prompt=FILE:{tmp_path / 'a b.txt'}", monkeypatch=monkeypatch
    )
    from_input = call(run, *settings, "--prompt=-", stdin="Ünited\r\nwe\n".encode())
    expected = expected_text(run / "step_00060", "Ünited\r\nwe", 5, 1337, temperature=0) + "\n"
    assert from_file == expected
    assert from_input.stdout == expected.encode(), from_input.stderr


def test_a_text_ends_at_end_of_text_unless_told_to_go_on(run, tmp_path, monkeypatch):
    """A model that says it soon: the text stops before it; --stop=False goes on."""
    model = GPT.from_pretrained(run)
    with torch.no_grad():  # after 8 tokens <|endoftext|> is the likeliest
        direction = torch.tensor([1.0, -1.0]).repeat(32)
        model.transformer.wpe.weight[8:] = 30 * direction
        model.transformer.wte.weight[END] = direction
    model.save_pretrained(tmp_path / "m")
    arguments = [tmp_path / "m", "--temperature=0", "--prompt=The", "--max_new_tokens=20"]
    short, error = texts_of(*arguments, monkeypatch=monkeypatch)
    long, _ = texts_of(*arguments, "--stop=False", monkeypatch=monkeypatch)
    assert "<|endoftext|>" not in short and long.startswith(short[:-1] + "<|endoftext|>")
    assert re.search(r": \d tokens in", error)
    start, _ = texts_of(run, "--prompt=<|endoftext|>", "--temperature=0", monkeypatch=monkeypatch)
    assert start.startswith("<|endoftext|>")


def test_int8_says_so_and_gives_text(run, monkeypatch):
    out, error = texts_of(run, "--int8", "--max_new_tokens=20", monkeypatch=monkeypatch)
    assert out.startswith("Hello, I'm a language model,") and "weights in int8" in error


def test_int8_scores_hellaswag(run, tmp_path, monkeypatch, capsys):
    """The same examples, about the same losses, in another number of bits."""
    rng = random.Random(1)
    words = "the queen of a bridge and lamp you it river is".split()
    lines = [
        {"ctx": " ".join(rng.choices(words, k=9)), "activity_label": "A", "label": 1,
         "endings": [" ".join(rng.choices(words, k=4)) for _ in range(4)]}
        for _ in range(9)
    ]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    losses = []
    for extra in ([], ["--int8"]):
        out = tmp_path / "out.jsonl"
        arguments = ["-m", run, "--style=completion", *extra, f"--data={data}", f"--out={out}"]
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", *map(str, arguments)])
        assert hellaswag.main() == 0
        assert ("in int8" in capsys.readouterr().out) == bool(extra)
        losses.append([json.loads(line)["losses"] for line in out.read_text().splitlines()])
    a, b = torch.tensor(losses)
    assert 0 < (a - b).abs().max() < 0.3


def test_a_closed_pipe_is_no_traceback(run):
    """`sample.py ... | head -1`."""
    command = [sys.executable, str(ROOT / "sample.py"), str(run), "--stream", "--num=50"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read().decode()
        assert process.wait(60) == 141 and "Traceback" not in error and "Exception" not in error


# -------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize("arguments, words", [
    (["nothing"], ["'nothing'", "gpt2-medium"]),
    (["gpt3"], ["'gpt3'", "gpt2-xl"]),
    (["{tmp}"], ["{tmp}", "no config.json", "not a model directory"]),
    (["{run}", "{tmp}"], ["{tmp}", "not a model directory"]),
    (["{tmp}/text.txt"], ["text.txt"]),
    (["{run}", "--prompt="], ["prompt=''", "empty"]),
    (["{run}", "--prompt=FILE:{tmp}/none"], ["{tmp}/none", "No such file"]),
    (["{run}", "--prompt=FILE:{tmp}"], ["{tmp}", "directory"]),
    (["{run}", "--prompt=FILE:{tmp}/empty.txt"], ["empty.txt", "is empty"]),
    (["{run}", "--prompt=" + 65 * " word"], ["65 tokens", "only 64", "shorten"]),
    (["{run}", "--top_p=2"], ["top_p=2.0", "at most 1"]),
    (["{run}", "--top_p=0"], ["top_p=0.0", "above 0"]),
    (["{run}", "--top_p=nan"], ["top_p=nan"]),
    (["{run}", "--temperature=-1"], ["temperature=-1.0"]),
    (["{run}", "--temperature=nan"], ["temperature=nan"]),
    (["{run}", "--temperature=inf"], ["temperature=inf"]),
    (["{run}", "--top_k=-1"], ["top_k=-1"]),
    (["{run}", "--num=0"], ["num=0"]),
    (["{run}", "--max_new_tokens=0"], ["max_new_tokens=0"]),
    (["{run}", "--slide=65"], ["slide=65", "only 64"]),
    (["{run}", "--seed=-1"], ["seed=-1"]),
    (["{run}", "--topk=5"], ["--topk", "did you mean --top_k?"]),
    (["{run}", "--num=two"], ["num='two'", "whole number"]),
    (["{run}", "--int8=maybe"], ["int8='maybe'", "True or False"]),
    (["{run}", "--device=tpu"], ["device='tpu'"]),
    (["{run}", "--device=cuda:99"], ["cuda"]),
    (["{run}", "--dtype=int4"], ["dtype='int4'"]),
    (["{tmp}/few"], ["few", "100 tokens", "50,257"]),
    (["{tmp}/damaged"], ["step_00060", "damaged"]),
])  # fmt: skip
def test_wrong_input_is_one_line(run, tmp_path, monkeypatch, arguments, words):
    """Before anything is generated: the other models and the first text are not begun."""
    (tmp_path / "text.txt").write_text("a")
    (tmp_path / "empty.txt").write_text("\n")
    if "few" in arguments[0]:
        GPT(GPTConfig(vocab_size=100, n_layer=1, n_head=1, n_embd=8)).save_pretrained(
            tmp_path / "few"
        )
    if "damaged" in arguments[0]:
        (tmp_path / "damaged/step_00060").mkdir(parents=True)
    places = dict(tmp=tmp_path, run=run)
    monkeypatch.setattr(sys, "argv", ["sample.py", *(a.format(**places) for a in arguments)])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(UserError) as refusal:
            sample.main()
    assert out.getvalue() == ""
    message = str(refusal.value) + err.getvalue()
    assert "\n" not in str(refusal.value)
    for word in words:
        assert word.format(**places) in message


def test_wrong_input_ends_with_code_2(run, tmp_path):
    done = call(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.fullmatch(rb"error: models='log': .*python sample.py gpt2\n", done.stderr)
