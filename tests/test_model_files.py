"""Finding and reading the files of a model: shards, other heads, paths that are not Hub names."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from support import tokenizer
from support.errors import UserError
from train_gpt2 import GPT

CONFIG = dict(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=320)
IDS = torch.arange(20)[None] * 7


def hugging_face_model(name: str = "GPT2LMHeadModel", **settings):
    """A random model of `transformers`, of any of its GPT-2 classes."""
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, name)(transformers.GPT2Config(**CONFIG, **settings)).eval()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(directory with one model.safetensors, its logits by transformers)."""
    directory, model = tmp_path_factory.mktemp("reference"), hugging_face_model()
    model.save_pretrained(directory)
    with torch.no_grad():
        return directory, model(IDS).logits


@pytest.fixture
def copied(reference, tmp_path):
    shutil.copytree(reference[0], tmp_path / "model")
    return tmp_path / "model"


def put_in_shards(directory: Path, suffix: str) -> Path:
    """Divides model.safetensors among three files; returns their index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    weight_map = {}
    for part in range(3):
        name = f"{stem}-{part + 1:05d}-of-00003.{suffix}"
        mine = {key: tensors[key] for key in sorted(tensors)[part::3]}
        if suffix == "bin":
            torch.save(mine, directory / name)
        else:
            save_file(mine, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, name)
    index = directory / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def edit_index(index: Path, **changes) -> None:
    content = json.loads(index.read_text())
    content["weight_map"] |= changes
    index.write_text(json.dumps(content))


def assert_same_model(directory: Path, logits) -> None:
    with torch.no_grad():
        found = GPT.from_pretrained(str(directory))(IDS)[0]
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-4)


# -------------------------------------------------------------------------------------------------
# Shards


@pytest.mark.gpt2
def test_shards_as_transformers_writes_them_are_read(reference, tmp_path):
    hugging_face_model().save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_model(tmp_path, reference[1])


@pytest.mark.gpt2
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_of_both_kinds_are_read(reference, copied, suffix):
    put_in_shards(copied, suffix)
    assert_same_model(copied, reference[1])


def test_a_missing_shard_is_named(copied):
    put_in_shards(copied, "safetensors")
    (copied / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors: missing"):
        GPT.from_pretrained(str(copied))


def test_an_index_that_names_a_tensor_that_is_not_there_is_refused(copied):
    index = put_in_shards(copied, "safetensors")
    edit_index(index, **{"transformer.h.0.x": "model-00001-of-00003.safetensors"})
    with pytest.raises(UserError, match="index.json: transformer.h.0.x is not in model-00001"):
        GPT.from_pretrained(str(copied))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "", 3])
def test_an_index_that_names_a_file_elsewhere_is_refused(copied, name):
    index = put_in_shards(copied, "safetensors")
    edit_index(index, **{"transformer.wte.weight": name})
    with pytest.raises(UserError, match="index.json: .* is not the name of a file"):
        GPT.from_pretrained(str(copied))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_a_damaged_index_is_refused(copied, content):
    put_in_shards(copied, "bin").write_text(content)
    with pytest.raises(UserError, match="pytorch_model.bin.index.json: .*damaged"):
        GPT.from_pretrained(str(copied))


# -------------------------------------------------------------------------------------------------
# Models with another head, and other names of one function


@pytest.mark.gpt2
@pytest.mark.parametrize("name", ["GPT2DoubleHeadsModel", "GPT2ForSequenceClassification"])
def test_the_language_model_below_another_head_is_read(reference, tmp_path, name):
    model = hugging_face_model(name, num_labels=1, pad_token_id=0)
    state = hugging_face_model().transformer.state_dict()
    model.transformer.load_state_dict(state)
    model.save_pretrained(tmp_path)
    assert_same_model(tmp_path, reference[1])


@pytest.mark.gpt2
def test_a_value_head_is_left_out(reference, copied):
    """As trl writes it beside the language model."""
    path = copied / "model.safetensors"
    tensors = load_file(path) | {"v_head.summary.weight": torch.randn(1, 32)}
    save_file(tensors | {"v_head.summary.bias": torch.zeros(1)}, path, metadata={"format": "pt"})
    assert_same_model(copied, reference[1])


@pytest.mark.gpt2
@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "gelu_fast"])
def test_other_names_of_the_activation_are_accepted(reference, copied, name):
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"activation_function": name}))
    assert_same_model(copied, reference[1])


# -------------------------------------------------------------------------------------------------
# Paths


@pytest.mark.parametrize(
    "source",
    [
        "out/ckpt.pt",
        "ckpt.pt",
        "./out",
        "out/step_00010",
        "out/model.safetensors",
        "~/x",
        "x" * 300,
    ],
)
def test_what_looks_like_a_path_is_not_sent_to_the_hub(tmp_path, monkeypatch, source):
    def download(*_, **__):
        raise AssertionError("looked up on the Hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out|ckpt|x"):
        GPT.from_pretrained(source)


def test_a_checkpoint_of_nanogpt_is_refused_with_the_way_to_convert_it(tmp_path):
    torch.save({"model": {}, "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="ckpt.pt: is a file; .*nanoGPT.*GPT2LMHeadModel"):
        GPT.from_pretrained(str(tmp_path / "ckpt.pt"))


# -------------------------------------------------------------------------------------------------
# Vocabularies: a GPT-2 of another language has as many tokens, but not the same


@pytest.fixture
def with_tokenizer(copied):
    tokenizer.save_tokenizer(copied)
    return copied


def edit_vocabulary(path: Path, edit) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content["model"]["vocab"] if path.name == "tokenizer.json" else content)
    path.write_text(json.dumps(content), encoding="utf-8")


def swap_two(vocab: dict) -> None:
    vocab["hello"], vocab["world"] = vocab["world"], vocab["hello"]


def rename_one(vocab: dict) -> None:
    vocab["\u010dasopis"] = vocab.pop("hello")


def drop_one(vocab: dict) -> None:
    del vocab["hello"]


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("edit", [swap_two, rename_one, drop_one, dict.clear])
def test_a_gpt2_of_another_language_is_refused(with_tokenizer, name, edit):
    edit_vocabulary(with_tokenizer / name, edit)
    with pytest.raises(UserError, match=f"{name}: not GPT-2's vocabulary"):
        GPT.from_pretrained(str(with_tokenizer))


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"a": "b"}', '{"model": 3}'])
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_damaged_vocabulary_is_refused(with_tokenizer, name, content):
    (with_tokenizer / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: not GPT-2's vocabulary"):
        GPT.from_pretrained(str(with_tokenizer))


@pytest.mark.gpt2
def test_tokens_added_at_the_end_are_accepted(with_tokenizer, reference):
    for name in ("vocab.json", "tokenizer.json"):
        edit_vocabulary(with_tokenizer / name, lambda vocab: vocab.update({"<|user|>": 50257}))
    assert_same_model(with_tokenizer, reference[1])


@pytest.mark.gpt2
def test_the_tokenizer_of_transformers_is_accepted(with_tokenizer, reference):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(with_tokenizer)
    for name in ("vocab.json", "tokenizer.json", "merges.txt"):
        (with_tokenizer / name).unlink()
    loaded.save_pretrained(with_tokenizer)
    assert (with_tokenizer / "tokenizer.json").exists()
    assert_same_model(with_tokenizer, reference[1])
