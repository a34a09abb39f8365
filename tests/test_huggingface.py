"""Model directories: what `from_pretrained` reads and refuses, untied heads, and `gpt_config`.

(test_model.py: that the function is transformers' GPT-2.)
"""

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import train_gpt2
from support import checkpoint, cli, huggingface, quantize, tokenizer
from support.errors import UserError
from support.model_function import SkipInit
from train_gpt2 import GPT, GPTConfig

V = tokenizer.VOCAB_SIZE


def random_ids(*shape, seed: int = 0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a random model, the directory it was saved to): only a copy of it may be changed."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    directory = tmp_path_factory.mktemp("saved")
    model.save_pretrained(directory)
    return model, directory


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
    """`edit` changes the dictionary of tensors in place."""
    tensors = {name: t.clone() for name, t in load_file(directory / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_old_file(directory: Path) -> Path:
    """The path of the weights if there is no model.safetensors."""
    (directory / "model.safetensors").unlink()
    return directory / "pytorch_model.bin"


def put_nan(tensors: dict) -> None:
    tensors["transformer.h.1.mlp.c_fc.bias"][3] = math.nan


def add_dimension(tensors: dict) -> None:
    tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"][None]


def untie(tensors: dict) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1


def without(name: str):
    return lambda directory: edit_weights(directory, lambda tensors: tensors.pop(name))


@pytest.mark.gpt2
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json"),
        (lambda d: (d / "config.json").write_text("{}"), "model_type"),
        (lambda d: (d / "config.json").write_text('{"model_type": "gpt2"}'), "vocab_size"),
        (lambda d: edit_config(d, model_type="llama"), "model_type in config.json is 'llama'"),
        (lambda d: edit_config(d, activation_function="relu"), "activation_function is 'relu'"),
        (lambda d: edit_config(d, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse"),
        (lambda d: edit_config(d, n_inner=64), "n_inner is 64"),
        (lambda d: edit_config(d, gpt_config="{}"), "another version of the model"),
        (lambda d: edit_config(d, gpt_config={"n_lyer": 2}), "another version.*n_lyer"),
        (lambda d: edit_config(d, n_layer=3), "transformer.h.2"),
        (lambda d: edit_config(d, n_layer=10**22), f"n_layer in config.json is {10**22}, but"),
        (lambda d: edit_config(d, n_embd=48), "not this GPT-2"),
        (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json"),
        (lambda d: (d / "model.safetensors").unlink(), "no weights in it .model.safetensors"),
        (truncate, "model.safetensors: .*damaged"),
        (lambda d: edit_config(d, n_head=3), "n_head"),
        (lambda d: with_old_file(d).write_bytes(b""), "pytorch_model.bin"),
        (lambda d: torch.save({"model": {}, "step": 1}, with_old_file(d)), "pytorch_model.bin"),
        (lambda d: torch.save({1: torch.ones(2)}, with_old_file(d)), "pytorch_model.bin"),
        (lambda d: torch.save([("a", torch.ones(2))], with_old_file(d)), "pytorch_model.bin"),
        (lambda d: edit_weights(d, put_nan), "transformer.h.1.mlp.c_fc.bias holds NaN"),
        (lambda d: edit_config(d, tie_word_embeddings=False), "lm_head.weight is None"),
        (lambda d: edit_weights(d, add_dimension), "not this GPT-2"),
        (without("transformer.h.1.ln_2.weight"), "transformer.h.1.ln_2.weight"),
        (without("transformer.wte.weight"), "transformer.wte.weight"),
        (without("transformer.wpe.weight"), "transformer.wpe.weight"),
    ],
)
def test_other_directories_are_refused(copied, change, words):
    """What is not a complete GPT-2 is refused with the directory and the reason."""
    GPT.from_pretrained(str(copied))
    change(copied)
    with pytest.raises(UserError, match=words) as refusal:
        GPT.from_pretrained(str(copied))
    assert str(copied) in str(refusal.value)


def test_unknown_name_is_refused():
    """A name that is not a directory and cannot be on the Hub: the message lists valid ones."""
    with pytest.raises(UserError, match="'gpt2-huge'.*gpt2-medium"):
        GPT.from_pretrained("gpt2-huge")


def test_more_positions_than_the_model_has_are_refused(saved):
    """The setting T, its value and the length that the model has are named."""
    with pytest.raises(UserError, match="T=33.* 32 "):
        GPT.from_pretrained(str(saved[1]), block_size=33)


@pytest.mark.gpt2
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
    """A pytorch_model.bin with more than tensors in it ends in a UserError and runs nothing."""
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    file, trap = copied / "pytorch_model.bin", copied / "trap"
    torch.save({**tensors, "more": Bait(trap)}, file)
    with pytest.raises(UserError, match="pytorch_model.bin: refused"):
        GPT.from_pretrained(str(copied))
    assert not trap.exists()
    torch.load(file, weights_only=False)
    assert trap.exists()  # the file did contain code


@pytest.mark.gpt2
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
# The configuration of a GPT in config.json, and a model without initial weights


@dataclasses.dataclass
class MoreConfig(GPTConfig):
    """A configuration with fields that GPT-2 does not have."""

    softcap: float = 15.0
    window: int | None = None
    layers: list = dataclasses.field(default_factory=lambda: [1, 2])


@pytest.mark.gpt2
def test_gpt_config_is_kept_and_transformers_ignores_it(saved, tmp_path):
    """It is written and read with all its fields; a model from elsewhere needs none of them."""
    config = MoreConfig(**dataclasses.asdict(saved[0].config), layers=[3])
    with SkipInit():
        model = GPT(config)
    model.load_state_dict(saved[0].state_dict())
    model.save_pretrained(tmp_path)
    fields = dataclasses.asdict(saved[0].config) | dict(softcap=15.0, window=None, layers=[3])
    assert huggingface.read_config(str(tmp_path))[1]["gpt_config"] == fields
    assert huggingface.load_model(GPT, MoreConfig, tmp_path).config == config
    ids = random_ids(1, 32)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(theirs(ids).logits, saved[0](ids)[0], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="made by another version of the model: .*softcap"):
        GPT.from_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["gpt_config"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert GPT.from_pretrained(tmp_path).config == saved[0].config
    assert huggingface.load_model(GPT, MoreConfig, tmp_path).config.layers == [1, 2]


def test_a_model_is_created_without_initialization():
    weight = torch.full((3, 4), 7.0)
    with SkipInit():
        assert torch.nn.init.normal_(weight) is weight
        layer = torch.nn.Linear(4, 3)  # everything but initialization works as usual
        assert layer(torch.zeros(2, 4)).shape == (2, 3) and (weight + 1 == 8).all()
    assert (weight == 7).all()
    assert not (torch.nn.init.normal_(weight) == 7).any()


# -------------------------------------------------------------------------------------------------
# Untied heads


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


@pytest.mark.gpt2
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


@pytest.mark.gpt2
def test_an_untied_model_is_fine_tuned_and_resumed_exactly(untied, small, tmp_path):
    """Both matrices learn, and a run of 2 + 2 steps ends in the bits of one of 4."""
    settings = dict(init_from=str(untied[1]), max_lr=0.01)
    full = small(**settings, log_dir=str(tmp_path / "full"), checkpoint_every=2)
    train_gpt2.train(full)
    halves = small(**settings, log_dir=str(tmp_path / "halves"))
    (tmp_path / "halves").mkdir()
    os.rename(tmp_path / "full/step_00002", tmp_path / "halves/step_00002")
    train_gpt2.train(halves)
    states = [GPT.from_pretrained(f"{c.log_dir}/step_00004").state_dict() for c in (full, halves)]
    start = GPT.from_pretrained(untied[1]).state_dict()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert not torch.equal(states[0][name], start[name])
    moments = [
        checkpoint.load_state(Path(c.log_dir) / "step_00004" / "train_state.pt")["optimizer"][
            "state"
        ]
        for c in (full, halves)
    ]
    for i in moments[0]:
        assert torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"])


def test_fine_tuning_has_a_recipe_with_its_own_rate(untied):
    config = cli.parse(
        train_gpt2.Config, train_gpt2.RECIPES, ["finetune", f"--init_from={untied[1]}"], ""
    )
    assert config.max_lr < train_gpt2.Config.max_lr / 10
    assert config.init_from == str(untied[1]) and config.log_dir != train_gpt2.Config.log_dir
