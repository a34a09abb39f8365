"""An edited model: its function is recognized, and its checkpoints are not taken for GPT-2."""

import functools
import json
from pathlib import Path

import pytest
import torch
from conftest import assert_one_line, losses, outcome, train_until
from model_helpers import make_model
from torch.nn import functional as F

import train_gpt2
from support import model_function
from support.errors import UserError
from support.huggingface import MODIFIED, check_code
from train_gpt2 import GPT, MLP, GPTConfig

# -------------------------------------------------------------------------------------------------
# Edits of the model, as a user would make them


def cap_logits(monkeypatch):
    original = GPT.logits
    monkeypatch.setattr(GPT, "logits", lambda self, x: 30 * torch.tanh(original(self, x) / 30))


def use_rms_norm(monkeypatch):
    monkeypatch.setattr(torch.nn, "LayerNorm", torch.nn.RMSNorm)


def change_eps(monkeypatch):
    layer_norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    monkeypatch.setattr(torch.nn, "LayerNorm", layer_norm)


def use_squared_relu(monkeypatch):
    monkeypatch.setattr(MLP, "forward", lambda self, x: self.c_proj(F.relu(self.c_fc(x)).square()))


def normalize_queries_and_keys(monkeypatch):
    original = train_gpt2.causal_attention

    def attention(q, k, v):
        size = q.shape[-1:]
        return original(F.rms_norm(q, size), F.rms_norm(k, size), v)

    monkeypatch.setattr(train_gpt2, "causal_attention", attention)


def include_padding_ids(monkeypatch):
    monkeypatch.setattr(GPT, "logits", lambda self, x: self.lm_head(x))


def add_unused_parameter(monkeypatch):
    original = GPT.__init__

    def init(self, config):
        original(self, config)
        self.scale = torch.nn.Parameter(torch.ones(()))

    monkeypatch.setattr(GPT, "__init__", init)


OTHER_FUNCTIONS = [
    cap_logits, use_rms_norm, change_eps, use_squared_relu, normalize_queries_and_keys,
    include_padding_ids,
]  # fmt: skip


def smooth_labels(monkeypatch):
    def token_losses(self, logits, targets):
        return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=0.1)

    monkeypatch.setattr(GPT, "token_losses", token_losses)


def make(n_head: int = 2) -> GPT:
    return GPT(GPTConfig(n_layer=1, n_head=n_head, n_embd=4 * n_head, block_size=8, vocab_size=50))


# -------------------------------------------------------------------------------------------------
# Recognizing a function


@pytest.mark.gpt2
@pytest.mark.parametrize("n_head", [1, 4, 25])
@pytest.mark.parametrize("tied", [True, False])
def test_our_model_computes_gpt2(n_head, tied):
    shape = dict(n_layer=1, n_head=n_head, n_embd=n_head, block_size=8, tied=tied)
    assert model_function.identify(GPT(GPTConfig(**shape))).is_gpt2


@pytest.mark.gpt2
def test_the_number_of_gpt2_is_the_same_on_every_machine():
    """If it differs elsewhere, checkpoints could not be moved: the tolerance would be too small."""
    assert model_function.identify(make(4)).may_equal(5.1357883885502815)


@pytest.mark.gpt2
@pytest.mark.parametrize("edit", OTHER_FUNCTIONS, ids=lambda edit: edit.__name__)
def test_another_function_is_recognized(edit, monkeypatch):
    stock = model_function.identify(make())
    edit(monkeypatch)
    edited = model_function.identify(make())
    assert not edited.is_gpt2 and not edited.may_equal(stock.number)


def test_an_additional_parameter_is_not_gpt2(monkeypatch):
    add_unused_parameter(monkeypatch)
    assert not model_function.identify(make()).is_gpt2


@pytest.mark.gpt2
def test_another_loss_of_the_same_logits_is_recognized(monkeypatch):
    """`transformers` computes the same logits, but a run may not change its loss."""
    stock = model_function.identify(make())
    smooth_labels(monkeypatch)
    edited = model_function.identify(make())
    assert edited.is_gpt2 and not edited.may_equal(stock.number)


def test_code_that_cannot_compute_a_tiny_model_is_not_gpt2_and_not_compared(monkeypatch, tmp_path):
    def logits(self, x):
        raise RuntimeError("this kernel needs a GPU")

    model = make()
    monkeypatch.setattr(GPT, "logits", logits)
    function = model_function.identify(model)
    assert function == (None, False) and function.may_equal(1.0)
    check_code(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["function"] is None
    GPT.from_pretrained(tmp_path)


def test_neither_weights_nor_random_numbers_change():
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    model_function.identify(model)
    assert torch.get_rng_state().equal(state)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


# -------------------------------------------------------------------------------------------------
# Checkpoints of an edited model


@pytest.fixture
def stock_directory(tmp_path):
    make().save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.mark.parametrize("edit", OTHER_FUNCTIONS, ids=lambda edit: edit.__name__)
def test_transformers_refuses_an_edited_model_and_we_load_it(edit, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    edit(monkeypatch)
    make().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == MODIFIED
    with pytest.raises(ValueError, match=MODIFIED):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    GPT.from_pretrained(tmp_path)


def test_stock_code_refuses_an_edited_model(tmp_path, monkeypatch):
    with monkeypatch.context() as edited:
        cap_logits(edited)
        make().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="another function"):
        GPT.from_pretrained(tmp_path)


def test_edited_code_refuses_a_stock_model(stock_directory, monkeypatch):
    cap_logits(monkeypatch)
    with pytest.raises(UserError, match="another function"):
        GPT.from_pretrained(stock_directory)
    GPT.from_pretrained(stock_directory, same_function=False)


@pytest.mark.gpt2
def test_edited_code_refuses_a_model_from_elsewhere(stock_directory, monkeypatch):
    """A GPT-2 of `transformers` has no number in its config.json."""
    path = stock_directory / "config.json"
    config = json.loads(path.read_text())
    del config["function"], config["gpt_config"]
    path.write_text(json.dumps(config))
    GPT.from_pretrained(stock_directory)
    cap_logits(monkeypatch)
    with pytest.raises(UserError, match="another function"):
        GPT.from_pretrained(stock_directory)


def test_a_damaged_number_is_refused(stock_directory):
    path = stock_directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"function": "5.1"}))
    with pytest.raises(UserError, match="function"):
        GPT.from_pretrained(stock_directory)


# -------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("edit", [cap_logits, smooth_labels], ids=lambda edit: edit.__name__)
def test_a_run_does_not_continue_under_another_function(edit, small, monkeypatch, capsys):
    config = small(checkpoint_every=2)
    train_until(config, 3, monkeypatch)
    before = losses(config)
    edit(monkeypatch)
    code, _, errors = outcome(config, capsys)
    assert code == 2 and losses(config) == before
    assert_one_line(errors, ("another function", "step_00002", "--init_from="))


def test_an_edited_model_trains_resumes_and_says_what_it_is(small, tmp_path, monkeypatch, capsys):
    cap_logits(monkeypatch)
    config = small(checkpoint_every=2)
    train_until(config, 3, monkeypatch)
    code, output, _ = outcome(config, capsys)
    assert code == 0 and "continuing from" in output
    notice = f"of model_type {MODIFIED!r}, for this code only"
    assert f"each checkpoint will be {notice}" in output
    assert f"step_00004 is {notice}" in output.splitlines()[-1]
    complete = small(log_dir=str(tmp_path / "complete"))
    assert train_gpt2.train(complete) == 0
    assert losses(complete) == losses(config)


def test_an_edited_model_starts_from_the_weights_of_another(small, monkeypatch, capsys, tmp_path):
    first = small()
    assert train_gpt2.train(first) == 0
    cap_logits(monkeypatch)
    source = str(Path(first.log_dir) / "step_00004")
    code, output, errors = outcome(small(log_dir=str(tmp_path / "b"), init_from=source), capsys)
    assert code == 0 and MODIFIED in output, errors


# -------------------------------------------------------------------------------------------------
# A model that could not be loaded again is reported before the first step


def forget_to_tie(monkeypatch):
    """The head has weights of its own, but the configuration says that it is tied."""
    original = GPT.__init__

    def init(self, config):
        original(self, config)
        self.lm_head = torch.nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    monkeypatch.setattr(GPT, "__init__", init)


def rename_embedding(monkeypatch):
    """The saved embedding has a name that loading does not know."""
    original = GPT.__init__

    def init(self, config):
        original(self, config)
        self.transformer["tokens"] = self.transformer.pop("wte")

    monkeypatch.setattr(GPT, "__init__", init)
    monkeypatch.setattr(GPTConfig, "vocab_weights", ("transformer.tokens.weight",))

    def hidden(self, idx, positions=None, mask=None, caches=None):
        return self.transformer.ln_f(self.transformer.tokens(idx))

    monkeypatch.setattr(GPT, "hidden", hidden)


@pytest.mark.gpt2
@pytest.mark.parametrize("edit", [forget_to_tie, rename_embedding], ids=lambda edit: edit.__name__)
def test_a_model_that_cannot_be_loaded_again_does_not_start(edit, small, monkeypatch, capsys):
    edit(monkeypatch)
    config = small()
    code, _, errors = outcome(config, capsys)
    assert code == 2 and not Path(config.log_dir).exists()
    assert_one_line(errors, ("train_gpt2.py",))
