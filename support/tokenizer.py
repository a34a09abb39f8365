"""GPT-2's tokenizer from the bundled ranks: nothing is ever downloaded.

`gpt2.tiktoken` holds OpenAI's byte-pair ranks (MIT, see gpt2.tiktoken.LICENSE), one base64 token
and its rank a line. The ids are those of `tiktoken.get_encoding("gpt2")` on every string.
"""

import base64
import functools
import hashlib
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
    """The 50,256 tokens and their ranks, from `gpt2.tiktoken`, whose SHA-256 is checked."""
    try:
        raw = RANKS.read_bytes()
    except OSError as error:
        raise UserError(f"{RANKS}: {error.strerror}; restore it from the repository") from None
    if hashlib.sha256(raw).hexdigest() != RANKS_SHA256:
        raise UserError(f"{RANKS}: not the GPT-2 ranks (SHA-256); restore it from the repository")
    return {
        base64.b64decode(token): int(rank) for token, rank in map(bytes.split, raw.splitlines())
    }


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


# gigatoken knows the letters and digits of Unicode 17, tiktoken only those of an earlier edition.
# So the UTF-8 of all characters that the two sort differently begins, and first of all its byte:
UNICODE_17 = re.compile(rb"\xe0[\xa2\xb1\xb3]|\xea\x9f|\xf0[\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3]")
UNICODE_17_BYTES = (0xE0, 0xEA, 0xF0)  # looked for first, at a tenth of the cost
REMEMBERED = 1 << 30  # bytes of text after which gigatoken's cache of words is thrown away


def check_vocabulary(model: str, vocab_size: int) -> None:
    """Raises UserError where a model has too few ids for this tokenizer."""
    if vocab_size < VOCAB_SIZE:
        raise UserError(
            f"{model}: has {vocab_size:,} tokens, and GPT-2's tokenizer {VOCAB_SIZE:,}; "
            "choose another model"
        )


def valid_text(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 can hold, as U+FFFD: tiktoken's own rule."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encode_plain(text: str):
    """tiktoken's ids, uint32 (tokens,), of any text."""
    encode = functools.partial(get_encoding().encode_to_numpy, disallowed_special=())
    try:
        return encode(text)
    except ValueError:  # a word after some million characters of white space is too much for it
        # All but the last one of these are a token, at the end of a text as well as before a word.
        spaces = re.finditer(r"[^\S\x1c-\x1f]{10000,}(?=[\S\x1c-\x1f])", text)
        cuts = [0, *(match.end() - 1 for match in spaces), len(text)]
        return np.concatenate([encode(text[start:stop]) for start, stop in zip(cuts, cuts[1:])])


def get_encoder(engine: str = "auto"):
    """A function from a text to its ids, uint32 (tokens,); the literal <|endoftext|> is just text.

    engine: "tiktoken"; "gigatoken", which is several times faster and gives the same ids (what it
        would sort differently goes to tiktoken); "auto", gigatoken where it is installed
    Raises UserError where gigatoken is asked for and missing. Texts must be `valid_text`.
    """
    plain = encode_plain
    if engine == "tiktoken":
        return plain
    try:
        from gigatoken import Tokenizer
    except ImportError as error:
        if engine == "auto":
            return plain
        raise UserError(
            f"engine={engine!r}: not installed ({error}); pip install gigatoken, or take "
            "--engine=tiktoken"
        ) from None

    def encode(text: str):
        nonlocal fast, seen
        data = text.encode()
        if any(byte in data for byte in UNICODE_17_BYTES) and UNICODE_17.search(data):
            return plain(text)
        seen += len(data)
        if seen > REMEMBERED:
            fast, seen = Tokenizer.from_tiktoken(RANKS, "gpt2", {}), 0
        return fast.encode(data)

    fast, seen = Tokenizer.from_tiktoken(RANKS, "gpt2", {}), 0
    return encode


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte value, as its vocab.json spells tokens.

    Bytes that print in Latin-1 stand for themselves; the other 68 take the code points from 256 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def split_into_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The pair whose merge makes `token`: what byte-pair encoding leaves before the last merge."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


@functools.cache
def _tokenizer_files() -> dict[str, str]:
    """The texts of `tokenizer.json`, `vocab.json`, `merges.txt` and their two small companions."""
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    ranks, letters = load_ranks(), bytes_to_unicode()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {spell[token]: rank for token, rank in ranks.items()} | {END_OF_TEXT: END_OF_TEXT_ID}
    merges = [split_into_merge(token, ranks) for token in ranks if len(token) > 1]
    merges = [(spell[a], spell[b]) for a, b in merges]

    fast = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    fast.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    return {
        "tokenizer.json": fast.to_str(),
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        "special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer_config.json": json.dumps(config | special, indent=2),
    }


def save_tokenizer(directory: Path, model_max_length: int = 1024) -> None:
    """Writes the files from which `AutoTokenizer`, vLLM and llama.cpp's converter read GPT-2's BPE.

    model_max_length: the model's context, in tokens.
    """
    import json

    for name, text in _tokenizer_files().items():
        if name == "tokenizer_config.json":
            text = json.dumps(json.loads(text) | {"model_max_length": model_max_length}, indent=2)
        (Path(directory) / name).write_text(text, encoding="utf-8", newline="\n")
