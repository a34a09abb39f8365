"""GPT-2's tokenizer from the bundled ranks; nothing is downloaded.

`gpt2.tiktoken` holds OpenAI's byte-pair ranks (MIT, see gpt2.tiktoken.LICENSE): on each line one
token in base64 and its rank. The ids equal those of `tiktoken.get_encoding("gpt2")` for any text.
"""

import base64
import functools
import hashlib
import json
import re
from pathlib import Path

import numpy as np

from support.errors import UserError

RANKS = Path(__file__).resolve().parent / "gpt2.tiktoken"
# The hash that tiktoken publishes for these ranks (tiktoken_ext/openai_public.py, r50k_base).
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# GPT-2's pre-tokenizer, in the equivalent form that tiktoken publishes as r50k_pat_str.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 50256
VOCAB_SIZE = 50257  # 256 bytes + 50,000 merges + <|endoftext|>


@functools.cache
def load_ranks() -> dict[bytes, int]:
    """{token: rank}, 50,256 by rank. Raises UserError if the file is missing or altered."""
    try:
        raw = RANKS.read_bytes()
    except OSError as error:
        raise UserError(f"{RANKS}: {error.strerror}; restore it from the repository") from None
    if hashlib.sha256(raw).hexdigest() != RANKS_SHA256:
        raise UserError(f"{RANKS}: not the GPT-2 ranks (SHA-256); restore it from the repository")
    pairs = (line.split() for line in raw.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


@functools.cache
def byte_lengths() -> np.ndarray:
    """Bytes of text that each token stands for: int64 (50257,); 0 for <|endoftext|>."""
    return np.array([*map(len, load_ranks()), 0], dtype=np.int64)


def count_bytes(ids) -> int:
    """Bytes of text that token ids stand for, special tokens and negative ids excluded."""
    ids = np.asarray(ids)
    return int(byte_lengths()[ids[ids >= 0]].sum())


@functools.cache
def get_encoding():
    """The `tiktoken.Encoding` of GPT-2: `encode_ordinary(text)`, `decode(ids)`, `eot_token`."""
    import tiktoken

    return tiktoken.Encoding(
        "gpt2",
        pat_str=PATTERN,
        mergeable_ranks=load_ranks(),
        special_tokens={END_OF_TEXT: END_OF_TEXT_ID},
        explicit_n_vocab=VOCAB_SIZE,
    )


# gigatoken knows the letters and digits of Unicode 17, tiktoken those of an earlier version. This
# matches the first bytes, in UTF-8, of all characters that the two classify differently.
UNICODE_17 = re.compile(rb"\xe0[\xa2\xb1\xb3]|\xea\x9f|\xf0[\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3]")
UNICODE_17_BYTES = (0xE0, 0xEA, 0xF0)  # searched for first, which takes a tenth of the time
CACHE_RESET_BYTES = 1 << 30  # bytes of text after which gigatoken's cache of words is discarded


def valid_text(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot encode, as U+FFFD: the rule of tiktoken."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode_plain(text: str) -> np.ndarray:
    """tiktoken's ids of any text, uint32 (tokens,); a literal <|endoftext|> is ordinary text."""
    encode = functools.partial(get_encoding().encode_to_numpy, disallowed_special=())
    try:
        return encode(text)
    except ValueError:  # tiktoken fails on a word after about a million white-space characters
        # All but the last of these are one token, at the end of a text as well as before a word.
        # Each run of them is tried once: from its start, and without giving up a part of it.
        run = r"(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{10000,}+(?=[\S\x1c-\x1f])"
        spaces = re.finditer(run, text)
        cuts = [0, *(match.end() - 1 for match in spaces), len(text)]
        return np.concatenate([encode(text[start:stop]) for start, stop in zip(cuts, cuts[1:])])


def get_encoder(engine: str = "auto"):
    """A function from a `valid_text` to its ids, uint32 (tokens,), equal to `encode_plain`.

    engine: "tiktoken"; "gigatoken", which is several times faster; "auto": gigatoken if installed
    Raises UserError if the engine is "gigatoken" and it is not installed.
    """
    if engine == "tiktoken":
        return encode_plain
    try:
        from gigatoken import Tokenizer
    except ImportError as error:
        if engine == "auto":
            return encode_plain
        raise UserError(
            f"engine={engine!r}: not installed ({error}); pip install gigatoken, or use "
            "--engine=tiktoken"
        ) from None
    fast, size = Tokenizer.from_tiktoken(RANKS, "gpt2", {}), 0  # size: bytes of text so far

    def encode(text: str):
        nonlocal fast, size
        data = text.encode()
        if any(byte in data for byte in UNICODE_17_BYTES) and UNICODE_17.search(data):
            return encode_plain(text)
        size += len(data)
        if size > CACHE_RESET_BYTES:
            fast, size = Tokenizer.from_tiktoken(RANKS, "gpt2", {}), 0
        return fast.encode(data)

    return encode


def save_tokenizer(directory: Path, model_max_length: int = 1024) -> None:
    """Writes the files from which `AutoTokenizer`, vLLM and llama.cpp's converter read GPT-2's BPE.

    model_max_length: the model's context, in tokens
    """
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    files = _vocabulary_files() | {"tokenizer_config.json": json.dumps(config, indent=2)}
    for name, text in files.items():
        (Path(directory) / name).write_text(text, encoding="utf-8", newline="\n")


@functools.cache
def load_vocabulary() -> dict[str, int]:
    """{token as `vocab.json` spells it: id}, in the order of the ids: 50,257 tokens."""
    ranks = load_ranks()
    # The printable character that represents each byte. The first 256 ranks are the bytes: 188 that
    # represent themselves, and the others, which U+0100 to U+0143 represent.
    bytes_by_rank = [token[0] for token in ranks if len(token) == 1]
    letters = {byte: chr(byte if i < 188 else i + 68) for i, byte in enumerate(bytes_by_rank)}
    spelled = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    return spelled | {END_OF_TEXT: END_OF_TEXT_ID}


def validate_vocabulary(directory: Path) -> None:
    """Raises UserError if a model's directory has another vocabulary than GPT-2's.

    Tokens that were added after GPT-2's are accepted, and are not used.
    """
    for path in (directory / "vocab.json", directory / "tokenizer.json"):
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            vocab = content["model"]["vocab"] if path.name == "tokenizer.json" else content
            found = {token: id for token, id in vocab.items() if id < VOCAB_SIZE}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            found = {}
        if {END_OF_TEXT: END_OF_TEXT_ID} | found != load_vocabulary():
            raise UserError(
                f"{path}: not GPT-2's vocabulary, or damaged; only models with GPT-2's tokenizer "
                "are supported, which may have more tokens at its end"
            )


@functools.cache
def _vocabulary_files() -> dict[str, str]:
    """The texts of `tokenizer.json`, `vocab.json` and `merges.txt`."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer

    ranks, vocab = load_ranks(), load_vocabulary()
    spell = dict(zip(ranks, vocab))
    merges = [_split_into_merge(token, ranks) for token in ranks if len(token) > 1]
    merges = [(spell[a], spell[b]) for a, b in merges]
    fast = ByteLevelBPETokenizer(vocab, merges)
    fast.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return {
        "tokenizer.json": fast.to_str(),
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
    }


def _split_into_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The pair whose merge makes `token`: what byte-pair encoding leaves before the last merge."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
