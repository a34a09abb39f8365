"""The files of a model: finding its directory, here or on the Hugging Face Hub, and its tensors."""

import json
import os
import re
import sys
from pathlib import Path

import torch

from support import checkpoint
from support.errors import UserError

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# The first one that exists is read. An index names the files that hold the tensors.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
FILE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".json")


def find_directory(source: str) -> Path:
    """The directory itself, its newest checkpoint, or the local copy of a model of the Hub.

    What exists here or looks like a path is never looked for on the Hub. Raises UserError if the
    model is not found.
    """
    directory = Path(source)  # its methods raise for a name that is too long
    if os.path.exists(directory / "config.json"):
        return directory
    if os.path.isdir(directory):
        return checkpoint.newest_valid(directory, file=sys.stderr) or directory
    if os.path.isfile(directory):
        raise UserError(
            f"{source}: is a file; name a directory in Hugging Face format (to convert a ckpt.pt "
            "of nanoGPT, copy its state_dict into transformers' GPT2LMHeadModel, whose four "
            "matrices per block are transposed, and use save_pretrained)"
        )
    parts = directory.parts
    is_path = source.endswith(FILE_SUFFIXES) or (len(parts) > 1 and os.path.exists(parts[0]))
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not is_path
    if source not in HUB_NAMES and not on_hub:
        names = ", ".join(HUB_NAMES)
        raise UserError(f"{source!r} is neither a directory nor one of {names} nor owner/name")
    return _download(source)


def _download(source: str) -> Path:
    """The local copy of a model of the Hub, downloaded if it is not in the cache."""
    from huggingface_hub import snapshot_download

    name = f"openai-community/{source}" if source in HUB_NAMES else source
    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):  # old models have the second
            patterns = ["*.json", "merges.txt", weights]
            directory = Path(snapshot_download(name, allow_patterns=patterns))
            if any(directory.glob(weights)):
                break
        return directory
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{source!r} cannot be downloaded from the Hugging Face Hub ({reason}); "
            "without a network, name a local directory instead"
        ) from None


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of the first of WEIGHT_FILES; code in a pickle file is not executed.

    Raises UserError if a file is missing or damaged.
    """
    path = next((p for name in WEIGHT_FILES if (p := directory / name).exists()), None)
    if path is None:
        raise UserError(f"{directory}: no weights in it ({WEIGHT_FILES[0]} or {WEIGHT_FILES[2]})")
    if path.suffix != ".json":
        return _read_file(path)
    weight_map = _read_index(path)
    tensors = {}
    for name in sorted(set(weight_map.values())):
        tensors |= _read_file(directory / name)
    if missing := sorted(weight_map.keys() - tensors.keys()):
        raise UserError(f"{path}: {missing[0]} is not in {weight_map[missing[0]]}; download both")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """{tensor: name of the file that holds it}. Raises UserError if a file is not there."""
    try:
        weight_map = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}; damaged") from None
    for name in weight_map.values():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise UserError(f"{path}: {name!r} is not the name of a file in the same directory")
        if not (path.parent / name).is_file():
            raise UserError(f"{path.parent / name}: missing, though {path.name} lists it")
    return weight_map


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of one file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        types = {(type(name), isinstance(t, torch.Tensor)) for name, t in dict(tensors).items()}
        if not isinstance(tensors, dict) or types - {(str, True)}:
            raise ValueError("not a plain {name: tensor}")
        return tensors
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: {reason}; damaged, or of another program") from None
    except Exception as error:  # pickle.UnpicklingError: the file holds more than tensors
        raise UserError(f"{path}: refused, not plain tensors ({type(error).__name__})") from None
