"""Generation: the cache changes nothing, and the distributions are transformers'.

Oracles: transformers' `generate` and logits processors, and the plain loop over complete sequences.
"""

import pytest
import torch
from model_helpers import V, make_model, random_ids, record_cudnn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from support import tokenizer
from support.distributed import Runtime
from support.errors import UserError
from support.generation import KVCache, generate_texts, sample_ids, stream
from train_gpt2 import GPT, GPTConfig

END = tokenizer.END_OF_TEXT_ID


def generators(*seeds) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def plain_loop(model: GPT, ids, n: int, temperature: float, top_k: int | None, generator=None):
    """The definition of generate: one id at a time, from the last block_size ids."""
    for _ in range(n):
        with torch.no_grad():
            logits = model(ids[:, -model.config.block_size :])[0][:, -1]
        if temperature == 0:
            new = logits.max(dim=1).indices[:, None]
        else:
            p, order = F.softmax(logits / temperature, dim=1), None
            if top_k is not None:
                order = p.sort(dim=1, descending=True).indices[:, :top_k].sort(dim=1).values
                p = p.gather(1, order) / p.gather(1, order).sum(dim=1, keepdim=True)
            new = torch.multinomial(p, 1, generator=generator)
            new = new if order is None else order.gather(1, new)
        ids = torch.cat((ids, new), dim=1)
    return ids


@pytest.mark.parametrize("prompt", [10, 20])
@pytest.mark.parametrize("temperature, top_k", [(0, None), (1.0, None), (0.7, 20), (2.0, V + 5)])
def test_generate_is_the_plain_loop(prompt, temperature, top_k):
    """Greedy or sampled, within the window and past it: the ids of the definition."""
    model, ids = make_model(block_size=16), random_ids(2, prompt)
    pair = generators(7, 7)
    found = model.generate(ids, 8, temperature, top_k, pair[0])
    k = None if top_k is None else min(top_k, V)
    assert torch.equal(found, plain_loop(model, ids, 8, temperature, k, pair[1]))
    assert torch.equal(found[:, :prompt], ids)


def test_stream_yields_the_ids_of_generate_one_at_a_time():
    model, ids = make_model(), random_ids(2, 4)
    parts = [*stream(model, ids, 6, temperature=0.8, top_k=30, generator=generators(3)[0])]
    assert [part.shape for part in parts] == [(2, 1)] * 6
    expected = model.generate(ids, 6, 0.8, 30, generators(3)[0])
    assert torch.equal(torch.cat((ids, *parts), dim=1), expected)


def test_generator_decides_the_text():
    """The same seed gives the same text, another one another."""
    model, ids = make_model(), random_ids(1, 4)
    texts = [model.generate(ids, 10, generator=g).tolist() for g in generators(1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("vocab_size, rows, n", [(V, 128, 8), (300, 1024, 10)])
def test_samples_are_ids_of_the_vocabulary(vocab_size, rows, n):
    """Of 11,264 sampled ids none is a padding id, however likely their rows would make them."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=32, block_size=8))
    with torch.no_grad():
        model.transformer.wte.weight[vocab_size:].normal_(std=30)
    ids = model.generate(torch.zeros((rows, 1), dtype=torch.int64), n)[:, 1:]
    assert ids.numel() == rows * n and ids.min() >= 0 and ids.max() < vocab_size
    assert len(ids.unique()) > 100


@pytest.mark.parametrize("prompt", [1, 9, 16, 40])
@pytest.mark.parametrize("slide", [1, 4, 16])
def test_ids_with_the_cache_are_those_without(prompt, slide):
    """Within the window and beyond it: `slide` ids are dropped when it is full."""
    model, ids = make_model(block_size=16), random_ids(3, prompt)
    found = model.generate(ids, 45, temperature=0, slide=slide)
    start = max(0, prompt - 16)
    for position in range(prompt, prompt + 45):
        if position - start > 16:
            start += slide
        with torch.no_grad():
            likeliest = model(found[:, start:position])[0][:, -1].argmax(dim=1)
        assert torch.equal(found[:, position], likeliest), position


@pytest.mark.gpt2
def test_greedy_text_is_that_of_transformers(tmp_path):
    """The same weights, float32, 200 tokens after the first five of several prompts."""
    model = make_model(n_layer=3, n_embd=64, n_head=4, block_size=256)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = ("Hello, I'm a language model,", "é中\U0001f600!", "The answer is not known.")
    encode = tokenizer.get_encoding().encode_ordinary
    ids = torch.tensor([encode(prompt)[:5] for prompt in prompts])
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False,
        pad_token_id=END, eos_token_id=None,
    )  # fmt: skip
    assert expected.shape == (3, 205)
    assert torch.equal(model.generate(ids, 200, temperature=0), expected)


@pytest.mark.parametrize("settings", [{}, dict(top_k=40), dict(top_p=0.8), dict(temperature=0.7)])
def test_a_row_is_the_same_in_any_batch(settings):
    """Four rows with a generator each, and each of them alone: the same ids."""
    model, ids = make_model(vocab_size=2000), random_ids(4, 5, vocab_size=2000)
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
    """60,000 draws have the probabilities of transformers; none has an excluded id."""
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


@pytest.mark.gpt2
def test_a_row_that_stopped_has_only_the_stop_id():
    """Its ids are those it has without stopping, up to the first stop; other rows continue."""
    model, ids = make_model(), random_ids(4, 3)
    free = model.generate(ids, 20, temperature=0)
    stop = free[0, 3 + 6].item()
    found = model.generate(ids, 20, temperature=0, stop=stop)
    for row, (expected, text) in enumerate(zip(free[:, 3:].tolist(), found[:, 3:].tolist())):
        end = expected.index(stop) if stop in expected else 20
        assert text == expected[:end] + [stop] * (20 - end), row
    alone = model.generate(ids[:1], 20, temperature=0, stop=stop)
    assert alone.size(1) == 3 + free[0, 3:].tolist().index(stop) + 1


def test_only_the_last_position_gets_logits_and_the_cache_is_allocated_once(monkeypatch):
    model, shapes, memories = make_model(), [], []
    model.lm_head.register_forward_hook(lambda _, x, y: shapes.append(tuple(x[0].shape)))
    add = KVCache.add

    def spy(cache, k, v):
        result = add(cache, k, v)
        memories.append((id(cache), cache.memory.data_ptr(), cache.memory.size(3)))
        return result

    monkeypatch.setattr(KVCache, "add", spy)
    model.generate(random_ids(3, 7), 10)
    assert shapes == [(3, 32)] * 10
    assert len(memories) == 20 and len(set(memories)) == 2  # two layers
    assert {length for _, _, length in memories} == {17}


def test_a_cache_does_not_change_the_hidden_states():
    """Hidden states with and without a cache are equal to the last bit."""
    model, ids = make_model(), random_ids(2, 8)
    with torch.no_grad():
        plain = model.hidden(ids)
        caches = [KVCache(8) for _ in range(2)]
        assert torch.equal(model.hidden(ids, caches=caches), plain)


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_attention_is_disabled_in_each_call_and_only_there(before, monkeypatch):
    """For the prompt, for cached tokens and past the window; not between the tokens."""
    cudnn, found = torch.backends.cuda, record_cudnn(monkeypatch)
    model, was = make_model(block_size=8), cudnn.cudnn_sdp_enabled()
    cudnn.enable_cudnn_sdp(before)
    try:
        for _ in stream(model, random_ids(2, 6), 5):
            assert cudnn.cudnn_sdp_enabled() == before
        assert found == [False] * 5 * 2  # tokens, layers
        monkeypatch.setattr(model, "hidden", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.generate(random_ids(1, 3), 2)
        assert cudnn.cudnn_sdp_enabled() == before
    finally:
        cudnn.enable_cudnn_sdp(was)


@pytest.mark.gpt2
def test_ten_thousand_ids_of_a_padded_model_are_the_tokenizers(tmp_path):
    """A model of another program with 50,304 rows, whose padding rows would be the likeliest."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=50304, n_positions=8, n_embd=32, n_layer=1, n_head=1)
    ).eval()
    with torch.no_grad():
        theirs.transformer.wte.weight[V:].normal_(std=30)
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert model.config.vocab_size == V
    ids = model.generate(torch.full((200, 1), 262), 50, top_k=50, slide=8)[:, 1:]
    assert ids.numel() == 10_000 and ids.max() < V
    tokenizer.get_encoding().decode_batch(ids.tolist())
    x = random_ids(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], theirs(x).logits[..., :V], atol=1e-4, rtol=0)


def test_logits_that_are_not_finite_are_an_error_and_end_no_run():
    """In a run the next steps decide; every rank must come to the end of the samples."""
    model = make_model()
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        model.generate(random_ids(1, 3), 2)
    alone = Runtime(0, 1, torch.device("cpu"), torch.float32)
    texts = generate_texts(model, "Hello", 2, 3, alone, check_signals=lambda: None)
    assert len(texts) == 2 and all(text.startswith("no sample: the logits") for text in texts)
