"""GPT-2 in Hugging Face's layout, read and written without importing `transformers`.

The layout differs from ours in two things: the four matrices of a block are stored transposed
(OpenAI wrote them as Conv1D), and the embedding has no spare rows. `save` writes all that
`AutoModelForCausalLM`, `AutoTokenizer`, vLLM and llama.cpp's converter look for.
"""

import functools
import json
import re
import shutil
import sys
from pathlib import Path

from support.checkpoint import list_checkpoints, newest_whole
from support.errors import UserError
from support.tokenizer import END_OF_TEXT_ID, VOCAB_SIZE, save_tokenizer

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TRANSPOSED = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
CAUSAL_MASK = re.compile(r"\.attn\.(bias|masked_bias)$")  # a buffer of old files, no parameter
# What our GPT computes; a GPT-2 directory that asks for anything else is refused.
FUNCTION = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def save(directory: Path, shape: dict, weights: dict) -> None:
    """Writes the configuration, `model.safetensors` and the tokenizer's files.

    shape: vocab_size, n_positions, n_embd, n_layer, n_head, tie_word_embeddings
    weights: {OpenAI's parameter name, without spare rows: tensor in nn.Linear's layout}
    """
    from safetensors.torch import save_file

    special = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **shape,
        "n_ctx": shape["n_positions"],
        "n_inner": None,
        **FUNCTION,
        "initializer_range": 0.02,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        **special,
        "dtype": "float32",
        "torch_dtype": "float32",  # the name that transformers 4 and llama.cpp read
    }
    tensors = {
        name: (tensor.t() if TRANSPOSED.search(name) else tensor)
        .detach()
        .cpu()
        .float()
        .contiguous()
        for name, tensor in weights.items()
    }
    directory = Path(directory)
    for name, content in (("config", config), ("generation_config", special)):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(directory / "config.json", directory / "model.safetensors")  # else private
    save_tokenizer(directory, model_max_length=shape["n_positions"])


def read_shape(source: str) -> tuple[Path, dict]:
    """(directory, shape) of a GPT-2; nothing of it is loaded yet. `load` says what `source` can be.

    shape: as `save` takes it, but as config.json has it
    """
    directory = find(source)
    path = directory / "config.json"
    if not path.exists():
        raise UserError(
            f"{directory}: no config.json and no step_NNNNN/ in it; not a model directory"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; not a model directory") from None
    config = config if isinstance(config, dict) else {}
    if config.get("model_type") != "gpt2":
        kind = config.get("model_type")
        raise UserError(f"{source}: model_type in config.json is {kind!r}, and not 'gpt2'")
    for name, value in FUNCTION.items():
        if config.get(name, value) != value:
            raise UserError(f"{source}: {name} is {config[name]!r}; GPT-2 has {value!r}")
    shape = {}
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise UserError(f"{source}: {name} in config.json is {config.get(name)!r}")
        shape[name] = config[name]
    if shape["n_embd"] % shape["n_head"]:
        raise UserError(
            f"{source}: n_embd={shape['n_embd']} is no multiple of n_head={shape['n_head']}"
        )
    if config.get("n_inner") not in (None, 4 * shape["n_embd"]):
        raise UserError(f"{source}: n_inner is {config['n_inner']}; GPT-2 has 4 * n_embd")
    shape["tie_word_embeddings"] = config.get("tie_word_embeddings", True)
    return directory, shape


def load(source: str) -> tuple[dict, dict]:
    """(shape, weights) of a GPT-2, as `save` takes them, float32; ids above GPT-2's are left out.

    source: a directory with `config.json` and `model.safetensors` or `pytorch_model.bin`, or one of
        checkpoints (the newest whole one is taken), or one of `HUB_NAMES` or any `owner/name` of
        the Hub (the one thing here that needs the network).
    Raises UserError: no such model, no network, another architecture, a damaged or non-finite file.
    """
    directory, shape = read_shape(source)
    weights = {}
    for name, tensor in read_tensors(directory).items():
        if CAUSAL_MASK.search(name):
            continue
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name} holds NaN or inf; the file is damaged")
        weights[name] = tensor.t() if TRANSPOSED.search(name) else tensor
    for name, rows in (("wte", shape["vocab_size"]), ("wpe", shape["n_positions"])):
        tensor = weights.get(f"transformer.{name}.weight")
        if tensor is None or tensor.shape != (rows, shape["n_embd"]):
            found = None if tensor is None else tuple(tensor.shape)
            raise UserError(
                f"{source}: not this GPT-2: transformer.{name}.weight is {found}, and not "
                f"{(rows, shape['n_embd'])} as its config.json says"
            )
    tied = shape["tie_word_embeddings"]
    head = weights.get("lm_head.weight", weights["transformer.wte.weight"] if tied else None)
    if head is None or head.shape != weights["transformer.wte.weight"].shape:
        found = None if head is None else tuple(head.shape)
        raise UserError(f"{source}: not this GPT-2: its output head, lm_head.weight, is {found}")
    # What the file holds counts: `transformers` does not tie two matrices that differ, either.
    shape["tie_word_embeddings"] = head.equal(weights["transformer.wte.weight"])
    if shape["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    if shape["vocab_size"] > VOCAB_SIZE:  # padding, or tokens that GPT-2's tokenizer does not have
        shape["vocab_size"] = VOCAB_SIZE
        for name in ("transformer.wte.weight", "lm_head.weight"):
            if name in weights:
                weights[name] = weights[name][:VOCAB_SIZE]
    return shape, weights


def find(source: str) -> Path:
    """The directory of a model: itself, its newest checkpoint, or the Hub's copy, fetched once."""
    directory = Path(source)
    if directory.is_dir():
        if (directory / "config.json").exists() or not list_checkpoints(directory):
            return directory
        return newest_whole(directory, say=functools.partial(print, file=sys.stderr))
    if source not in HUB_NAMES and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        names = ", ".join(HUB_NAMES)
        raise UserError(f"{source!r} is neither a directory nor one of {names} nor owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError("huggingface_hub is not installed: pip install huggingface_hub") from None
    name = f"openai-community/{source}" if source in HUB_NAMES else source
    try:
        for weights in ("model.safetensors", "pytorch_model.bin"):  # some old ones have no first
            directory = Path(snapshot_download(name, allow_patterns=["config.json", weights]))
            if (directory / weights).exists():
                break
        return directory
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{source!r} cannot be had from the Hugging Face Hub ({reason}); "
            "without a network, name a local directory instead"
        ) from None


def read_tensors(directory: Path) -> dict:
    """{name: tensor} of `model.safetensors`, or of an old `pytorch_model.bin` (no code is run)."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / "model.safetensors"
    if not path.exists():
        path = directory / "pytorch_model.bin"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, torch.Tensor) for tensor in dict(tensors).values()):
            raise ValueError("not a plain {name: tensor}")
        return tensors
    except FileNotFoundError:
        raise UserError(f"{directory}: neither model.safetensors nor pytorch_model.bin") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: {reason}; damaged, or another program's") from None
    except Exception as error:  # pickle.UnpicklingError: more than tensors in it
        raise UserError(f"{path}: refused, not plain tensors ({type(error).__name__})") from None
