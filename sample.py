"""Text from a GPT-2: your own run's, someone else's, OpenAI's, or several side by side.

    python sample.py                                       # the newest checkpoint in log/
    python sample.py log_tiny --prompt="QUEEN MARETH:" --num=3
    python sample.py log gpt2 theirs/model --prompt="The capital of France is" --temperature=0
    python sample.py log/step_19073 --prompt=FILE:story.txt --stream --top_p=0.9
    echo "Once upon a time" | python sample.py gpt2 --prompt=- --int8

Any setting of `Config` below can be given as `--name=value`. The texts go to standard output, with
a heading each if there are several; which file and step they come from, and how fast, to standard
error.

Text i of each model draws with seed + i alone: it is the same for any `num`, up to the last digits
that a device computes differently for another number of rows. Beyond the model's window (1,024
tokens) it sees the end of the text: when the window is full its first `slide` tokens are dropped.
"""

import codecs
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import train_gpt2
from support import checkpoint, cli, huggingface, quantize, tokenizer
from support.errors import SettingError, UserError, run_main

# -------------------------------------------------------------------------------------------------
# Settings: edit the defaults here, or give --name=value


@dataclass
class Config:
    """The settings: a line of the command line each."""

    models: tuple = ("log",)  # log directories, checkpoints, Hugging Face directories, Hub names
    prompt: str = "Hello, I'm a language model,"  # a text; FILE:path; - for standard input
    num: int = 1  # texts from each model
    max_new_tokens: int = 100  # tokens added to the prompt
    temperature: float = 1.0  # below 1 likelier tokens get likelier still; 0: always the likeliest
    top_k: int = 50  # only among so many tokens; 0: all
    top_p: float = 1.0  # only among the likeliest that together have this probability; 1: all
    seed: int = 1337  # of the first text; the next has the next
    stop: bool = True  # end a text at <|endoftext|>; False: go on after it
    slide: int = 0  # tokens dropped from a full window at once; 0: a quarter of it; 1: exact, slow
    stream: bool = False  # print tokens as they come, one text after the other
    int8: bool = False  # the model's matrices in 8 bits
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # of the matrix products: auto, float32, bfloat16, float16


BATCH = 16  # texts generated at a time


def check(config: Config) -> None:
    """Raises SettingError where a setting is impossible by itself."""
    train_gpt2.check_system(config)
    for name, least in dict(num=1, max_new_tokens=1, top_k=0, slide=0, seed=0).items():
        if getattr(config, name) < least:
            raise SettingError(f"{name}={getattr(config, name)}: must be at least {least}")
    if not 0 <= config.temperature < float("inf"):
        raise SettingError(f"temperature={config.temperature}: must be a number from 0 on")
    if not 0 < config.top_p <= 1:
        raise SettingError(f"top_p={config.top_p}: must be above 0 and at most 1")


def read_prompt(prompt: str) -> str:
    """The text that `prompt` names. The line break that ends a file is not part of it."""
    if prompt == "-":
        data, name = sys.stdin.buffer.read(), "prompt"
    elif prompt.startswith("FILE:"):
        name = prompt.removeprefix("FILE:")
        try:
            data = Path(name).read_bytes()
        except OSError as error:
            raise UserError(f"prompt={prompt!r}: {name}: {error.strerror}") from None
    else:
        return tokenizer.valid_text(prompt)
    return data.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")


def encode_prompt(config: Config) -> list[int]:
    """The prompt's ids, <|endoftext|> in it being the token. Raises UserError for an empty one."""
    text = read_prompt(config.prompt)
    if not text:
        raise UserError(
            f'prompt={config.prompt!r}: is empty; give some text, or --prompt="<|endoftext|>" for '
            "the start of a document"
        )
    return tokenizer.get_encoding().encode(text, allowed_special="all")


# -------------------------------------------------------------------------------------------------
# Models


def find_models(config: Config, prompt: list[int]) -> list[tuple[str, Path]]:
    """(name with file and step, directory) of each model; nothing is loaded yet.

    Raises UserError for one that is none, or whose window or vocabulary is too small.
    """
    found = []
    for model in config.models:
        if model == "log" and not Path(model).exists():
            raise UserError(
                "models='log': there is no such directory; train one (python train_gpt2.py tiny "
                "makes log_tiny), or name a model: python sample.py gpt2"
            )
        directory, shape = huggingface.read_shape(model)
        tokenizer.check_vocabulary(model, shape["vocab_size"])
        window = shape["n_positions"]
        if len(prompt) > window:
            raise UserError(
                f"prompt: has {len(prompt):,} tokens, and {model} sees only {window:,}; shorten it"
            )
        if config.slide > window:
            raise SettingError(f"slide={config.slide}: {model} sees only {window:,} tokens")
        name = str(directory) if Path(model).is_dir() else model
        files = ("model.safetensors", "pytorch_model.bin")
        facts = [file for file in files if (directory / file).exists()][:1]
        if match := checkpoint.STEP_NAME.fullmatch(directory.resolve().name):
            facts.append(f"step {int(match[1]):,}")
        found.append((f"{name} ({', '.join(facts)})" if facts else name, directory))
    return found


def load(directory: Path, config: Config, device: torch.device) -> train_gpt2.GPT:
    """The model on its device, in 8 bits if so asked."""
    model = train_gpt2.GPT.from_pretrained(directory)
    if config.int8:
        quantize.to_int8(model)
    return model.to(device).eval()


# -------------------------------------------------------------------------------------------------
# Texts


def streams(model, prompt: list[int], rows: range, config: Config, processes):
    """Yields the next id of each of the texts `rows`: a list of int, -1 where a text has ended."""
    end, window = tokenizer.END_OF_TEXT_ID, model.config.block_size
    generators = [
        torch.Generator(device=processes.device).manual_seed(config.seed + row) for row in rows
    ]
    idx = torch.tensor([prompt] * len(rows), device=processes.device)
    ended = [False] * len(rows)
    with processes.autocast():
        for new in model.stream(
            idx,
            config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k or None,
            top_p=config.top_p if config.top_p < 1 else None,
            generator=generators,
            stop=end if config.stop else None,
            slide=config.slide or max(1, window // 4),
        ):
            ids = new[:, 0].tolist()
            ended = [was or (config.stop and id == end) for was, id in zip(ended, ids)]
            yield [-1 if over else id for over, id in zip(ended, ids)]


class Decoder:
    """Ids to text as they come: a character is given out when its last byte is there."""

    def __init__(self):
        self.token_bytes = tokenizer.get_encoding().decode_single_token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, ids: list[int], last: bool = False) -> str:
        return self.decoder.decode(b"".join(map(self.token_bytes, ids)), last)


def write_texts(model, name: str, prompt: list[int], config: Config, processes) -> int:
    """Writes the texts of one model to standard output; returns how many tokens were made."""
    from tqdm import tqdm

    made, size = 0, 1 if config.stream else BATCH
    several = len(config.models) > 1 or config.num > 1
    total = config.num * config.max_new_tokens
    hidden = True if config.stream else None  # None: unless standard error is a terminal
    with tqdm(total=total, unit=" tokens", desc=name, leave=False, disable=hidden) as bar:
        for first in range(0, config.num, size):
            rows = range(first, min(first + size, config.num))
            texts, decoders = [[] for _ in rows], [Decoder() for _ in rows]
            if config.stream:
                write(heading(name, first, config) if several else "", decoders[0](prompt))
            for ids in streams(model, prompt, rows, config, processes):
                alive = [(i, id) for i, id in enumerate(ids) if id >= 0]
                made += len(alive)
                bar.update(len(alive))
                for i, id in alive:
                    texts[i].append(id)
                    if config.stream:
                        write(decoders[0]([id]))
            if config.stream:
                write(decoders[0]([], last=True), "\n\n" if several else "\n")
                continue
            bar.clear()
            for row, ids, decoder in zip(rows, texts, decoders):
                text = decoder(prompt + ids, last=True)
                if several:
                    write(heading(name, row, config), text, "\n\n")
                else:
                    write(text, "\n")
    return made


def heading(name: str, row: int, config: Config) -> str:
    """The line above a text."""
    number = f", text {row + 1} of {config.num}" if config.num > 1 else ""
    return f"--- {name}{number}\n"


def write(*parts: str) -> None:
    """Writes to standard output at once."""
    sys.stdout.write("".join(parts))
    sys.stdout.flush()


def main() -> int:
    config = cli.parse(Config, {}, sys.argv[1:], "Text from GPT-2 models.")
    check(config)
    prompt = encode_prompt(config)
    found = find_models(config, prompt)
    device = train_gpt2.pick_device(config.device, 0)
    dtype = train_gpt2.pick_dtype(config.dtype, device)
    processes = train_gpt2.Processes(0, 1, device, dtype)
    train_gpt2.keep_freed_memory()
    kind = str(dtype).removeprefix("torch.") + (", weights in int8" if config.int8 else "")
    for name, directory in found:
        model = load(directory, config, device)
        print(f"{name}: {device.type} in {kind}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        made = write_texts(model, name, prompt, config, processes)
        seconds = time.perf_counter() - start
        print(
            f"{name}: {made:,} tokens in {seconds:.1f} s, {made / seconds:,.0f} tokens/s",
            file=sys.stderr,
            flush=True,
        )
    return 0


if __name__ == "__main__":
    run_main(main)
