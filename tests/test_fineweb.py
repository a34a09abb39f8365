"""fineweb.py writes the shards of a plain loop over the documents.

Runs in processes of their own are compared with the oracle byte for byte: every kind of source,
hostile text, any number of workers, any start method, both engines, any size of shards.
"""

import base64
import gzip
import hashlib
import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from conftest import requires
from fineweb_helpers import (
    ENCODING,
    FORTY,
    HOSTILE,
    INVALID,
    SHARD,
    SMALL_PIECES,
    Corpus,
    corpus_of,
    in_order,
    manifest_of,
    no_leftovers,
    run_command,
    shards_in,
    shards_of,
    some_words,
    times_in,
    tokens_of,
    write_jsonl,
    write_parquet,
    write_txt,
)

from support import tokenizer
from support.shards import find_intact, open_splits

pytest_plugins = ["fineweb_helpers"]
ENGINES = [pytest.param("gigatoken", marks=requires("gigatoken")), "tiktoken"]

# -------------------------------------------------------------------------------------------------
# The command

VARIANTS = {
    "the script itself": dict(workers=0),
    "two workers, spawn": dict(workers=2, method="spawn", changes=SMALL_PIECES),
    "five workers, fork": dict(workers=5, method="fork", changes=SMALL_PIECES),
    "two workers, forkserver": dict(workers=2, method="forkserver", changes=SMALL_PIECES),
    "tiktoken": dict(engine="tiktoken", method="fork", changes={"support.text_files.PIECE": 64}),
}


@pytest.fixture(scope="module")
def finished(mixed, tmp_path_factory) -> Path:
    """The directory made by the script itself."""
    out = tmp_path_factory.mktemp("finished") / "shards"
    done = run_command(mixed.path, out, shard_size=SHARD, **VARIANTS["the script itself"])
    (out.parent / "output").write_text(json.dumps([done.stdout, done.stderr]))
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shards_are_those_of_the_plain_loop(mixed, finished, tmp_path, variant):
    """For all kinds of files, numbers of workers, start methods and engines."""
    out = tmp_path / "shards"
    if variant == "the script itself":
        out = finished
    else:
        run_command(mixed.path, out, shard_size=SHARD, **VARIANTS[variant])
    assert shards_in(out) == mixed.shards(SHARD)
    assert no_leftovers(out)


def test_the_manifest_and_the_last_line_have_the_totals(mixed, finished):
    manifest, contents = manifest_of(finished), shards_in(finished)
    stdout, stderr = json.loads((finished.parent / "output").read_text())
    total = len(mixed.tokens)
    assert manifest["totals"] == mixed.totals | {"val_tokens": SHARD, "train_tokens": total - SHARD}
    ids = sum(len(ENCODING.encode_ordinary(text)) for text in mixed.texts)
    assert total == ids + mixed.totals["documents"]
    assert [source["file"] for source in manifest["sources"]] == mixed.files
    assert [shard["file"] for shard in manifest["shards"]] == list(
        sorted(contents, key=lambda name: name.split("_")[-1])
    )
    for shard in manifest["shards"]:
        data = contents[shard["file"]]
        assert shard["bytes"] == len(data) and shard["split"] in shard["file"]
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        assert shard["tokens"] == len(np.load(io.BytesIO(data)))
    assert manifest["tokenizer"]["sha256"] == tokenizer.RANKS_SHA256
    last = stdout.splitlines()[-1]
    for number in (len(contents), total, SHARD, *mixed.totals.values()):
        assert f"{number:,} " in last, last
    assert "needs about" in stderr and "are free" in stderr
    assert "left out" in stderr and "README.md" in stderr and ".hidden" not in stderr


def test_the_trainer_reads_the_stream(mixed, finished):
    train, val = open_splits(str(finished)).values()
    assert np.array_equal(val.read(0, len(val)), mixed.tokens[:SHARD])
    assert np.array_equal(train.read(0, len(train)), mixed.tokens[SHARD:])
    assert all(find_intact(finished, manifest_of(finished)["shards"]))


def test_a_finished_directory_does_not_change(mixed, finished):
    before = times_in(finished), shards_in(finished), manifest_of(finished)
    done = run_command(mixed.path, finished, shard_size=SHARD, workers=3)
    assert "finished already" in done.stdout and f"{len(mixed.tokens):,} tokens" in done.stdout
    assert (times_in(finished), shards_in(finished), manifest_of(finished)) == before


# -------------------------------------------------------------------------------------------------
# Sources


def test_documents_between_separators(tmp_path, run_here):
    """Typed with \\n for a line end; two separators in a row have no document between them."""
    documents = ["one", "\ntwo\n", "three --", "fünf"]
    text = "\n--\n--\n".join(["", documents[0], "", *documents[1:], "", ""])
    (tmp_path / "a.txt").write_text(text, newline="")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    tokens = tokens_of(documents * 2)
    run_here(tmp_path, tmp_path / "out", separator=r"\n--\n--\n", shard_size=7)
    assert shards_in(tmp_path / "out") == shards_of(tokens, 7)
    assert manifest_of(tmp_path / "out")["totals"]["documents"] == 8


def test_a_glob_that_matches_the_shards_can_run_again(tmp_path, text_file, run_here):
    """Its manifest and shards are not sources."""
    arguments = f"{tmp_path}/**", tmp_path / "out"
    run_here(*arguments)
    assert "finished already" in run_here(*arguments).stdout


def test_invalid_utf_8_in_a_separator_and_in_a_file_name(tmp_path, run_here):
    """A separator of any bytes separates; a file with any name is read."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"one\xfftwo\xff\xff")
    run_here(tmp_path / "in", tmp_path / "out", separator=os.fsdecode(b"\xff"))
    assert np.array_equal(in_order(tmp_path / "out"), tokens_of(["one", "two"]))
    (tmp_path / "in" / os.fsdecode(b"caf\xe9.txt")).write_text("three")
    for _ in range(2):
        run_here(tmp_path / "in", tmp_path / "other")
        assert np.array_equal(
            in_order(tmp_path / "other"), tokens_of(["one\ufffdtwo\ufffd\ufffd", "three"])
        )


def test_a_mistyped_path_is_not_searched_on_the_hub(tmp_path, run_here):
    failed = run_here("nowhere/my.txt", tmp_path / "out", code=2)
    assert "no such file" in failed.stderr and not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------
# The two engines


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Corpus:
    """Hostile texts in all kinds of files."""
    directory, choose = tmp_path_factory.mktemp("hostile"), random.Random(0)
    letters = "".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=100_000))
    documents = [document.encode() for document in HOSTILE] + [letters.encode(), *INVALID]
    write_jsonl(directory / "a.jsonl", documents)
    write_parquet(directory / "b.parquet", documents)
    held = {"a.jsonl": documents, "b.parquet": documents}
    for number, document in enumerate(documents):
        held[f"c{number:02d}.txt"] = [document]
        write_txt(directory / f"c{number:02d}.txt", document)
    return corpus_of(directory, held)


@pytest.mark.parametrize("engine", ENGINES)
def test_hostile_text(hostile, tmp_path, engine, run_here):
    run_here(hostile.path, tmp_path / "out", engine=engine, shard_size=20_000)
    assert shards_in(tmp_path / "out") == hostile.shards(20_000)
    totals = manifest_of(tmp_path / "out")["totals"]
    assert {name: totals[name] for name in hostile.totals} == hostile.totals


@requires("gigatoken")
@pytest.mark.parametrize("step", [64, pytest.param(1, marks=pytest.mark.faults)])
def test_both_engines_classify_every_character_equally(tmp_path, monkeypatch, step):
    """Letter, digit or neither, for all code points; of the CJK extensions and the unassigned and
    private planes after them (from U+20000 on) one in 64 by default.

    Shown with ranks made for it: all single bytes, and of the pairs those of "a", "1" or "." and
    another byte. They join exactly where the pre-tokenizer leaves the two characters together.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for first in b"a1.":
        for second in range(256):
            ranks.setdefault(bytes([first, second]), len(ranks))
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (tmp_path / "pairs.tiktoken").write_bytes(b"".join(lines))
    pairs = tiktoken.Encoding(
        "pairs", pat_str=tokenizer.PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    monkeypatch.setattr(tokenizer, "RANKS", tmp_path / "pairs.tiktoken")
    monkeypatch.setattr(tokenizer, "get_encoding", lambda: pairs)
    plain, fast = map(tokenizer.get_encoder, ("tiktoken", "gigatoken"))
    for character, first in ("é", "a"), ("٣", "1"), ("—", "."):
        joined = [len(plain(other + character)) < 1 + len(character.encode()) for other in "a1."]
        assert joined == [other == first for other in "a1."], "these ranks do not distinguish them"
    # Characters that go to tiktoken with both engines are compared apart from the others.
    groups = {True: [], False: []}
    later = range(0x20000, 0x110000, step)
    for character in map(chr, [*range(0xD800), *range(0xE000, 0x20000), *later]):
        groups[bool(tokenizer.UNICODE_17.search(character.encode()))].append(character)
    for characters in groups.values():
        for start in range(0, len(characters), 4096):
            part = characters[start : start + 4096]
            text = "".join(f"a{c}1{c}.{c}" for c in part)
            assert np.array_equal(fast(text), plain(text)), f"one of {part[0]}..{part[-1]}"


@requires("gigatoken")
def test_resetting_the_cache_of_words_changes_no_ids(monkeypatch):
    """gigatoken's cache is discarded from time to time, so that it does not grow without limit."""
    import gigatoken

    made, make = [], gigatoken.Tokenizer.from_tiktoken
    monkeypatch.setattr(tokenizer, "CACHE_RESET_BYTES", 2000)
    monkeypatch.setattr(
        gigatoken.Tokenizer, "from_tiktoken", lambda *arguments: made.append(1) or make(*arguments)
    )
    encode, choose = tokenizer.get_encoder("gigatoken"), random.Random(1)
    for _ in range(200):
        text = choose.choice([some_words(choose), *HOSTILE])
        assert encode(text).tolist() == ENCODING.encode_ordinary(text)
    assert len(made) > 5


@pytest.mark.parametrize("engine", ENGINES)
def test_a_million_spaces_before_a_word(engine):
    """More than tiktoken's regex can match at once; the last space belongs to the word."""
    many = 1_200_000
    for ending in ("a", "\u088fa"):  # the second goes to tiktoken with both engines
        ids = tokenizer.get_encoder(engine)("b" + " " * many + ending + " " * 3)
        plain = ENCODING.encode_ordinary(" " + ending + " " * 3)
        assert ids.tolist() == ENCODING.encode_ordinary("b") + [220] * (many - 1) + plain


FAKES = {
    "missing": "raise ImportError('no wheel for this machine')",
    "wrong": "import numpy\n"
    "class Tokenizer:\n"
    "    from_tiktoken = classmethod(lambda cls, *_: cls())\n"
    "    encode = lambda self, data: numpy.zeros(len(data), dtype='uint32')",
}


@pytest.mark.parametrize("fake", FAKES)
def test_an_engine_that_is_missing_or_wrong(text_file, tmp_path, fake):
    """It is named, whether missing or with other ids than tiktoken's; "auto" needs none."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "gigatoken.py").write_text(FAKES[fake])
    env, out = {"PYTHONPATH": str(tmp_path / "modules")}, tmp_path / "out"
    failed = run_command(text_file, out, code=2, env=env, engine="gigatoken")
    assert "--engine=tiktoken" in failed.stderr and "gigatoken" in failed.stderr
    assert not shards_in(out)
    engine = "auto" if fake == "missing" else "tiktoken"
    run_command(text_file, out, env=env, engine=engine)
    assert shards_in(out) == shards_of(tokens_of([text_file.read_text(encoding="utf-8")]), 10**8)


# -------------------------------------------------------------------------------------------------
# Shard sizes


@pytest.mark.parametrize(
    "shard_size, val_tokens",
    [
        (1, 0),  # a token each
        (7, 0),  # documents longer than a shard, a last shard of 5
        (8, 0),  # an exact multiple
        (20, 0),  # exactly two shards, which need no other split
        (21, 0),  # a tenth is val, the rest two shards
        (40, 0),  # one shard exactly
        (10**8, 0),
        (9, 1),
        (13, 13),
        (100, 39),
        (100, 22),
    ],
)
def test_shard_sizes(forty, tmp_path, shard_size, val_tokens, run_here):
    assert len(FORTY) == 40
    sizes = dict(shard_size=shard_size, val_tokens=val_tokens)
    run_here(forty, tmp_path / "out", **sizes)
    assert shards_in(tmp_path / "out") == shards_of(FORTY, **sizes)
    train, val = open_splits(str(tmp_path / "out")).values()
    assert len(train) + len(val) == 40 and len(train) and len(val)


@pytest.mark.parametrize("text, val_tokens", [("", 0), ("a b c", 4), ("a b c", 100)])
def test_a_text_that_leaves_nothing_to_train_on(tmp_path, text, val_tokens, run_here):
    (tmp_path / "a.txt").write_text(text)
    for _ in range(2):
        failed = run_here(tmp_path, tmp_path / "out", code=2, val_tokens=val_tokens)
        assert f"only {len(tokens_of([text]))} tokens" in failed.stderr
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock_00000"]


def test_the_smallest_text_with_both_splits(tmp_path, run_here):
    (tmp_path / "a.txt").write_text("a")
    run_here(tmp_path, tmp_path / "out")
    assert shards_in(tmp_path / "out") == shards_of(np.array([50256, 64], dtype=np.uint16), 1)
