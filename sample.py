"""Text from a GPT-2: your own run's, someone else's, OpenAI's, or several side by side.

    python sample.py                                       # the newest checkpoint in log/
    python sample.py log_tiny --prompt="QUEEN MARETH:" --num=3
    python sample.py log gpt2 theirs/model --prompt="The capital of France is" --temperature=0
    python sample.py log/step_19073 --prompt=FILE:story.txt --stream --top_p=0.9
    echo "Once upon a time" | python sample.py gpt2 --prompt=- --int8

The texts go to standard output; how each model computes, and its speed, to standard error. Text i
of each model draws with seed + i only: it is the same for any `num`, up to the last digits that a
device computes differently for another number of rows.
"""

import codecs
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from support import cli, generation, huggingface, quantize, text_encoding, tokenizer
from support.distributed import Runtime, initialize
from support.errors import SettingError, UserError, run_main
from support.tokenizer import END_OF_TEXT, END_OF_TEXT_ID
from train_gpt2 import GPT

# -------------------------------------------------------------------------------------------------
# Settings: edit the defaults here, or give --name=value


@dataclass
class Config:
    """The settings of the command line."""

    # input
    models: tuple = ("log",)  # log directories, checkpoints, Hugging Face directories, Hub names
    prompt: str = "Hello, I'm a language model,"  # a text; FILE:path; - for standard input

    # sampling
    num: int = 1  # texts from each model
    max_new_tokens: int = 100  # tokens added to the prompt
    temperature: float = 1.0  # below 1 likely tokens become more likely; 0: always the likeliest
    top_k: int = 50  # only from this many of the likeliest tokens; 0: from all
    top_p: float = 1.0  # only from the likeliest that together have this probability; 1: from all
    seed: int = 1337  # of the first text; the next text has the next seed
    stop: bool = True  # end a text at <|endoftext|>; False: continue after it
    slide: int = 0  # tokens dropped from a full window at once; 0: a quarter of it; 1: exact, slow

    # output and system
    stream: bool = False  # print tokens as they are generated, one text after the other
    int8: bool = False  # the model's matrices in 8 bits
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of the matrix products: auto, float32, bfloat16, float16


BATCH = 16  # texts generated at a time
RANGES = dict(
    num=(1, 10**6), max_new_tokens=(1, 10**9), top_k=(0, 10**9), slide=(0, 10**9), seed=(0, 2**63)
)


def validate(config: Config) -> None:
    """Raises SettingError if a setting is out of range."""
    for name, (least, most) in RANGES.items():
        if not least <= getattr(config, name) <= most:
            raise SettingError(f"{name}={getattr(config, name)}: must be from {least} to {most}")
    if config.temperature != 0 and not 1e-6 <= config.temperature < float("inf"):
        raise SettingError(f"temperature={config.temperature}: must be 0, or finite and above 1e-6")
    if not 1e-6 <= config.top_p <= 1:
        raise SettingError(f"top_p={config.top_p}: must be above 0 (at least 1e-6) and at most 1")


def encode_prompt(prompt: str) -> list[int]:
    """The ids of the text that the setting `prompt` gives, with <|endoftext|> in it as the token.

    Raises UserError if it is empty or its file cannot be read.
    """
    if not (text := read_prompt(prompt)):
        raise UserError(
            f'prompt={prompt!r}: is empty; give some text, or --prompt="<|endoftext|>" for the '
            "start of a document"
        )
    first, *documents = map(tokenizer.encode_plain, text.split(END_OF_TEXT))
    return [*first.tolist(), *(id for d in documents for id in (END_OF_TEXT_ID, *d.tolist()))]


def read_prompt(prompt: str) -> str:
    """The text that `prompt` gives. The line break that ends a file is not part of it."""
    if prompt != "-" and not prompt.startswith("FILE:"):
        return tokenizer.valid_text(prompt)
    try:
        name = prompt.removeprefix("FILE:")
        data = sys.stdin.buffer.read() if prompt == "-" else Path(name).read_bytes()
        data = data[text_encoding.find_start(data) :]
    except (OSError, ValueError) as error:
        raise UserError(f"prompt={prompt!r}: {error}") from None
    return data.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")


def find_models(config: Config, prompt: list[int]) -> list[tuple[str, Path]]:
    """(name, directory) of each model, before any weights are loaded.

    Raises UserError if one does not exist, or its window or vocabulary is too small.
    """
    found = []
    for model in config.models:
        if model == "log" and not Path(model).exists():
            raise UserError(
                "models='log': there is no such directory; train a model (python train_gpt2.py "
                "tiny writes log_tiny), or name one: python sample.py gpt2"
            )
        name, directory, saved = huggingface.find_model(model)
        window = saved["n_positions"]
        if len(prompt) > window:
            raise UserError(
                f"prompt: has {len(prompt):,} tokens, and {model} sees only {window:,}; shorten it"
            )
        if config.slide > window:
            raise SettingError(f"slide={config.slide}: {model} sees only {window:,} tokens")
        found.append((name, directory))
    return found


# -------------------------------------------------------------------------------------------------
# Texts


def decode_pieces(ids):
    """Yields the text of an iterable of ids; a character when its last byte has arrived."""
    token_bytes = tokenizer.get_encoding().decode_single_token_bytes
    return codecs.iterdecode(map(token_bytes, ids), "utf-8", errors="replace")


def stream_ids(model: GPT, prompt: list[int], rows: range, config: Config, device: torch.device):
    """The next ids of the texts `rows`, one after the other: see `generation.stream`."""
    return generation.stream(
        model,
        torch.tensor([prompt] * len(rows), device=device),
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p if config.top_p < 1 else None,
        generator=[torch.Generator(device).manual_seed(config.seed + row) for row in rows],
        stop=tokenizer.END_OF_TEXT_ID if config.stop else None,
        slide=config.slide or max(1, model.config.block_size // 4),
    )


def write_batch(model, name, prompt, rows: range, config: Config, runtime: Runtime) -> int:
    """Writes the texts `rows` to standard output; returns the number of generated tokens."""
    several, generated = len(config.models) > 1 or config.num > 1, 0
    number = f", text {{}} of {config.num}" if config.num > 1 else ""

    def until_stop(ids):
        nonlocal generated
        for id in ids:
            if config.stop and id == tokenizer.END_OF_TEXT_ID:
                return
            generated += 1
            yield id

    with runtime.autocast():
        steps = stream_ids(model, prompt, rows, config, runtime.device)
        steps = (new[:, 0].tolist() for new in steps)
        # The ids of each row: those of the only one as they are generated, or all at the end.
        texts = [(id for [id] in steps)] if config.stream else zip(*steps)
        for row, ids in zip(rows, texts):
            if several:
                print(f"--- {name}{number.format(row + 1)}")
            for piece in decode_pieces(itertools.chain(prompt, until_stop(ids))):
                print(piece, end="", flush=config.stream)
            print("\n" if several else "", flush=True)
    return generated


def main() -> int:
    config = cli.parse(Config, {}, sys.argv[1:], "Text from GPT-2 models.")
    validate(config)
    runtime = initialize(config.device, config.dtype)
    prompt = encode_prompt(config.prompt)
    found = find_models(config, prompt)
    size = 1 if config.stream else BATCH
    for name, directory in found:
        model = GPT.from_pretrained(directory)
        placement = quantize.prepare_for_inference(model, runtime, config.int8)
        print(f"{name}: {placement}", file=sys.stderr, flush=True)
        start, generated = time.perf_counter(), 0
        for first in range(0, config.num, size):
            rows = range(first, min(first + size, config.num))
            generated += write_batch(model, name, prompt, rows, config, runtime)
        seconds = time.perf_counter() - start
        speed = f"{generated:,} tokens in {seconds:.1f} s, {generated / seconds:,.0f} tokens/s"
        print(f"{name}: {speed}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    run_main(main, alone=True)
