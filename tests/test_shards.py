"""Reading shards: streams of tokens, the permutation, files of all kinds, and errors."""

import errno
import io
import json
import mmap
import os
import pickle
import random
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from support import tokenizer
from support.errors import SettingError, UserError
from support.files import sha256
from support.shards import (
    MAPPED,
    TokenStream,
    check_lengths,
    find_data,
    open_shard,
    open_splits,
    permute,
    verify_shards,
)


def stream_of(*sizes) -> TokenStream:
    """Shards of these sizes with the tokens 0, 1, 2, ...: a window is known by its first token."""
    tokens = np.arange(sum(sizes), dtype=np.uint16)
    shards = np.split(tokens, np.cumsum(sizes)[:-1])
    return TokenStream(shards, [f"shard_{i}" for i in range(len(sizes))])


def write_npy(path: Path, tokens) -> None:
    np.save(path, np.asarray(tokens, dtype=np.uint16))


def write_bin(path: Path, tokens, magic: int = 20240520, version: int = 1) -> None:
    """A shard as llm.c writes it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def test_reading_any_range_and_naming_any_token():
    """TokenStream is the concatenation, whatever the shards, empty ones included."""
    tokens = stream_of(0, 3, 0, 0, 4, 1, 0)
    names = ["shard_1"] * 3 + ["shard_4"] * 4 + ["shard_5"]
    assert len(tokens) == 8 and [tokens.names[tokens._shard_of(i)] for i in range(8)] == names
    for start in range(8):
        for stop in range(start + 1, 9):
            assert tokens.read(start, stop).tolist() == list(range(start, stop))


# -------------------------------------------------------------------------------------------------
# The permutation


@pytest.mark.parametrize("n", [1, 2, 3, 5, 31, 32, 33, 1000, 4097])
def test_permute_is_a_bijection(n):
    """Deterministic, and the same however the indices come: together, apart, out of order."""
    for seed, epoch in ((0, 0), (1337, 0), (1337, 3), (2**63, 10**6)):
        index = np.arange(n)
        result = permute(index, n, seed, epoch)
        assert np.array_equal(np.sort(result), index)
        assert np.array_equal(result[::-1], permute(index[::-1], n, seed, epoch))
        assert np.array_equal(result[-1:], permute(index[-1:], n, seed, epoch))
        assert np.array_equal(index, np.arange(n)), "the argument was changed"


def test_permute_is_the_one_that_runs_were_started_with():
    """These lines may never change: a resumed run would see some windows twice, others never."""
    first = permute(np.arange(10), 10, 1337, 0).tolist()
    assert first == [6, 2, 4, 1, 3, 5, 8, 7, 9, 0]
    assert permute(np.arange(10), 10, 1337, 1).tolist() == [4, 0, 7, 9, 2, 6, 3, 5, 8, 1]
    large = permute(np.arange(3), 10**12, 1337, 0).tolist()
    assert large == [346300216821, 882486718721, 764376946639]


def test_permute_looks_random():
    """Displacement, fixed points, neighbours and ascents as of a random order of 10,000."""
    n = 10_000
    index = np.arange(n)
    orders = [permute(index, n, seed, epoch) for seed in (0, 1337) for epoch in (0, 1)]
    for order in orders:
        assert abs(np.abs(order - index).mean() / n - 1 / 3) < 0.01  # sigma 0.0024
        assert (order == index).sum() < 8  # Poisson, mean 1
        assert abs(np.corrcoef(order, index)[0, 1]) < 0.04  # sigma 0.01
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.04
        assert abs(np.corrcoef(order[100:], order[:-100])[0, 1]) < 0.04
        assert abs((order[1:] > order[:-1]).mean() - 0.5) < 0.015  # sigma 0.003
        odd = (order % 2)[: n // 2].mean()
        assert abs(odd - 0.5) < 0.03  # sigma 0.007
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 8
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.04


def test_permute_gives_every_order_of_three_equally_often():
    orders = [tuple(permute(np.arange(3), 3, seed, e)) for seed in range(60) for e in range(10)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and max(abs(count - 100) for count in counts) < 40  # sigma 9


def test_permute_takes_no_memory_for_a_large_range():
    n = 10**12
    index = np.arange(n - 1000, n)
    tracemalloc.start()
    result = permute(index, n, 1337, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert result.min() >= 0 and result.max() < n and len(set(result.tolist())) == 1000
    assert abs(result.mean() / n - 0.5) < 0.05  # sigma 0.009


# -------------------------------------------------------------------------------------------------
# Files


def test_npy_bin_and_txt_are_the_same_stream(tmp_path, text_file):
    """The same tokens in three formats, cut into shards anywhere: equal fingerprints and steps.

    The last tenth of a text's tokens is validation.
    """
    from train_gpt2 import DataLoaderLite

    ids = tokenizer.get_encoding().encode_ordinary(text_file.read_text(encoding="utf-8"))
    cut = len(ids) * 9 // 10
    for name, writer, at in (("npy", write_npy, 1000), ("bin", write_bin, 333)):
        directory = tmp_path / name
        directory.mkdir()
        writer(directory / f"x_train_000002.{name}", ids[at:cut])
        writer(directory / f"x_train_000001.{name}", ids[:at])
        writer(directory / f"x_val_000000.{name}", ids[cut:])
        (directory / "train_notes.md").write_text("no shard")
    opened = [open_splits(str(tmp_path / name)) for name in ("npy", "bin", "text.txt")]
    splits = [(streams["train"], streams["val"]) for streams in opened]
    for train, val in splits:
        assert train.read(0, len(train)).tolist() == ids[:cut]
        assert val.read(0, len(val)).tolist() == ids[cut:]
    assert len({train.fingerprint for train, _ in splits}) == 1
    assert len({val.fingerprint for _, val in splits}) == 1
    assert splits[0][0].fingerprint != splits[0][1].fingerprint
    batches = [DataLoaderLite(train, 4, 16, shuffle=True).next_step() for train, _ in splits]
    for x, y, _ in batches:
        assert x.equal(batches[0][0]) and y.equal(batches[0][1])


@pytest.mark.parametrize("size", [1, 2, 1023, 1025, 3001, 200_003])
def test_the_fingerprint_notices_any_other_token(size):
    """Of a stream this short, whatever its shards: each token counts, and the length."""
    tokens = np.arange(size).astype(np.uint16)
    fingerprint = TokenStream([tokens], ["one"]).fingerprint
    assert TokenStream([tokens[: size // 3], tokens[size // 3 :]], ["a", "b"]).fingerprint == (
        fingerprint
    )
    rng, others = random.Random(2), [np.append(tokens, tokens[-1]), tokens[:-1]]
    for at in {0, size - 1, size // 2, *(rng.randrange(size) for _ in range(20))}:
        others.append(tokens.copy())
        others[-1][at] ^= 1
    assert fingerprint not in [TokenStream([other], ["one"]).fingerprint for other in others]


def test_shards_come_in_the_order_of_their_names(tmp_path):
    for i in (10, 2, 0, 1):
        write_npy(tmp_path / f"x_train_{i:06d}.npy", [i])
    write_bin(tmp_path / "x_train_000011.bin", [11])
    write_npy(tmp_path / "x_val_000000.npy", [99])
    train, val = open_splits(str(tmp_path)).values()
    assert train.read(0, 5).tolist() == [0, 1, 2, 10, 11] and val.read(0, 1).tolist() == [99]
    assert train.names[train._shard_of(3)] == str(tmp_path / "x_train_000010.npy")


def test_shards_of_any_size_from_files(tmp_path):
    """An empty shard of each format among short ones: every range is read correctly."""
    at = 0
    for i, (size, suffix) in enumerate(
        [(5, "npy"), (0, "npy"), (2, "bin"), (0, "bin"), (30, "bin")]
    ):
        writer = write_npy if suffix == "npy" else write_bin
        writer(tmp_path / f"x_train_{i}.{suffix}", np.arange(at, at + size))
        at += size
    write_npy(tmp_path / "x_val_0.npy", np.arange(9))
    train = open_splits(str(tmp_path))["train"]
    assert len(train) == 37
    for start in range(37):
        for stop in range(start + 1, 38):
            assert train.read(start, stop).tolist() == list(range(start, stop))


def test_shards_are_mapped_and_not_read(tmp_path):
    write_npy(tmp_path / "a.npy", np.arange(10))
    write_bin(tmp_path / "a.bin", np.arange(10))
    for name in ("a.npy", "a.bin"):
        tokens = open_shard(tmp_path / name)[2:9]
        assert isinstance(tokens, np.memmap) and not tokens.flags.writeable
        assert tokens.dtype == np.uint16 and tokens.tolist() == list(range(2, 9))


def test_where_files_cannot_be_mapped_they_are_read(tmp_path, monkeypatch):
    """As on some network file systems."""

    def refuse(*_, **__):
        raise OSError(errno.ENODEV, "No such device")

    write_npy(tmp_path / "a_train.npy", np.arange(10))
    write_bin(tmp_path / "b_train.bin", np.arange(10, 25))
    write_npy(tmp_path / "c_val.npy", np.arange(10))
    monkeypatch.setattr(mmap, "mmap", refuse)
    tokens = open_splits(str(tmp_path))["train"].read(3, 22)
    assert tokens.dtype == np.uint16 and tokens.tolist() == list(range(3, 22))


def test_more_shards_than_files_may_be_open(tmp_path):
    """1,100 shards with `ulimit -n 1024`, at a smaller scale."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))
    count = MAPPED + 100
    for number in range(count):
        write_npy(tmp_path / f"train_{number:04d}.npy", np.arange(10))
    write_npy(tmp_path / "val.npy", np.arange(10))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + MAPPED + 20, hard))
    try:
        tokens = open_splits(str(tmp_path))["train"]
        for start in (*range(0, len(tokens) - 11, 10), 5, len(tokens) - 12):
            window = range(start, start + 11)
            assert tokens.read(start, start + 11).tolist() == [i % 10 for i in window]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_data_is_found_from_any_directory(tmp_path, monkeypatch):
    """input.txt is in the repository; a file of that name in the working directory comes first."""
    monkeypatch.chdir(tmp_path)
    assert find_data("input.txt").samefile(ROOT / "input.txt")
    assert find_data("nowhere") == Path("nowhere")
    (tmp_path / "input.txt").write_text("mine")
    assert find_data("input.txt").read_text() == "mine"
    assert find_data(str(ROOT / "input.txt")) == ROOT / "input.txt"
    assert sum(map(len, open_splits("input.txt").values())) == 1


# -------------------------------------------------------------------------------------------------
# Errors


def npy_bytes(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npz_bytes(array) -> bytes:
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


def bin_bytes(tokens: int, promised: int, magic: int = 20240520, version: int = 1) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, promised
    return header.tobytes() + bytes(2 * tokens)


SHARD = npy_bytes(np.arange(100, dtype=np.uint16))
BAD_SHARDS = {
    "truncated.npy": SHARD[:-1],
    "header_only.npy": SHARD[:128],
    "half_a_header.npy": SHARD[:60],
    "empty.npy": b"",
    "text.npy": b"To be or not to be\n" * 20,
    "spoiled_header.npy": SHARD.replace(b"}", b" "),
    "absurd_length.npy": SHARD.replace(b"(100,), }" + 16 * b" ", b"(" + 19 * b"9" + b",), }"),
    "int32.npy": npy_bytes(np.arange(100, dtype=np.int32)),
    "int16.npy": npy_bytes(np.arange(100, dtype=np.int16)),
    "big_endian.npy": npy_bytes(np.arange(100, dtype=">u2")),
    "two_dimensions.npy": npy_bytes(np.zeros((10, 10), dtype=np.uint16)),
    "no_dimension.npy": npy_bytes(np.uint16(3)),
    "archive.npy": npz_bytes(np.arange(100, dtype=np.uint16)),
    "half_an_archive.npy": npz_bytes(np.arange(100, dtype=np.uint16))[:100],
    "truncated.bin": bin_bytes(99, promised=100),
    "too_long.bin": bin_bytes(101, promised=100),
    "negative.bin": bin_bytes(0, promised=-1),
    "half_a_token.bin": bin_bytes(100, promised=100)[:-1],
    "half_a_header.bin": bin_bytes(0, promised=0)[:1000],
    "empty.bin": b"",
    "magic.bin": bin_bytes(100, promised=100, magic=20240521),
    "version.bin": bin_bytes(100, promised=100, version=2),
    "headerless.bin": bytes(5000),  # nanoGPT's train.bin
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SHARDS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bad_shard_is_refused_by_name(tmp_path, split, name):
    """Among good ones, in either split: one UserError with the path, before any token is read."""
    for other in ("train", "val"):
        write_npy(tmp_path / f"{other}_000.npy", np.arange(100))
    path = tmp_path / f"{split}_{name}"
    path.write_bytes(BAD_SHARDS[name])
    with pytest.raises(UserError) as error:
        open_splits(str(tmp_path))
    assert str(path) in str(error.value)


def test_a_truncated_bin_is_named_with_its_length(tmp_path):
    (tmp_path / "a.bin").write_bytes(bin_bytes(99_999, promised=100_000))
    with pytest.raises(UserError, match=r"a\.bin: .*truncated.*100,000 tokens.*make it again"):
        open_shard(tmp_path / "a.bin")


def test_a_damaged_header_is_refused_whatever_is_damaged(tmp_path):
    """500 headers with random bytes at random places: a shard, or a UserError, and nothing else."""
    rng, path, refused = random.Random(0), tmp_path / "train.npy", 0
    for _ in range(500):
        spoiled = bytearray(SHARD)
        for _ in range(rng.choice([1, 2, 5])):
            spoiled[rng.randrange(120)] = rng.randrange(256)
        path.write_bytes(spoiled)
        try:
            assert open_shard(path)[0:1].dtype == np.uint16
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert 300 < refused < 500


class Trap:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["object array", "pickle"])
def test_a_pickle_is_refused_and_not_executed(tmp_path, kind):
    sprung, path = tmp_path / "sprung", tmp_path / "train.npy"
    array = np.empty(1, dtype=object)
    array[0] = Trap(sprung)
    path.write_bytes(npy_bytes(array) if kind == "object array" else pickle.dumps(Trap(sprung)))
    with pytest.raises(UserError, match=r"train\.npy"):
        open_shard(path)
    assert not sprung.exists()
    np.load(path, allow_pickle=True)  # the trap does work
    assert sprung.exists()


BOTH_WAYS_OUT = ("python fineweb.py", "python train_gpt2.py tiny")


@pytest.mark.parametrize(
    "files, names",
    [
        (None, ("no such directory",)),
        ((), ("no shards", "'train'")),
        (("val_0.npy",), ("no shards", "'train'")),
        (("train_0.npy",), ("no shards", "'val'")),
        (("train_0.npy", "val_0.txt"), ("no shards", "'val'")),
        (("shard_0.npy",), ("no shards", "'train'")),
    ],
)
def test_missing_shards_are_refused_with_both_ways_out(tmp_path, files, names):
    directory = tmp_path / "my_tokens"
    if files is not None:
        directory.mkdir()
        for file in files:
            (directory / file).write_bytes(SHARD)
    with pytest.raises(SettingError) as error:
        open_splits(str(directory))
    for part in (f"data={str(directory)!r}", *names, *BOTH_WAYS_OUT):
        assert part in str(error.value)


def test_other_files_are_refused_by_name(tmp_path):
    """One shard instead of their directory; a text in another encoding."""
    (tmp_path / "train_0.npy").write_bytes(SHARD)
    (tmp_path / "latin.txt").write_bytes("Où êtes-vous?".encode("latin-1") * 20)
    with pytest.raises(SettingError, match=r"train_0\.npy.*neither a dir.*fineweb\.py --source"):
        open_splits(str(tmp_path / "train_0.npy"))
    with pytest.raises(SettingError, match=r"latin\.txt.*UTF-8"):
        open_splits(str(tmp_path / "latin.txt"))


@pytest.mark.parametrize("tokens, T, enough", [(9, 8, True), (8, 8, False), (1, 1, False)])
def test_a_split_needs_one_window_and_its_next_token(tokens, T, enough):
    for split, other in (("train", "val"), ("val", "train")):
        streams = {split: stream_of(tokens), other: stream_of(1000)}
        if enough:
            check_lengths("mine", streams, T)
        else:
            with pytest.raises(SettingError, match=f"'mine'.*{tokens} tokens of '{split}'"):
                check_lengths("mine", streams, T)


def test_an_empty_text_is_refused(tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("")
    with pytest.raises(SettingError, match=r"empty\.txt.*0 tokens.*'train'"):
        check_lengths(str(path), open_splits(str(path)), 8)


# -------------------------------------------------------------------------------------------------
# Verification


@pytest.fixture
def listed(tmp_path):
    """A directory of five shards with a manifest."""
    entries = []
    for i in range(5):
        path = tmp_path / f"x_{'train' if i else 'val'}_{i}.npy"
        write_npy(path, np.arange(10 + i))
        entry = {"file": path.name, "split": "train" if i else "val", "tokens": 10 + i}
        entries.append(entry | {"bytes": path.stat().st_size, "sha256": sha256(path)})
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": entries}))
    return tmp_path


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_ranks_share_the_verification(listed, capsys):
    """Two ranks hash each shard once; what one of them finds makes both of them fail."""
    flip_bit(listed / "x_train_3.npy")
    parts = []

    def remember(altered):
        parts.append(altered)
        return [[]]

    for rank in range(2):
        verify_shards(str(listed), rank, 2, remember)
    assert parts == [[], ["x_train_3.npy"]]
    assert "verified 5 shards" in capsys.readouterr().out
    for rank in range(2):
        with pytest.raises(SettingError, match=r"x_train_3\.npy: altered .*fineweb\.py"):
            verify_shards(str(listed), rank, 2, lambda altered: parts)


def test_the_first_altered_shard_is_named(listed):
    for name in ("x_train_4.npy", "x_train_1.npy"):
        flip_bit(listed / name)
    with pytest.raises(SettingError, match=r"x_train_1\.npy"):
        verify_shards(str(listed), 0, 1, lambda altered: [altered])


def test_nothing_is_verified_without_a_manifest(listed, capsys):
    (listed / "manifest.json").unlink()
    flip_bit(listed / "x_train_1.npy")
    for data in (str(listed), "input.txt", "nowhere"):
        verify_shards(data, 0, 1, lambda altered: [altered])
    assert capsys.readouterr().out == ""


def test_what_macos_leaves_beside_a_shard_is_not_one(tmp_path):
    for name in ("x_train_0.npy", "x_val_0.npy"):
        write_npy(tmp_path / name, np.arange(10))
        (tmp_path / f"._{name}").write_bytes(b"\0\5\x16\7" + bytes(100))
    assert {split: len(s) for split, s in open_splits(str(tmp_path)).items()} == dict(
        train=10, val=10
    )
