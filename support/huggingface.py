"""GPT-2 in Hugging Face's layout, read and written without importing `transformers`.

The layout differs from that of `GPT` in two ways: the four matrices of a block are stored
transposed (OpenAI wrote them as Conv1D), and the embedding has no padding rows.
"""

import contextlib
import dataclasses
import json
import re
import shutil
from pathlib import Path

from torch.nn import functional as F

from support import model_function
from support.errors import UserError
from support.launch import print0
from support.model_files import find_directory, read_tensors
from support.tokenizer import END_OF_TEXT_ID, VOCAB_SIZE, save_tokenizer, validate_vocabulary

# The model_type of a model that computes something else, which `transformers` refuses to open.
MODIFIED = "gpt2-modified"
TRANSPOSED = re.compile(r"\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
CAUSAL_MASK = re.compile(r"\.attn\.(bias|masked_bias)$")  # a buffer in old files, not a parameter
WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
# Heads that other programs put on a GPT-2, beside its own.
OTHER_HEADS = ("v_head.", "multiple_choice_head.", "score.", "classifier.", "qa_outputs.")
GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # names of one function
# The function that `GPT` computes; a directory with other values is refused.
FUNCTION = {
    "activation_function": GELU[0],
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
SPECIAL_IDS = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}


def padding_rows(model) -> dict:
    """{parameter: its rows from vocab_size on}, which `save_model` leaves out."""
    c = model.config
    return {n: model.get_parameter(n)[c.vocab_size :].detach().clone() for n in c.vocab_weights}


def find_non_finite(model) -> str | None:
    """The name of a parameter that holds a NaN or an infinity, if there is one."""
    return next((n for n, p in model.named_parameters() if not p.isfinite().all()), None)


# -------------------------------------------------------------------------------------------------
# Writing


def save_model(model, directory) -> None:
    """Writes a directory that `AutoModelForCausalLM`, `AutoTokenizer`, vLLM and llama.cpp read.

    A model that does not compute GPT-2 gets the model_type MODIFIED, which only `load_model` reads.
    """
    write_model(export_model(model), directory)


def export_model(model) -> tuple[dict, dict]:
    """(content of config.json, {name: float32 tensor}) in Hugging Face's layout.

    The tensors are on the model's device; some of them are its parameters and not copies.
    """
    c, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == HEAD and c.tied:
            continue
        tensor = tensor[: c.vocab_size] if name in c.vocab_weights else tensor
        tensor = tensor.t() if TRANSPOSED.search(name) else tensor
        tensors[name] = tensor.detach().float().contiguous()
    return _build_config(c, model_function.identify(model)), tensors


def write_model(exported: tuple[dict, dict], directory) -> None:
    """Writes what `export_model` returned, and the tokenizer."""
    from safetensors.torch import save_file

    config, tensors = exported
    tensors, directory = {name: t.cpu() for name, t in tensors.items()}, Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", config), ("generation_config", SPECIAL_IDS)):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with contextlib.suppress(OSError):  # a file system without modes
        shutil.copymode(directory / "config.json", directory / "model.safetensors")  # else private
    save_tokenizer(directory, model_max_length=config["n_positions"])


def _build_config(c, function: model_function.Function) -> dict:
    """The content of config.json; `transformers` ignores gpt_config and function."""
    return {
        "architectures": ["GPT2LMHeadModel" if function.is_gpt2 else "GPT"],
        "model_type": "gpt2" if function.is_gpt2 else MODIFIED,
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "tie_word_embeddings": c.tied,
        "n_ctx": c.block_size,
        "n_inner": None,
        **FUNCTION,
        "initializer_range": 0.02,
        **NO_DROPOUT,
        **SPECIAL_IDS,
        "dtype": "float32",
        "torch_dtype": "float32",  # the name that transformers 4 and llama.cpp read
        "gpt_config": dataclasses.asdict(c),
        "function": function.number,
    }


def describe_kind(model) -> str:
    """What `save_model` makes of a model, in a few words."""
    function = model_function.identify(model)
    if function.is_gpt2:
        return "a Hugging Face model"
    reason = "it does not compute GPT-2"
    if function.number is None:
        reason = "it cannot be compared with GPT-2 on a CPU"
    return f"of model_type {MODIFIED!r}, for this code only, since {reason}"


def check_code(model) -> None:
    """Raises UserError if a tiny model of this code is not the same after saving and loading.

    Prints a line if it does not compute GPT-2.
    """
    if not (function := model_function.identify(model)).is_gpt2:
        print0(f"each checkpoint will be {describe_kind(model)}")
    if function.number is None:
        return
    from safetensors.torch import load, save

    tiny = model_function.build_tiny(model)
    config, tensors = export_model(tiny)
    config, tensors = json.loads(json.dumps(config)), load(save(tensors))  # as in a file
    try:
        loaded = _build_model(type(tiny), type(tiny.config), "its checkpoint", config, tensors)
    except UserError as error:
        raise UserError(f"the model in train_gpt2.py cannot be loaded again: {error}") from None
    state = loaded.state_dict()
    for name, tensor in tiny.state_dict().items():
        if not tensor.equal(state[name]):
            raise UserError(
                f"the model in train_gpt2.py saves {name}, but gets other values when it is loaded"
            )


# -------------------------------------------------------------------------------------------------
# Reading


def load_model(
    model_class, config_class, source: str, block_size: int | None = None, same_function=True
):
    """The `model_class(config_class(...))` of a source of `read_config`, its weights in float32.

    The configuration is the one that `save_model` wrote, or that of a GPT-2 from elsewhere, without
    ids above those of GPT-2. The padding rows are zero.
    block_size: keep only so many positions
    same_function: False to allow a model that computed another function when it was saved
    Raises UserError if the source is not such a model, is damaged, or has fewer positions.
    """
    directory, saved = read_config(str(source))
    validate_vocabulary(directory)
    positions = saved["n_positions"]
    if block_size is not None and block_size > positions:
        raise UserError(
            f"T={block_size}: {source} has only {positions} positions; give --T={positions}"
        )
    tensors = read_tensors(directory)
    model = _build_model(model_class, config_class, source, saved, tensors, block_size)
    if same_function:
        _validate_function(source, saved, model)
    return model


def _build_model(model_class, config_class, source, saved, tensors, block_size=None):
    """`load_model` from the content of config.json and {name in the file: tensor}."""
    weights = _convert_weights(source, tensors, saved)
    try:
        values = (saved.get("gpt_config") or {}) | {
            "block_size": block_size or saved["n_positions"],
            "vocab_size": min(saved["vocab_size"], VOCAB_SIZE),  # others are padding, or new tokens
            **{name: saved[name] for name in ("n_layer", "n_head", "n_embd")},
            "tied": weights[HEAD].equal(weights[WTE]),  # as transformers does
        }
        config = config_class(**values)
    except TypeError as error:
        raise UserError(f"{source}: made by another version of the model: {error}") from None
    for name in config.vocab_weights:
        padding = config.padded_vocab_size - config.vocab_size
        weights[name] = F.pad(weights[name][: config.vocab_size], (0, 0, 0, padding))
    if config.tied:
        weights[HEAD] = weights[WTE]
    if WPE in weights:
        weights[WPE] = weights[WPE][: config.block_size]
    with model_function.SkipInit():
        model = model_class(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{source}: not this GPT-2: {error}") from None
    return model


def _validate_function(source: str, config: dict, model) -> None:
    """Raises UserError if `model` computes another function than the one that was saved."""
    function = model_function.identify(model)
    if "function" in config:
        equal = function.may_equal(config["function"])
    else:  # a GPT-2 from elsewhere
        equal = function.is_gpt2 or function.number is None
    if not equal:
        raise UserError(
            f"{source}: the model in train_gpt2.py computes another function than this one did "
            f"when it was saved; undo the edit, or start a new run with --init_from={source} in "
            "another --log_dir"
        )


def find_model(source: str) -> tuple[str, Path, dict]:
    """(name, directory, config.json) of a model with GPT-2's vocabulary; see `read_config`.

    name: `source`, or the directory of the checkpoint that was chosen in it
    """
    directory, config = read_config(source)
    if config["vocab_size"] < VOCAB_SIZE:
        raise UserError(
            f"{source}: has {config['vocab_size']:,} tokens, and GPT-2's tokenizer {VOCAB_SIZE:,}; "
            "choose another model"
        )
    return str(directory) if Path(source).is_dir() else source, directory, config


def read_config(source: str) -> tuple[Path, dict]:
    """(directory, config.json) of a GPT-2, without reading its weights.

    source: a directory with `config.json` and weights, or a directory of checkpoints (the newest
        valid one is read), or `gpt2`, ..., `gpt2-xl` or any `owner/name` of the Hub
    Raises UserError: unknown model, no network, another architecture.
    """
    directory = find_directory(source)
    path = directory / "config.json"
    if not path.exists():
        raise UserError(
            f"{directory}: no config.json and no step_NNNNN/ in it; not a model directory"
        )
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: {error}; not a model directory") from None
    _validate_config(source, config)
    return directory, config


def _validate_config(source: str, config: dict) -> None:
    """Raises UserError if the content of a config.json is not that of a GPT-2."""
    if (kind := config.get("model_type")) not in ("gpt2", MODIFIED):
        raise UserError(f"{source}: model_type in config.json is {kind!r}, and not 'gpt2'")
    if not isinstance(config.get("function"), float | None):
        raise UserError(f"{source}: function in config.json is {config['function']!r}")
    for name, value in FUNCTION.items():
        if config.get(name, value) not in (GELU if value in GELU else (value,)):
            raise UserError(f"{source}: {name} is {config[name]!r}; GPT-2 has {value!r}")
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise UserError(f"{source}: {name} in config.json is {config.get(name)!r}")
    n_embd, n_head = config["n_embd"], config["n_head"]
    if n_embd % n_head:
        raise UserError(f"{source}: n_embd={n_embd} is not a multiple of n_head={n_head}")
    if config.get("n_inner") not in (None, 4 * n_embd):
        raise UserError(f"{source}: n_inner is {config['n_inner']}; GPT-2 has 4 * n_embd")


def _convert_weights(source: str, tensors: dict, config: dict) -> dict:
    """{OpenAI's parameter name: tensor in the layout of nn.Linear, float32}, always with the head.

    Raises UserError if they are damaged or contradict config.json.
    """
    weights = {}
    prefix = "transformer." if "wte.weight" in tensors else ""  # a file of transformers' GPT2Model
    for name, tensor in tensors.items():
        if CAUSAL_MASK.search(name) or name.startswith(OTHER_HEADS):
            continue
        name = name if name == HEAD else prefix + name
        tensor = tensor.float()
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name} holds NaN or inf; the file is damaged")
        weights[name] = tensor.mT if TRANSPOSED.search(name) and tensor.dim() > 1 else tensor
    if config.get("tie_word_embeddings", True) and WTE in weights:
        weights.setdefault(HEAD, weights[WTE])
    vocab_shape = (config["vocab_size"], config["n_embd"])
    shapes = {WTE: vocab_shape, HEAD: vocab_shape}
    if WPE in weights:  # else the model is edited, or loading the weights fails
        shapes[WPE] = (config["n_positions"], config["n_embd"])
    for name, shape in shapes.items():
        found = tuple(weights[name].shape) if name in weights else None
        if found != shape:
            raise UserError(
                f"{source}: not this GPT-2: {name} is {found}, and not {shape} as its config.json "
                "says"
            )
    if config["n_layer"] > len(weights):  # to build such a model might never end
        raise UserError(
            f"{source}: not this GPT-2: n_layer in config.json is {config['n_layer']}, but there "
            f"are only {len(weights)} tensors"
        )
    return weights
