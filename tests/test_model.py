"""The model is GPT-2, its loss and gradients are the textbook's, and transformers reads it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

import train_gpt2
from support import tokenizer
from support.errors import UserError
from train_gpt2 import GPT, IGNORE, GPTConfig, TrainingModel

V = tokenizer.VOCAB_SIZE
SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=32)


def make(seed: int = 0, **shape) -> GPT:
    """A small GPT whose norms and biases are random too, so that none of them is without effect."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPE, **shape}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def play(B: int, T: int):
    """The first B rows of T tokens of input.txt: (ids, their next ids), int64 (B, T)."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[: 8 * B * T + 100]
    ids = torch.tensor(tokenizer.get_encoding().encode_ordinary(text)[: B * T + 1])
    return ids[:-1].view(B, T), ids[1:].view(B, T)


def random_ids(*shape, seed: int = 0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def relative_error(a, b) -> float:
    """|a - b| / |b|, of the whole tensors."""
    return ((a - b).norm() / b.norm()).item()


# -------------------------------------------------------------------------------------------------
# Size and initialization


def of_recipe(name: str) -> GPTConfig:
    """The model of a recipe, by its settings."""
    c = train_gpt2.Config(**train_gpt2.RECIPES[name])
    return GPTConfig(block_size=c.T, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)


@pytest.mark.parametrize(
    "config, parameters",
    [
        (GPTConfig(), 124_439_808),
        (of_recipe("gpt2"), 124_439_808),
        (of_recipe("gpt2-medium"), 354_823_168),
        (of_recipe("gpt2-large"), 774_030_080),
        (of_recipe("gpt2-xl"), 1_557_611_200),
    ],
)
def test_parameters_are_as_many_as_published(config, parameters):
    """The four sizes of GPT-2, spare embedding rows not counted."""
    with torch.device("meta"):
        assert GPT(config).num_parameters() == parameters


@pytest.mark.parametrize("recipe", ["tiny", "gpt2"])
def test_loss_at_initialization(recipe):
    """Before training all ids are about equally likely: the loss is ln(50257), 10.82, and a little.

    The little is half the variance of the logits, C * 0.02**2 / 2: 0.15 for 124M, where it was
    found between 10.88 and 10.99 over three seeds. That is for targets that have nothing to do with
    the inputs. A text that repeats itself starts lower, since the tied head likes to say again what
    it read; and few tokens that come often move the loss up or down with the seed.
    """
    config = of_recipe(recipe)
    torch.manual_seed(1337)
    model = GPT(config)
    ids = random_ids(1, 129)
    with torch.no_grad():
        loss_random = model(ids[:, :-1], ids[:, 1:])[1].item()
        loss_play = model(*play(1, 128))[1].item()
    assert loss_random == pytest.approx(math.log(V) + config.n_embd * 0.02**2 / 2, abs=0.1)
    assert loss_random == pytest.approx(10.82, abs=0.2)
    assert loss_play == pytest.approx(10.82, abs=0.3)


def test_initialization():
    """N(0, 0.02), in c_proj 0.02 / sqrt(2 L); biases 0 and norms 1; the head is the embedding."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=64))
    for name, parameter in model.named_parameters():
        if ".ln_" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            std = 0.02 / math.sqrt(6) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_seed_decides_the_initialization():
    """The same seed gives the same weights, another one others."""
    weights = [make(seed).transformer.wte.weight for seed in (5, 5, 6)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


# -------------------------------------------------------------------------------------------------
# The function: transformers' GPT-2

SHAPES = [
    dict(n_layer=1, n_head=1, n_embd=32, n_positions=16),
    dict(n_layer=3, n_head=3, n_embd=60, n_positions=32),
    dict(n_layer=2, n_head=5, n_embd=35, n_positions=17),
    dict(n_layer=4, n_head=2, n_embd=64, n_positions=64),
]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda s: "-".join(map(str, s.values())))
def pair(request, tmp_path_factory):
    """(transformers' random GPT-2, the directory it wrote, our GPT read from there)."""
    torch.manual_seed(1)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=V, **request.param)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    directory = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(directory)
    return theirs, directory, GPT.from_pretrained(str(directory))


def test_logits_are_those_of_transformers(pair):
    """Weights of a random GPT2LMHeadModel: the same logits within 1e-4, at each context length."""
    theirs, _, ours = pair
    for T in (1, 7, theirs.config.n_positions):
        ids = random_ids(2, T, seed=T)
        with torch.no_grad():
            expected, found = theirs(ids).logits, ours(ids)[0]
        assert expected.std() > 0.1  # or else a tolerance of 1e-4 means little
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_way_back_to_transformers_is_exact(pair, tmp_path):
    """What save_pretrained writes, AutoModelForCausalLM reads: every weight bit for bit."""
    theirs, _, ours = pair
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, GPT2LMHeadModel)
    expected, found = theirs.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        assert getattr(again.config, name) == getattr(theirs.config, name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a model, the directory it was saved to): look, and damage only a copy."""
    model, directory = make(), tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    return model, directory


def test_saved_directory(saved, tmp_path):
    """transformers reads the settings and says our greedy text; saved again, no byte differs."""
    model, directory = saved
    config = AutoConfig.from_pretrained(directory)
    assert config.model_type == "gpt2" and config.architectures == ["GPT2LMHeadModel"]
    assert config.dtype == torch.float32 and config.activation_function == "gelu_new"
    assert GenerationConfig.from_pretrained(directory).eos_token_id == 50256
    shapes = {name: t.shape for name, t in load_file(directory / "model.safetensors").items()}
    assert shapes["transformer.wte.weight"] == (V, 32)
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == (32, 128)  # Conv1D: inputs first

    ids = random_ids(1, 5)
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert model.generate(ids, 8, temperature=0).tolist() == expected.tolist()

    model.save_pretrained(tmp_path)
    names = sorted(path.name for path in directory.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (directory / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_own_directory_is_read_back_exactly(saved):
    """save_pretrained and from_pretrained: the same model, but for the spare rows, then zero."""
    model, directory = saved
    again = GPT.from_pretrained(str(directory))
    assert again.config == model.config
    assert again.lm_head.weight is again.transformer.wte.weight
    found = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        expected = parameter.detach().clone()
        if name == "transformer.wte.weight":
            expected[V:] = 0
        assert torch.equal(found[name], expected), name


def test_positions_can_be_cut(saved):
    """block_size keeps the first positions, and the function on so many tokens."""
    model, directory = saved
    cut = GPT.from_pretrained(str(directory), block_size=12)
    assert cut.config.block_size == len(cut.transformer.wpe.weight) == 12
    ids = random_ids(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(cut(ids)[0], model(ids)[0], atol=1e-6, rtol=0)


# -------------------------------------------------------------------------------------------------
# What from_pretrained reads and refuses


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of a saved model, without the tokenizer."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(saved[1] / name, tmp_path)
    return tmp_path


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, edit) -> None:
    """`edit` changes the dictionary of tensors in its place."""
    tensors = {name: t.clone() for name, t in load_file(directory / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_old_file(directory: Path) -> Path:
    """Where the weights are looked for when there is no model.safetensors."""
    (directory / "model.safetensors").unlink()
    return directory / "pytorch_model.bin"


def put_nan(tensors: dict) -> None:
    tensors["transformer.h.1.mlp.c_fc.bias"][3] = math.nan


def untie(tensors: dict) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1


def without(name: str):
    return lambda directory: edit_weights(directory, lambda tensors: tensors.pop(name))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json"),
        (lambda d: (d / "config.json").write_text("{}"), "model_type"),
        (lambda d: (d / "config.json").write_text('{"model_type": "gpt2"}'), "vocab_size"),
        (lambda d: edit_config(d, model_type="llama"), "model_type in config.json is 'llama'"),
        (lambda d: edit_config(d, activation_function="relu"), "activation_function is 'relu'"),
        (lambda d: edit_config(d, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse"),
        (lambda d: edit_config(d, n_inner=64), "n_inner is 64"),
        (lambda d: edit_config(d, n_layer=3), "transformer.h.2"),
        (lambda d: edit_config(d, n_embd=48), "not this GPT-2"),
        (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (truncate, "model.safetensors: .*damaged"),
        (lambda d: edit_config(d, n_head=3), "n_head"),
        (lambda d: with_old_file(d).write_bytes(b""), "pytorch_model.bin"),
        (lambda d: torch.save({"model": {}, "step": 1}, with_old_file(d)), "pytorch_model.bin"),
        (lambda d: edit_weights(d, put_nan), "transformer.h.1.mlp.c_fc.bias holds NaN"),
        (
            lambda d: edit_config(d, tie_word_embeddings=False),
            "output head, lm_head.weight, is None",
        ),
        (without("transformer.h.1.ln_2.weight"), "transformer.h.1.ln_2.weight"),
        (without("transformer.wte.weight"), "transformer.wte.weight"),
        (without("transformer.wpe.weight"), "transformer.wpe.weight"),
    ],
)
def test_other_directories_are_refused(copied, damage, words):
    """What is no whole GPT-2 is refused in words that name the directory and what is wrong."""
    GPT.from_pretrained(str(copied))
    damage(copied)
    with pytest.raises(UserError, match=words) as refusal:
        GPT.from_pretrained(str(copied))
    assert str(copied) in str(refusal.value)


def test_unknown_name_is_refused():
    """A name that is no directory and cannot be on the Hub: the message lists what there is."""
    with pytest.raises(UserError, match="'gpt2-huge'.*gpt2-medium"):
        GPT.from_pretrained("gpt2-huge")


def test_more_positions_than_there_are_is_refused(saved):
    """The setting T, its value and the length that the model has are named."""
    with pytest.raises(UserError, match="T=33.* 32 "):
        GPT.from_pretrained(str(saved[1]), block_size=33)


def test_old_file_of_tensors_is_read(saved, copied):
    """pytorch_model.bin with OpenAI's first names, mask buffers and a repeated head."""
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(2):
        old[f"h.{layer}.attn.bias"] = torch.ones(32, 32).tril().view(1, 1, 32, 32)
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    old["lm_head.weight"] = old["wte.weight"]
    torch.save(old, copied / "pytorch_model.bin")
    found, ids = GPT.from_pretrained(str(copied)), random_ids(1, 32)
    with torch.no_grad():
        assert torch.equal(found(ids)[0], saved[0](ids)[0])


class Bait:
    """Makes a directory when it is unpickled by a loader that runs code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_pickled_code_is_refused_and_not_run(copied):
    """A pytorch_model.bin with more than tensors in it ends in a UserError and in nothing else."""
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    file, trap = copied / "pytorch_model.bin", copied / "trap"
    torch.save({**tensors, "more": Bait(trap)}, file)
    with pytest.raises(UserError, match="pytorch_model.bin: refused"):
        GPT.from_pretrained(str(copied))
    assert not trap.exists()
    torch.load(file, weights_only=False)
    assert trap.exists()  # the bait was one


def test_half_precision_file_becomes_float32(saved, copied):
    """The weights of a bfloat16 file, in float32."""
    path = copied / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path)
    found = dict(GPT.from_pretrained(str(copied)).named_parameters())
    for name, parameter in saved[0].named_parameters():
        rows = V if name == "transformer.wte.weight" else None
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name][:rows], parameter[:rows].bfloat16().float()), name


# -------------------------------------------------------------------------------------------------
# Loss and gradients


def loss_and_gradients(model: GPT, loss):
    """(loss, {parameter name: gradient}), and no gradient left in the model."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def with_ignored(y, fraction: float):
    """Targets of which about so many, and all of the first row, count for nothing."""
    y = y.clone()
    y[torch.rand(y.shape, generator=torch.Generator().manual_seed(3)) < fraction] = IGNORE
    if fraction:
        y[0] = IGNORE
    return y


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("B, T, chunk", [(4, 16, 1024), (4, 16, 16), (4, 16, 25), (1, 13, 5)])
def test_training_loss_is_the_textbook_loss(monkeypatch, B, T, chunk, ignored):
    """TrainingModel: loss and all gradients of GPT.forward, in chunks of whatever size."""
    monkeypatch.setitem(train_gpt2.CHUNK, "cpu", chunk)
    model = make()
    x, y = random_ids(B, T), with_ignored(random_ids(B, T, seed=1), ignored if B > 1 else 0.0)
    count = (y != IGNORE).sum().item()
    expected, gradients = loss_and_gradients(model, model(x, y)[1])
    training = TrainingModel(model, compiled=False)
    found, found_gradients = loss_and_gradients(model, training(x, y) / count)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(found_gradients[name], gradient) < 1e-5, name
    value = training.evaluate(x, y)
    assert value.item() / count == pytest.approx(expected, rel=1e-5) and not value.requires_grad


def test_textbook_loss_is_the_mean_over_targets_that_count():
    """GPT.forward: minus the log probability of each target, averaged, ignored ones left out."""
    model = make()
    x, y = random_ids(3, 16), with_ignored(random_ids(3, 16, seed=1), 0.3)
    with torch.no_grad():
        logits, loss = model(x, y)
    log_probabilities = logits.double() - logits.double().exp().sum(-1, keepdim=True).log()
    terms = [
        -log_probabilities[b, t, y[b, t]] for b in range(3) for t in range(16) if y[b, t] != IGNORE
    ]
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)


def test_a_batch_of_ignored_targets_is_zero():
    """Rows that only fill up a micro-batch: loss 0 and gradients 0, and no NaN."""
    model = make()
    training = TrainingModel(model, compiled=False)
    x, y = random_ids(2, 16), torch.full((2, 16), IGNORE)
    loss, gradients = loss_and_gradients(model, training(x, y))
    assert loss == 0 and training.evaluate(x, y) == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spare_ids_do_not_exist(dtype):
    """Large spare rows change no logit, no loss and no gradient, and get none; never sampled."""
    model, x, y = make(), random_ids(2, 32), random_ids(2, 32, seed=1)
    training = TrainingModel(model, compiled=False)
    results = []
    for size in (0.0, 30.0):
        with torch.no_grad():
            spare = model.transformer.wte.weight[V:]
            spare.copy_(size * torch.randn(spare.shape, generator=torch.Generator().manual_seed(4)))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = training(x, y)
            others = (model(x, y)[1].item(), training.evaluate(x, y).item())
            greedy = model.generate(x, 3, temperature=0)
            with torch.no_grad():
                logits = model(x)[0]
        loss, gradients = loss_and_gradients(model, loss)
        assert logits.shape[-1] == V and greedy.max() < V
        assert (gradients["transformer.wte.weight"][V:] == 0).all()
        results.append((loss, others, logits, greedy, gradients))
    with torch.no_grad():
        all_logits = model.lm_head(model.hidden(x))
    assert (all_logits.argmax(-1) >= V).all()  # they would have won every time
    (loss, others, logits, greedy, gradients), (loss_2, others_2, logits_2, greedy_2, g_2) = results
    assert (loss, *others) == pytest.approx((loss_2, *others_2), rel=1e-6)
    assert torch.equal(logits, logits_2) and torch.equal(greedy, greedy_2)
    for name, gradient in gradients.items():
        torch.testing.assert_close(g_2[name], gradient, rtol=1e-5, atol=1e-5)


def test_bfloat16_loss_is_close():
    """Autocast to bfloat16 moves the mean loss by less than 0.02, and leaves the weights alone."""
    model, (x, y) = make(), play(4, 32)
    training = TrainingModel(model, compiled=False)
    exact = training(x, y).item() / y.numel()
    with torch.autocast("cpu", torch.bfloat16):
        loss = training(x, y) / y.numel()
        value = training.evaluate(x, y).item() / y.numel()
    assert loss.dtype == torch.float32
    assert loss.item() != exact  # it was bfloat16
    assert loss.item() == pytest.approx(exact, abs=0.02)
    assert value == pytest.approx(exact, abs=0.02)
    _, gradients = loss_and_gradients(model, loss)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


def test_no_position_sees_what_comes_after_it():
    """The output at t has a gradient at every input up to t and exactly none after it."""
    model, T = make(), 12
    inputs = []

    def keep(module, arguments, output):
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    with model.transformer.wte.register_forward_hook(keep):
        hidden = model.hidden(random_ids(1, T))
    probe = torch.randn(hidden.size(-1), generator=torch.Generator().manual_seed(2))
    for t in range(T):
        (gradient,) = torch.autograd.grad((hidden[0, t] * probe).sum(), inputs, retain_graph=True)
        reached = gradient[0].abs().amax(dim=1)
        assert (reached[: t + 1] > 0).all() and (reached[t + 1 :] == 0).all()


# -------------------------------------------------------------------------------------------------
# Attention in blocks of queries


def plain_attention(q, k, v):
    """The textbook's, in the dtype of q."""
    s = q @ k.transpose(2, 3) / math.sqrt(q.size(3))
    future = torch.ones(s.shape[2:], dtype=torch.bool).triu(1)
    return s.masked_fill(future, -math.inf).softmax(dim=3) @ v


def with_gradient(attention, qkv, dy):
    """The result of an attention and its gradient at the three inputs, in float32."""
    inputs = [x.detach().clone().requires_grad_() for x in qkv]
    y = attention(*inputs)
    y.backward(dy.to(y.dtype))
    return [y.detach().float(), *(x.grad.float() for x in inputs)]


@pytest.mark.parametrize("T", [3, 255, 256, 257, 512, 700])
def test_attention_in_blocks_is_attention(T):
    """Result and gradients are those of the textbook; in bfloat16 as near as the flash kernel's."""
    torch.manual_seed(T)
    *qkv, dy = torch.randn(4, 2, 3, T, 16)
    expected = with_gradient(plain_attention, qkv, dy)
    found = with_gradient(train_gpt2.BlockwiseAttention.apply, qkv, dy)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    low = [x.bfloat16() for x in qkv]
    flash = with_gradient(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), low, dy)
    found = with_gradient(train_gpt2.BlockwiseAttention.apply, low, dy)
    for a, b, exact in zip(found, flash, expected):
        assert (a - exact).norm() <= 1.5 * (b - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize(
    "T, dtype, slow, used",
    [
        (300, torch.bfloat16, True, True),
        (256, torch.bfloat16, True, False),
        (300, torch.float32, True, False),
        (300, torch.bfloat16, False, False),
    ],
)
def test_attention_in_blocks_is_for_what_it_speeds_up(monkeypatch, T, dtype, slow, used):
    """Long rows in bfloat16 on a CPU without AMX, compiled; eager code never has it."""
    monkeypatch.setattr(train_gpt2, "FLASH_IS_SLOW", slow)
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    qkv = [torch.randn(1, 1, T, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(train_gpt2.causal_attention, backend=backend, fullgraph=True)
    tolerance = dict(atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(compiled(*qkv), train_gpt2.causal_attention(*qkv), **tolerance)
    assert any("scaled_dot_product" in target for target in traced) is not used
    monkeypatch.setattr(train_gpt2, "BlockwiseAttention", None)
    train_gpt2.causal_attention(*qkv)


# -------------------------------------------------------------------------------------------------
# Text


def plain_loop(model: GPT, ids, n: int, temperature: float, top_k: int | None, generator=None):
    """The definition of generate: whole sequences, one id at a time, the last block_size seen."""
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
    model, ids = make(block_size=16), random_ids(2, prompt)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    found = model.generate(ids, 8, temperature, top_k, generators[0])
    k = None if top_k is None else min(top_k, V)
    assert torch.equal(found, plain_loop(model, ids, 8, temperature, k, generators[1]))
    assert torch.equal(found[:, :prompt], ids)


def test_generator_decides_the_text():
    """The same seed gives the same text, another one another."""
    model, ids = make(), random_ids(1, 4)
    texts = [
        model.generate(ids, 10, generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("vocab_size, rows, n", [(V, 128, 8), (300, 1024, 10)])
def test_samples_are_ids_of_the_vocabulary(vocab_size, rows, n):
    """Of 11,264 sampled ids none is a spare one, however likely their rows would make them."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=32, block_size=8))
    with torch.no_grad():
        model.transformer.wte.weight[vocab_size:].normal_(std=30)
    ids = model.generate(torch.zeros((rows, 1), dtype=torch.int64), n)[:, 1:]
    assert ids.numel() == rows * n and ids.min() >= 0 and ids.max() < vocab_size
    assert len(ids.unique()) > 100


# -------------------------------------------------------------------------------------------------
# Optimizer, schedule, one step


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    """Weight decay on the weights of linear layers and embeddings, the tied one once."""
    model = make()
    config = train_gpt2.Config(weight_decay=0.25, max_lr=1e-3, beta1=0.8, beta2=0.9, eps=1e-7)
    groups = train_gpt2.configure_optimizer(model, config, "cpu").param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], group["weight_decay"]) for group in groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    assert dict(found) == {name: 0.25 if i in matrices else 0.0 for i, name in names.items()}
    for group in groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.9), 1e-7)


@pytest.mark.parametrize(
    "step, lr",
    [
        (0, 6e-5),  # a tenth of the warm-up, and not zero
        (4, 3e-4),
        (9, 6e-4),  # the last step of the warm-up
        (10, 6e-4),  # the first of the cosine
        (35, 6e-5 + 5.4e-4 * (1 + math.sqrt(0.5)) / 2),
        (60, 3.3e-4),  # half way
        (85, 6e-5 + 5.4e-4 * (1 - math.sqrt(0.5)) / 2),
        (109, 6e-5 + 5.4e-4 * (1 - math.cos(math.pi / 100)) / 2),
        (110, 6e-5),
        (100_000, 6e-5),
    ],
)
def test_learning_rate(step, lr):
    """Ten steps of warm-up to 6e-4, then a cosine that reaches 6e-5 at step 110."""
    config = train_gpt2.Config(max_lr=6e-4, min_lr=6e-5, warmup_steps=10, max_steps=110)
    assert train_gpt2.get_lr(step, config) == pytest.approx(lr, rel=1e-9)


@pytest.mark.parametrize("warmup_steps, max_steps", [(0, 1), (0, 10), (10, 10), (5, 6)])
def test_learning_rate_of_odd_schedules(warmup_steps, max_steps):
    """No warm-up, nothing but warm-up, one step: every step has a rate of at most max_lr."""
    config = train_gpt2.Config(warmup_steps=warmup_steps, max_steps=max_steps)
    rates = [train_gpt2.get_lr(step, config) for step in range(max_steps + 1)]
    assert all(0 < rate <= config.max_lr for rate in rates) and max(rates) == config.max_lr
    assert rates[-1] == config.min_lr


def test_one_batch_is_learned_by_heart(small):
    """4 x 32 tokens of input.txt: a loss under 0.05 within 100 steps."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32))
    training, (x, y) = TrainingModel(model, compiled=False), play(4, 32)
    optimizer = train_gpt2.configure_optimizer(model, small(max_lr=2e-2), "cpu")
    best = math.inf
    for _ in range(100):
        loss = training(x, y) / y.numel()
        best = min(best, loss.item())
        if best < 0.05:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert best < 0.05


def test_golden_step(small):
    """One step of a fixed run, from the text file to the updated weights.

    Any change of initialization, order of the data, model, loss, clipping, schedule or optimizer
    moves these numbers. Whoever means to change one of those measures them anew, and says so;
    a change that is to make the program only faster or clearer must leave them alone.
    """
    tiny = dict(n_layer=4, n_head=4, n_embd=128, T=128)
    config = small(**tiny, B=1, total_batch_size=256, device="cpu")
    run, _ = train_gpt2.open_run(config, train_gpt2.set_up_processes(config))
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    results = train_gpt2.train_step(run, train_gpt2.get_lr(run.step, run.config), torch.zeros(3))
    pairs = list(zip(run.model.parameters(), before))
    x, y = run.loader.batch(0, 2)
    with torch.no_grad():
        found = {
            "loss": results[0].item(),
            "norm of the gradient": results[1].item(),
            "sum of |w|": sum(new.abs().double().sum().item() for new, _ in pairs),
            "sum of |change|": sum((new - old).abs().double().sum().item() for new, old in pairs),
            "loss on the same rows after it": run.model(x.flatten(0, 1), y.flatten(0, 1))[1].item(),
        }
    assert found == pytest.approx(GOLDEN, rel=1e-4)


GOLDEN = {
    "loss": 10.805065,
    "norm of the gradient": 4.7448421,
    "sum of |w|": 113248.54,
    "sum of |change|": 3520.9738,
    "loss on the same rows after it": 10.310836,
}


# -------------------------------------------------------------------------------------------------
# Speed as a share of what the device could do


@pytest.mark.parametrize("recipe, T", [("gpt2", 1024), ("gpt2", 256), ("gpt2-xl", 1024)])
def test_flops_per_token(recipe, T):
    """6 per weight of a matrix product, and 6 L C T for causal attention: 798.0 M for 124M."""
    config = of_recipe(recipe)
    with torch.device("meta"):
        model = GPT(config)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    attention = 6 * config.n_layer * config.n_embd * T
    assert model.flops_per_token(T) == 6 * weights + attention
    if (recipe, T) == ("gpt2", 1024):
        assert model.flops_per_token(T) == pytest.approx(798.0e6, abs=0.1e6)


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A6000", 154.8),
        # not in the table, although a name of the table is a part of theirs
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peak_by_name(name, tflops):
    """The datasheet's dense bfloat16 peak of the GPUs in the table; None for others."""
    peak = train_gpt2.peak_flops(name, torch.bfloat16)
    assert peak == (None if tflops is None else pytest.approx(1e12 * tflops))
    assert train_gpt2.peak_flops(name, torch.float16) == peak
    assert train_gpt2.peak_flops(name, torch.float32) is None
