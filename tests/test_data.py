"""The stream of windows: every one once, the same for any number of processes; shards; refusals."""

import functools
import io
import math
import pickle
import random
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

import train_gpt2
from support import tokenizer
from support.errors import SettingError, UserError
from train_gpt2 import (
    IGNORE,
    Config,
    DataLoaderLite,
    TokenStream,
    batch_rows,
    find_data,
    open_shard,
    open_tokens,
    permute,
    pick_B,
)

# -------------------------------------------------------------------------------------------------
# Helpers


def stream_of(*sizes) -> TokenStream:
    """Shards of these sizes with the tokens 0, 1, 2, ...: a window is known by its first token."""
    tokens = np.arange(sum(sizes), dtype=np.uint16)
    shards = np.split(tokens, np.cumsum(sizes)[:-1])
    return TokenStream(shards, [f"shard_{i}" for i in range(len(sizes))])


def windows_of(tokens: TokenStream, T: int) -> np.ndarray:
    """What the stream is to be cut into, in file order: (windows, T + 1)."""
    flat = np.concatenate([np.asarray(shard) for shard in tokens.shards]).astype(np.int64)
    return np.stack([flat[i : i + T + 1] for i in range(0, len(flat) - T, T)])


def processes_of(tokens, world: int, B: int, T: int, rows, **kwargs) -> list[DataLoaderLite]:
    """The loaders of all processes of a run; rows: of each step, or a function of the position."""
    rows_at = rows if callable(rows) else lambda position: rows
    share = dict(num_processes=world, rows_at=rows_at, **kwargs)
    return [DataLoaderLite(tokens, B, T, process_rank=rank, **share) for rank in range(world)]


def rows_in(x, y, B: int, T: int) -> np.ndarray:
    """The rows of a share that count, in order, with their last target: (rows, T + 1)."""
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (len(x), B, T)
    x, y = x.view(-1, T).numpy(), y.view(-1, T).numpy()
    padding = (y == IGNORE).all(axis=1)
    x, y = x[~padding], y[~padding]
    assert (y != IGNORE).all(), "a row is padding as a whole or not at all"
    assert np.array_equal(x[:, 1:], y[:, :-1])
    return np.concatenate((x, y[:, -1:]), axis=1)


def step_of(loaders: list[DataLoaderLite]) -> np.ndarray:
    """The rows of the next step over all processes, which must be in step with one another."""
    parts, micro_steps, totals = [], set(), set()
    for loader in loaders:
        x, y, rows = loader.next_step()
        parts.append(rows_in(x, y, loader.micro_batch(rows), loader.T))
        micro_steps.add(len(x))
        totals.add(rows)
    assert len(micro_steps) == 1, "the processes take different numbers of micro-steps"
    assert totals == {sum(map(len, parts))}
    return np.concatenate(parts)


def stretch(loaders, rows: int) -> np.ndarray:
    """The first rows of the stream, at least so many, that the steps of these processes serve."""
    steps, served = [], 0
    while served < rows:
        steps.append(step_of(loaders))
        served += len(steps[-1])
    return np.concatenate(steps)


def in_order(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(rows[:, 0])]


def write_npy(path: Path, tokens) -> None:
    np.save(path, np.asarray(tokens, dtype=np.uint16))


def write_bin(path: Path, tokens, magic: int = 20240520, version: int = 1) -> None:
    """A shard as llm.c writes it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


# -------------------------------------------------------------------------------------------------
# Every window exactly once

AWKWARD = {
    "one shard": (97,),
    "a prime number of tokens": (1009, 499),
    "exactly whole windows": (65, 64),
    "one token short of that": (65, 63),
    "shorter than a window": (3, 2, 60, 5, 1, 40),
    "shorter than a batch": (20, 17, 30, 11),
    "empty shards": (0, 50, 0, 0, 31, 0),
    "windows over three shards": (10, 3, 10, 2, 1, 30, 4),
    "one window": (9,),
}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("sizes", AWKWARD.values(), ids=AWKWARD)
def test_an_epoch_has_every_window_once(sizes, shuffle):
    """Of N tokens only the last (N - 1) mod T are never a target; a second epoch has them again."""
    T, tokens = 8, stream_of(*sizes)
    whole = windows_of(tokens, T)
    n = len(whole)
    assert n == (sum(sizes) - 1) // T
    rows = stretch(processes_of(tokens, 1, 4, T, rows=3, shuffle=shuffle), 2 * n)
    for epoch in (rows[:n], rows[n : 2 * n]):
        assert np.array_equal(in_order(epoch), whole)
        assert shuffle or np.array_equal(epoch, whole)


def test_epochs_are_in_different_orders_and_steps_may_straddle_their_end():
    """31 windows, 7 rows a step: four steps end in the next epoch, and each epoch is whole."""
    T, n = 8, 31
    tokens = stream_of(100, 149)
    rows = stretch(processes_of(tokens, 1, 7, T, rows=7, shuffle=True, seed=5), 4 * n)
    epochs = [rows[n * i : n * (i + 1), 0] // T for i in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    orders = [tuple(epoch) for epoch in epochs] + [tuple(range(n))]
    assert len(set(orders)) == 5
    other = stretch(processes_of(tokens, 1, 7, T, rows=7, shuffle=True, seed=6), n)
    assert tuple(other[:n, 0] // T) not in orders


def test_a_step_may_be_larger_than_epochs():
    tokens = stream_of(41)
    for shuffle in (False, True):
        rows = stretch(processes_of(tokens, 2, 3, 8, rows=23, shuffle=shuffle), 23)
        whole = windows_of(tokens, 8)
        for epoch in range(4):
            assert np.array_equal(in_order(rows[5 * epoch : 5 * epoch + 5]), whole)
        assert len({tuple(row) for row in rows[20:]}) == 3


def test_random_combinations_serve_the_stream():
    """B, T, processes, rows and shards at random: three epochs, all windows once in each."""
    rng = random.Random(1)
    for _ in range(150):
        T, B, world = rng.randint(1, 20), rng.randint(1, 9), rng.randint(1, 6)
        rows = rng.randint(1, 40)
        sizes = [rng.choice([0, 1, rng.randint(0, 2 * T), rng.randint(0, 300)]) for _ in range(6)]
        tokens, shuffle = stream_of(*sizes, T + 1), rng.random() < 0.5
        what = f"T={T} B={B} world={world} rows={rows} sizes={sizes} shuffle={shuffle}"
        whole = windows_of(tokens, T)
        n = len(whole)
        loaders = processes_of(tokens, world, B, T, rows, shuffle=shuffle, seed=rng.randint(0, 9))
        served = stretch(loaders, 3 * n)
        for epoch in range(3):
            one = served[n * epoch : n * (epoch + 1)]
            assert np.array_equal(in_order(one) if shuffle else one, whole), what


def test_reading_any_range_and_naming_any_token():
    """TokenStream is the concatenation, whatever the shards, empty ones included."""
    tokens = stream_of(0, 3, 0, 0, 4, 1, 0)
    names = ["shard_1"] * 3 + ["shard_4"] * 4 + ["shard_5"]
    assert len(tokens) == 8 and [tokens.name_of(i) for i in range(8)] == names
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


def test_permute_finds_every_order_of_three_alike():
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
# The same windows for any number of processes, and any B


def ramp(position: int) -> int:
    """Steps of 1, 2, 3, ... and in the end 9 rows."""
    return min(9, 1 + position // 3)


@pytest.mark.parametrize("rows", [7, 8, 13, 2, ramp], ids=["7", "8", "13", "2", "ramp"])
@pytest.mark.parametrize("B", [1, 2, 4, 7])
def test_any_number_of_processes_takes_the_same_rows_in_order(B, rows):
    """Three epochs in steps that no number of processes divides; all take as many micro-steps."""
    T, tokens = 4, stream_of(50, 3, 54)
    worlds = [processes_of(tokens, w, B, T, rows, shuffle=True, seed=3) for w in (1, 2, 3, 5, 8)]
    steps = 0
    while worlds[0][0].position < 3 * 26:
        expected = step_of(worlds[0])
        for loaders in worlds[1:]:
            assert np.array_equal(step_of(loaders), expected), f"{len(loaders)}, step {steps}"
        steps += 1
    assert len({loader.position for loaders in worlds for loader in loaders}) == 1
    # B changes how the rows are cut, and nothing else
    plain = stretch(processes_of(tokens, 1, 5, T, 1, shuffle=True, seed=3), worlds[0][0].position)
    again = stretch(processes_of(tokens, 3, B, T, rows, shuffle=True, seed=3), len(plain))
    assert np.array_equal(plain, again)


@pytest.mark.parametrize(
    "rows, world, B, micro_steps, size",
    [
        (8, 1, 4, 2, 4),
        (8, 3, 2, 2, 2),
        (8, 3, 4, 1, 4),
        (1, 8, 4, 1, 1),
        (5, 2, 7, 1, 4),
        (9, 2, 7, 1, 7),
        (9, 1, 7, 2, 7),
        (13, 5, 1, 3, 1),
        (171, 1, 57, 3, 57),
    ],
)
def test_no_more_micro_steps_than_rows_need(rows, world, B, micro_steps, size):
    loaders = processes_of(stream_of(500), world, B, 2, rows)
    shapes = {tuple(loader.next_step()[0].shape) for loader in loaders}
    assert shapes == {(micro_steps, size, 2)}
    shares = [int((loader.batch(0, rows)[1] != IGNORE).sum()) // 2 for loader in loaders]
    assert sum(shares) == rows and max(shares) - min(shares) <= 1


def test_without_rows_each_process_has_B():
    """The default of the loader, as in validation."""
    loaders = [DataLoaderLite(stream_of(100), 3, 4, rank, 2) for rank in range(2)]
    assert np.array_equal(step_of(loaders), windows_of(stream_of(25), 4))


# -------------------------------------------------------------------------------------------------
# build-nanogpt's loader


def build_nanogpt_steps(tokens: np.ndarray, B: int, T: int, world: int):
    """The (x, y) of all processes at each micro-step of build-nanogpt's loader, within a shard."""
    position, step = 0, B * T * world
    while position + step + 1 <= len(tokens):
        pairs = []
        for rank in range(world):
            start = position + B * T * rank
            buf = torch.from_numpy(tokens[start : start + B * T + 1].astype(np.int64))
            pairs.append((buf[:-1].view(B, T), buf[1:].view(B, T)))
        yield pairs
        position += step


def test_file_order_is_build_nanogpts():
    """One process: the very micro-batches, in order."""
    tokens = stream_of(1500)
    loader = processes_of(tokens, 1, 4, 8, rows=12)[0]
    micro_batches = [
        pair for pairs in build_nanogpt_steps(tokens.shards[0], 4, 8, 1) for pair in pairs
    ]
    served = 0
    while served + 3 <= len(micro_batches):
        x, y, _ = loader.next_step()
        for i in range(3):
            assert torch.equal(x[i], micro_batches[served + i][0])
            assert torch.equal(y[i], micro_batches[served + i][1])
        served += 3
    assert served == 45


@pytest.mark.parametrize("world, B, micro_steps", [(2, 3, 1), (2, 2, 3), (4, 1, 2), (3, 4, 2)])
def test_file_order_of_processes_is_build_nanogpts(world, B, micro_steps):
    """Several processes: the same rows at every step, though shared out otherwise."""
    T, tokens = 8, stream_of(1800)
    loaders = processes_of(tokens, world, B, T, rows=world * B * micro_steps)
    oracle = list(build_nanogpt_steps(tokens.shards[0], B, T, world))
    for step in range(len(oracle) // micro_steps):
        pairs = sum(oracle[step * micro_steps : (step + 1) * micro_steps], [])
        expected = {tuple(row) for x, y in pairs for row in torch.cat((x, y[:, -1:]), 1).tolist()}
        assert {tuple(row) for row in step_of(loaders).tolist()} == expected
    assert step >= 8


@pytest.fixture
def one_thread():
    """No thread of a small matrix product waits for another on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_twenty_losses_are_those_of_a_plain_loop(tmp_path, one_thread):
    """train_step against the lecture's loop: torch's AdamW, cosine, clipping, build-nanogpt's data.

    The same weights at the start, float32: loss and norm of each step within 1e-4.
    """
    T, B, micro_steps, steps = 16, 2, 2, 20
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[:8000]
    ids = tokenizer.get_encoding().encode_ordinary(text)
    assert len(ids) > steps * micro_steps * B * T
    write_npy(tmp_path / "own_train_000000.npy", ids)
    write_npy(tmp_path / "own_val_000000.npy", ids[:500])
    config = Config(
        data=str(tmp_path), log_dir=str(tmp_path / "log"), shuffle=False, seed=7, n_layer=2, T=T,
        n_head=2, n_embd=32, B=B, total_batch_size=micro_steps * B * T, max_steps=steps,
        warmup_steps=4, max_lr=2e-3, min_lr=2e-4, grad_clip=1.0, weight_decay=0.1,
        dtype="float32", compile=False, device="cpu",
    )  # fmt: skip
    processes = train_gpt2.Processes(0, 1, torch.device("cpu"), torch.float32)
    model = train_gpt2.set_up_model(config, None, None)
    plain = train_gpt2.GPT(model.config)
    plain.load_state_dict(model.state_dict())
    run, _ = train_gpt2.set_up_run(config, processes, model, *open_tokens(config.data))
    assert run.loader.B == B

    matrices = [p for p in plain.parameters() if p.dim() >= 2]
    vectors = [p for p in plain.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    data = build_nanogpt_steps(np.array(ids, dtype=np.uint16), B, T, 1)
    ours, theirs = [], []
    for step in range(steps):
        results = train_gpt2.train_step(run, train_gpt2.get_lr(step, config), torch.zeros(1))
        ours.append(results[:2].tolist())

        loss_sum = 0.0
        for _ in range(micro_steps):
            ((x, y),) = next(data)
            loss = plain(x, y)[1] / micro_steps
            loss.backward()
            loss_sum += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item()
        if step < 4:
            lr = 2e-3 * (step + 1) / 4
        else:
            lr = 2e-4 + 0.5 * (1 + math.cos(math.pi * (step - 4) / 16)) * (2e-3 - 2e-4)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        theirs.append([loss_sum, norm])
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 1e-4
    losses = [loss for loss, _ in theirs]
    assert abs(losses[0] - math.log(50257)) < 0.1 and losses[-1] < losses[0] - 0.5  # it learned
    assert max(norm for _, norm in theirs) > 1  # clipping took part


def test_loss_of_a_padded_share_is_the_mean_over_real_rows():
    """5 rows at B = 4 are two micro-batches of which three rows count for nothing."""
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=32))
    x, y = DataLoaderLite(stream_of(41), 4, 8).batch(0, 5)
    training_model = train_gpt2.TrainingModel(model, compiled=False)
    with torch.no_grad():
        total = sum(training_model.evaluate(a, b).item() for a, b in zip(x, y))
        whole = torch.from_numpy(windows_of(stream_of(41), 8))
        logits = model(whole[:, :-1])[0]
        expected = F.cross_entropy(logits.flatten(0, 1), whole[:, 1:].flatten()).item()
    assert total / (5 * 8) == pytest.approx(expected, abs=1e-5)


# -------------------------------------------------------------------------------------------------
# Resuming, and the step prepared ahead


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("rows", [5, ramp], ids=["5", "ramp"])
def test_a_loader_continues_from_any_position(rows, shuffle, world):
    """All steps of a loader set to p are those of one that ran to p, over the end of an epoch."""
    T, tokens = 4, stream_of(20, 30, 3)
    make = functools.partial(processes_of, tokens, world, 2, T, rows, shuffle=shuffle, seed=9)
    whole, steps, positions = make(), [], []
    for _ in range(10):
        positions.append(whole[0].position)
        steps.append(step_of(whole))
    assert positions[-1] > whole[0].windows
    for first, position in enumerate(positions):
        resumed = make()
        for loader in resumed:
            loader.position = position
        for expected in steps[first:]:
            assert np.array_equal(step_of(resumed), expected)
    # on another number of processes, too
    resumed = processes_of(tokens, 4, 1, T, rows, shuffle=shuffle, seed=9)
    for loader in resumed:
        loader.position = positions[4]
    for expected in steps[4:]:
        assert np.array_equal(step_of(resumed), expected)


def test_the_next_step_is_prepared_meanwhile():
    """Its windows are read before it is asked for, by another thread."""
    prepared, readers = threading.Event(), {}

    class Watched(TokenStream):
        def read(self, start, stop):
            readers[start // 4] = threading.current_thread()
            if start == 4 * 5:
                prepared.set()
            return super().read(start, stop)

    loader = DataLoaderLite(Watched([np.arange(100, dtype=np.uint16)], ["shard"]), 3, 4)
    loader.next_step()
    assert loader.position == 3
    assert prepared.wait(timeout=20)
    assert readers[3] is readers[5] is not threading.current_thread()
    assert loader.next_step()[0][0, 0, 0] == 12


def test_a_foreign_token_is_named_when_it_is_reached(tmp_path):
    """Not before: the steps ahead of it are served, though the next is prepared already."""
    write_npy(tmp_path / "a_train_000.npy", np.full(40, 50256))
    bad = np.zeros(41)
    bad[5] = 60_000  # token 45 of the split
    write_bin(tmp_path / "a_train_001.bin", bad)
    write_npy(tmp_path / "a_val_000.npy", np.zeros(50))
    tokens, _ = open_tokens(str(tmp_path))
    loader = DataLoaderLite(tokens, 3, 8)
    x, _, _ = loader.next_step()
    assert (x == 50256).all()  # <|endoftext|>, the last id that there is
    for _ in range(2):  # a step that failed is not skipped
        with pytest.raises(UserError) as error:
            loader.next_step()
        message = str(error.value)
        assert str(tmp_path / "a_train_001.bin") in message and "a_train_000" not in message
        assert "60000" in message and "token 45 " in message and "50257" in message
    assert loader.position == 3
    padded = DataLoaderLite(TokenStream([np.full(9, 50257, dtype=np.uint16)], ["x"]), 1, 8)
    with pytest.raises(UserError, match="50257"):  # a spare row of the embedding is no token
        padded.next_step()


def private_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.fixture
def large_shards(tmp_path):
    """Eight shards of 20 MB; removed at the end."""
    tokens = (np.arange(10_000_000) % 50_000).astype(np.uint16)
    for i in range(8):
        (write_npy, write_bin)[i % 2](tmp_path / f"big_train_{i}.{('npy', 'bin')[i % 2]}", tokens)
    write_npy(tmp_path / "big_val_0.npy", tokens[:1000])
    yield tmp_path
    for path in tmp_path.glob("big_*"):
        path.unlink()


def test_reading_through_large_shards_takes_little_memory(large_shards):
    """An epoch of 160 MB in steps of 1 MB: under 60 MB of the process's own memory."""
    before = private_memory()
    tokens, _ = open_tokens(str(large_shards))
    loader = DataLoaderLite(tokens, 4, 16384, shuffle=True)
    most, total = 0, 0
    while loader.position < loader.windows:
        x, _, _ = loader.next_step()
        total += x.numel()
        most = max(most, private_memory() - before)
    assert total >= 80_000_000 - 16384 and most < 60e6


# -------------------------------------------------------------------------------------------------
# Batch ramp


@pytest.mark.parametrize(
    "T, total, ramp_tokens",
    [
        (1024, 524288, 4_000_000),
        (2048, 524288, 4_000_000_000),
        (64, 65536, 1_000_000),
        (96, 96000, 7),
    ],
)
def test_the_ramp_is_linear_in_tokens(T, total, ramp_tokens):
    """From 32,768 tokens to total_batch_size, in whole windows, never falling."""
    config = Config(T=T, total_batch_size=total, batch_ramp_tokens=ramp_tokens)
    assert batch_rows(0, config) == 32768 // T
    end = math.ceil(ramp_tokens / T)
    positions = sorted({*range(0, end, max(1, end // 500)), end - 1, end, end + 1, 3 * end})
    rows = [batch_rows(position, config) for position in positions]
    assert rows == sorted(rows) and all(isinstance(n, int) for n in rows)
    for position, n in zip(positions, rows):
        line = 32768 + (total - 32768) * min(1, position * T / ramp_tokens)
        assert line - T < n * T + 1e-3 and n * T <= line + 1e-3
    assert {n for p, n in zip(positions, rows) if p >= end} == {total // T}


def test_without_a_ramp_every_step_is_full():
    config = Config(T=1024, total_batch_size=524288)
    assert [batch_rows(p, config) for p in (0, 1, 10**6, 10**12)] == [512] * 4


def test_a_window_longer_than_the_start_of_a_ramp_is_one_row():
    config = Config(T=65536, total_batch_size=2**20, batch_ramp_tokens=2**24)
    assert batch_rows(0, config) == 1


def test_the_ramp_is_the_same_on_any_number_of_processes():
    """Steps of the real ramp, some larger than the epoch, on 1, 3 and 5 processes."""
    config = Config(T=1024, total_batch_size=65536, batch_ramp_tokens=400_000)
    tokens = stream_of(20_000, 29_000)

    def rows(position):
        return batch_rows(position, config)

    worlds = [processes_of(tokens, w, 7, 1024, rows, shuffle=True) for w in (1, 3, 5)]
    sizes = []
    for _ in range(11):
        first, *others = [step_of(loaders) for loaders in worlds]
        assert all(np.array_equal(first, other) for other in others)
        sizes.append(len(first))
    assert sizes[0] == 32 and sizes[-1] == 64 and sizes == sorted(sizes) and len(set(sizes)) > 5


@pytest.mark.parametrize("world, B", [(1, 32), (8, 32), (3, 29), (8, 7)])
def test_a_ramp_wastes_little_and_compiles_few_sizes(world, B):
    """Padding adds less than half to the work of GPT-3's ramp, in at most six sizes of micro-batch.

    (torch.compile gives a function up at eight.)
    """
    config = train_gpt2.parse_config(["gpt3-124M"])
    loader = DataLoaderLite(stream_of(5000), B, config.T, num_processes=world)
    sizes, work = set(), []
    for rows in range(16, 257):  # each for as many tokens as the next, since the ramp is linear
        size = loader.micro_batch(rows)
        share = -(-rows // world)
        sizes.add(size)
        work.append(world * size * -(-share // size) / rows)
        assert size <= B and -(-share // size) == -(-share // B)
    assert np.mean(work) < 1.5 and len(sizes) <= 6 and size == B


def test_the_recipe_of_gpt3_warms_up_and_lasts_as_it_says():
    """GPT-3's 375 M tokens of warm-up, and 10 B tokens in all, within half a percent."""
    config = train_gpt2.parse_config(["gpt3-124M"])
    positions = [0]
    for _ in range(config.max_steps):
        positions.append(positions[-1] + batch_rows(positions[-1], config))
    assert positions[config.warmup_steps] * config.T == pytest.approx(375e6, rel=0.005)
    assert positions[-1] * config.T == pytest.approx(10e9, rel=0.005)


# -------------------------------------------------------------------------------------------------
# Files


def test_npy_bin_and_txt_are_the_same_stream(tmp_path, text_file):
    """The same tokens in the three formats, cut into shards anywhere: the same fingerprint, steps.

    The last tenth of a text's tokens is validation.
    """
    ids = tokenizer.get_encoding().encode_ordinary(text_file.read_text(encoding="utf-8"))
    cut = len(ids) * 9 // 10
    for name, writer, at in (("npy", write_npy, 1000), ("bin", write_bin, 333)):
        directory = tmp_path / name
        directory.mkdir()
        writer(directory / f"x_train_000002.{name}", ids[at:cut])
        writer(directory / f"x_train_000001.{name}", ids[:at])
        writer(directory / f"x_val_000000.{name}", ids[cut:])
        (directory / "train_notes.md").write_text("no shard")
    splits = [open_tokens(str(tmp_path / name)) for name in ("npy", "bin", "text.txt")]
    for train, val in splits:
        assert train.read(0, len(train)).tolist() == ids[:cut]
        assert val.read(0, len(val)).tolist() == ids[cut:]
    assert len({train.fingerprint for train, _ in splits}) == 1
    assert len({val.fingerprint for _, val in splits}) == 1
    assert splits[0][0].fingerprint != splits[0][1].fingerprint
    batches = [DataLoaderLite(train, 4, 16, shuffle=True).next_step() for train, _ in splits]
    assert all(
        torch.equal(batches[0][0], x) and torch.equal(batches[0][1], y) for x, y, _ in batches
    )


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
    train, val = open_tokens(str(tmp_path))
    assert train.read(0, 5).tolist() == [0, 1, 2, 10, 11] and val.read(0, 1).tolist() == [99]
    assert train.name_of(3) == str(tmp_path / "x_train_000010.npy")


def test_shards_of_any_size_from_files(tmp_path):
    """An empty shard of each format among short ones: the epoch is whole."""
    at = 0
    for i, (size, suffix) in enumerate(
        [(5, "npy"), (0, "npy"), (2, "bin"), (0, "bin"), (30, "bin")]
    ):
        writer = write_npy if suffix == "npy" else write_bin
        writer(tmp_path / f"x_train_{i}.{suffix}", np.arange(at, at + size))
        at += size
    write_npy(tmp_path / "x_val_0.npy", np.arange(9))
    train, _ = open_tokens(str(tmp_path))
    rows = stretch(processes_of(train, 2, 1, 6, rows=2), 6)
    assert np.array_equal(rows, windows_of(stream_of(37), 6))


def test_shards_are_mapped_and_not_read(tmp_path):
    write_npy(tmp_path / "a.npy", np.arange(10))
    write_bin(tmp_path / "a.bin", np.arange(10))
    for name in ("a.npy", "a.bin"):
        shard = open_shard(tmp_path / name)
        assert isinstance(shard, np.memmap) and not shard.flags.writeable
        assert shard.dtype == np.uint16 and shard.tolist() == list(range(10))


def test_data_is_found_from_any_directory(tmp_path, monkeypatch):
    """input.txt lies beside the program; a file of that name here comes first."""
    monkeypatch.chdir(tmp_path)
    assert find_data("input.txt").samefile(ROOT / "input.txt")
    assert find_data("nowhere") == Path("nowhere")
    (tmp_path / "input.txt").write_text("mine")
    assert find_data("input.txt").read_text() == "mine"
    assert find_data(str(ROOT / "input.txt")) == ROOT / "input.txt"
    assert sum(map(len, open_tokens("input.txt"))) == 1


# -------------------------------------------------------------------------------------------------
# Refusals


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
        open_tokens(str(tmp_path))
    assert str(path) in str(error.value)


def test_truncation_says_how_long_a_bin_should_be(tmp_path):
    (tmp_path / "a.bin").write_bytes(bin_bytes(99_999, promised=100_000))
    with pytest.raises(UserError, match=r"a\.bin: .*truncated.*100,000 tokens.*make it again"):
        open_shard(tmp_path / "a.bin")


def test_spoiled_headers_are_refused_whatever_is_spoiled(tmp_path):
    """500 headers with random bytes at random places: a shard, or a UserError, and nothing else."""
    rng, path, refused = random.Random(0), tmp_path / "train.npy", 0
    for _ in range(500):
        spoiled = bytearray(SHARD)
        for _ in range(rng.choice([1, 2, 5])):
            spoiled[rng.randrange(120)] = rng.randrange(256)
        path.write_bytes(spoiled)
        try:
            assert open_shard(path).dtype == np.uint16
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
        open_tokens(str(directory))
    for part in (f"data={str(directory)!r}", *names, *BOTH_WAYS_OUT):
        assert part in str(error.value)


def test_other_files_are_refused_by_name(tmp_path):
    """One shard instead of their directory; a text in another encoding; an empty text."""
    (tmp_path / "train_0.npy").write_bytes(SHARD)
    (tmp_path / "latin.txt").write_bytes("Où êtes-vous?".encode("latin-1") * 20)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SettingError, match=r"train_0\.npy.*neither a directory of shards nor"):
        open_tokens(str(tmp_path / "train_0.npy"))
    with pytest.raises(SettingError, match=r"latin\.txt.*UTF-8"):
        open_tokens(str(tmp_path / "latin.txt"))
    config = Config(data=str(tmp_path / "empty.txt"), T=8)
    with pytest.raises(SettingError, match=r"empty\.txt.*0 tokens.*'train'"):
        train_gpt2.check_enough(config, *open_tokens(config.data))


@pytest.mark.parametrize("tokens, T, enough", [(9, 8, True), (8, 8, False), (1, 1, False)])
def test_a_split_needs_one_window_and_its_next_token(tokens, T, enough):
    long = stream_of(1000)
    config = Config(data="mine", T=T)
    for split, streams in (
        ("train", (stream_of(tokens), long)),
        ("val", (long, stream_of(tokens))),
    ):
        if enough:
            train_gpt2.check_enough(config, *streams)
        else:
            with pytest.raises(SettingError, match=f"'mine'.*{tokens} tokens of '{split}'"):
                train_gpt2.check_enough(config, *streams)


# -------------------------------------------------------------------------------------------------
# B


@pytest.mark.parametrize(
    "rows, T, world, B, picked",
    [
        (8, 1024, 1, 0, 4),  # 4,096 tokens
        (512, 64, 1, 0, 64),
        (100, 4096, 1, 0, 1),
        (100, 8192, 1, 0, 1),  # at least one row
        (16, 128, 1, 0, 16),  # no more than there are
        (171, 8, 1, 64, 57),  # 3 x 57, not 64 + 64 + 43
        (171, 8, 1, 57, 57),
        (171, 8, 1, 200, 171),
        (9, 32, 1, 8, 5),
        (512, 1024, 8, 64, 64),
        (512, 1024, 3, 64, 57),  # the largest share is 171
        (8, 32, 3, 8, 3),
        (2, 32, 8, 4, 1),
        (7, 32, 1, 1, 1),
    ],
)
def test_B_is_even_and_never_more_than_a_process_has(rows, T, world, B, picked):
    processes = train_gpt2.Processes(0, world, torch.device("cpu"), torch.float32)
    config = Config(T=T, B=B, total_batch_size=rows * T)
    assert pick_B(config, None, processes) == picked


def test_B_wastes_less_than_a_micro_batch():
    """For all shares to 200 rows and settings to 70: as few micro-batches as B allows."""
    processes = train_gpt2.Processes(0, 1, torch.device("cpu"), torch.float32)
    for rows in range(1, 201):
        for B in range(1, 71):
            picked = pick_B(Config(T=8, B=B, total_batch_size=8 * rows), None, processes)
            micro_steps = math.ceil(rows / B)
            assert 1 <= picked <= min(B, rows)
            assert math.ceil(rows / picked) == micro_steps  # no more forward passes than at B
            assert micro_steps * picked - rows < micro_steps  # and less than a row of each is idle
