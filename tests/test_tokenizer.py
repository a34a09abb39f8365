"""The bundled tokenizer is GPT-2's: tiktoken's definition, transformers' ids, no network."""

import base64
import json
import random
import re
import socket

import pytest
from conftest import ROOT
from tiktoken_ext import openai_public
from transformers import AutoTokenizer

from support import tokenizer
from support.errors import UserError

ENCODING = tokenizer.get_encoding()
CACHES = (tokenizer.load_ranks, tokenizer.get_encoding, tokenizer._vocabulary_files)


@pytest.fixture
def empty_caches():
    """For a test that reads the files again, and whose results later tests must not get."""
    for function in CACHES:
        function.cache_clear()
    yield
    for function in CACHES:
        function.cache_clear()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with what `save_tokenizer` writes."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_tokenizer(path, model_max_length=640)
    return path


@pytest.fixture(scope="module")
def auto(directory):
    """transformers' tokenizer of that directory."""
    return AutoTokenizer.from_pretrained(directory)


def random_text(pools, length=3000, seed=0) -> str:
    """Characters of random ranges, in short runs of one range each, as real text has them."""
    choose, text = random.Random(seed), []
    while len(text) < length:
        pool = choose.choice(pools)
        text += [chr(choose.choice(pool)) for _ in range(choose.randint(1, 5))]
    return "".join(text)


EVERY_PLANE = (range(0xD800), range(0xE000, 0x10000), range(0x10000, 0x110000))
SPACES_AND_MARKS = (
    range(0x00, 0x100), range(0x300, 0x370), range(0x1680, 0x1810), range(0x2000, 0x2070),
    range(0x3000, 0x3010), range(0x41, 0x5B), range(0x30, 0x3A), range(0x20, 0x21),
)  # fmt: skip
HOSTILE = {
    "empty": "",
    "play": (ROOT / "input.txt").read_text(encoding="utf-8"),
    "program": (ROOT / "train_gpt2.py").read_text(encoding="utf-8"),
    "CJK": "床前明月光,疑是地上霜。 日本語のテキスト、カタカナ。 한국어 텍스트 가나다 㐀 𠀀𪜶",
    "Arabic": "بِسْمِ اللَّهِ الرَّحْمَٰنِ ١٢٣٤ السلام عليكم\u200f؟ \u202bעברית\u202c 123",
    "emoji": "👩\u200d👩\u200d👧 👍🏽 🏳\ufe0f\u200d🌈 🇩🇪🇫🇷 ❤\ufe0fa👨\u200d💻b\u200d 1\ufe0f\u20e3",
    "combining": "e\u0301 n\u0303o Z\u0351\u036b\u0343a\u0300\u0301lgo x\u0301 \u0301 1\u0301",
    "control": "".join(map(chr, range(0x20))) + "a\x00b\x7f\x80\x85\x9f \x1b[31m\r\n\x0b\x0c\ufeff",
    "5,000 letters": random_text([range(ord("a"), ord("z") + 1)], 5000),
    "5,000 times a letter": "a" * 5000,
    "runs of spaces": "  a   b    \n  c \t\t d\n\n\n   \n f \n\r\n\r\n g\u00a0\u00a0h \u3000 i   ",
    "only spaces": " " * 300 + "\n" * 300 + "\t" * 300,
    "contractions": "I'm you're he's we'll they've I'd don't I'M YOU'RE HE'S WE'LL THEY'VE I'D"
    " 'm're's'll've'd't ''s 'tis I’m don’t a'lll b'vex c're1 's s' ' ' 'S 'Ll 'rE",
    "numbers": "1 12 123 1234567890 3.14159 1,000,000 0x1F 1e-5 ²³ ½ Ⅷ ٣ 𝟛 v2 2nd 5'6\" 007",
    "special as text": "<|endoftext|> a<|endoftext|>b <|endoftext|><|endoftext|> <|endof text|>",
    "any characters": random_text(EVERY_PLANE),
    "spaces and marks": random_text(SPACES_AND_MARKS),
}


def test_definition_is_that_of_tiktoken(monkeypatch):
    """Pattern, ranks, special token, size and expected hash are those tiktoken publishes."""
    hashes = []

    def parse_bundled(url, expected_hash):
        hashes.append(expected_hash)
        lines = (ROOT / "support" / "gpt2.tiktoken").read_text(encoding="ascii").splitlines()
        pairs = (line.split() for line in lines)
        return {base64.b64decode(token): int(rank) for token, rank in pairs}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", parse_bundled)
    published = openai_public.r50k_base()
    assert hashes == [tokenizer.RANKS_SHA256]
    assert tokenizer.PATTERN == openai_public.r50k_pat_str == published["pat_str"]
    assert tokenizer.load_ranks() == published["mergeable_ranks"]
    assert ENCODING._pat_str == published["pat_str"]
    assert ENCODING._mergeable_ranks == published["mergeable_ranks"]
    assert ENCODING._special_tokens == published["special_tokens"]
    assert ENCODING.n_vocab == published["explicit_n_vocab"] == tokenizer.VOCAB_SIZE
    assert ENCODING.eot_token == tokenizer.END_OF_TEXT_ID


@pytest.mark.parametrize("change", ["one rank", "cut off", "missing"])
def test_changed_ranks_are_refused(monkeypatch, tmp_path, empty_caches, change):
    """A file of ranks that is not GPT-2's is refused with its name."""
    raw = (ROOT / "support" / "gpt2.tiktoken").read_bytes()
    changed = tmp_path / "changed.tiktoken"
    if change == "one rank":
        changed.write_bytes(raw.replace(b" 50255\n", b" 50254\n"))
    elif change == "cut off":
        changed.write_bytes(raw[: len(raw) // 2])
    monkeypatch.setattr(tokenizer, "RANKS", changed)
    for use in (tokenizer.load_ranks, tokenizer.get_encoding):
        with pytest.raises(UserError, match=re.escape(str(changed))):
            use()


@pytest.mark.parametrize("name", HOSTILE)
def test_ids_and_text_are_those_of_transformers(auto, name):
    """Any text: AutoTokenizer gives the same ids, and both decode them to the text again."""
    text = HOSTILE[name]
    ids = ENCODING.encode_ordinary(text)
    assert auto(text, split_special_tokens=True)["input_ids"] == ids
    assert ENCODING.decode(ids) == text
    assert auto.decode(ids) == text
    assert all(0 <= i < tokenizer.END_OF_TEXT_ID for i in ids)


def test_every_id_decodes_as_in_transformers(auto):
    """Single ids, many of them an incomplete character, and <|endoftext|>."""
    ours = [ENCODING.decode([i]) for i in range(tokenizer.VOCAB_SIZE)]
    assert auto.batch_decode([[i] for i in range(tokenizer.VOCAB_SIZE)]) == ours
    assert ours[tokenizer.END_OF_TEXT_ID] == tokenizer.END_OF_TEXT


def test_known_ids():
    """The lecture's prompt has the ids of the lecture."""
    ids = [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert ENCODING.encode_ordinary("Hello, I'm a language model,") == ids


def test_special_token(auto):
    """<|endoftext|> is one id if special tokens are allowed, else ordinary characters."""
    text = "a<|endoftext|>b <|endoftext|>"
    special = ENCODING.encode(text, allowed_special={tokenizer.END_OF_TEXT})
    assert special == [64, 50256, 65, 220, 50256] == auto(text)["input_ids"]
    assert 50256 not in ENCODING.encode_ordinary(text)
    assert auto.bos_token_id == auto.eos_token_id == 50256
    assert len(auto) == tokenizer.VOCAB_SIZE


def test_old_files_alone_make_the_same_tokenizer(directory, tmp_path):
    """vocab.json and merges.txt, which other programs read, equal tokenizer.json."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    old = AutoTokenizer.from_pretrained(tmp_path)
    for text in HOSTILE.values():
        ids = old(text, split_special_tokens=True)["input_ids"]
        assert ids == ENCODING.encode_ordinary(text)


def test_files_hold_the_context_length(directory, auto):
    """AutoTokenizer reads the model's context from tokenizer_config.json."""
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["model_max_length"] == auto.model_max_length == 640


def test_nothing_is_downloaded(monkeypatch, tmp_path, empty_caches):
    """Encoding and writing the files open no connection and need no cache of tiktoken."""

    def refuse(*arguments, **_):
        raise AssertionError(f"attempt to connect: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    assert tokenizer.get_encoding().encode_ordinary("Hello") == [15496]
    tokenizer.save_tokenizer(tmp_path)
    written = {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"}
    assert written <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "empty").exists()


def test_bytes_of_tokens_are_those_of_the_text():
    """For a text in any script; <|endoftext|> stands for none, nor does an ignored target."""
    text = "naïve 日本語 🙂 \x00\t\n" * 3
    ids = tokenizer.encode_plain(text).tolist()
    assert tokenizer.count_bytes(ids) == len(text.encode())
    assert tokenizer.count_bytes([*ids, 50256, -1]) == len(text.encode())
    parts = [tokenizer.count_bytes(ids[i : i + 1]) for i in range(len(ids))]  # within characters
    assert sum(parts) == len(text.encode()) and min(parts) == 1
    every = range(50256)
    decode = tokenizer.get_encoding().decode_single_token_bytes
    assert tokenizer.byte_lengths().tolist() == [len(decode(i)) for i in every] + [0]
