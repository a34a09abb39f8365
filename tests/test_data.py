"""The stream of windows: each exactly once, the same for any number of processes and any B."""

import functools
import math
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

import train_gpt2
from support import tokenizer
from support.distributed import Runtime
from support.errors import UserError
from support.fused_loss import IGNORE_INDEX
from support.shards import TokenStream, open_splits
from train_gpt2 import Config, DataLoaderLite, batch_rows

# -------------------------------------------------------------------------------------------------
# Helpers


def stream_of(*sizes) -> TokenStream:
    """Shards of these sizes with the tokens 0, 1, 2, ...: a window is known by its first token."""
    tokens = np.arange(sum(sizes), dtype=np.uint16)
    shards = np.split(tokens, np.cumsum(sizes)[:-1])
    return TokenStream(shards, [f"shard_{i}" for i in range(len(sizes))])


def windows_of(tokens: TokenStream, T: int) -> np.ndarray:
    """The expected windows of the stream, in file order: (windows, T + 1)."""
    flat = np.concatenate([np.asarray(shard) for shard in tokens.shards]).astype(np.int64)
    return np.stack([flat[i : i + T + 1] for i in range(0, len(flat) - T, T)])


def loaders_of(tokens, world: int, B: int, T: int, rows, **kwargs) -> list[DataLoaderLite]:
    """The loaders of all processes of a run; rows: of each step, or a function of the position."""
    rows_at = rows if callable(rows) else lambda position: rows
    share = dict(num_processes=world, rows_at=rows_at, **kwargs)
    return [DataLoaderLite(tokens, B, T, process_rank=rank, **share) for rank in range(world)]


def rows_in(x, y, B: int, T: int) -> np.ndarray:
    """The rows of a share that count, in order, with their last target: (rows, T + 1)."""
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (len(x), B, T)
    x, y = x.view(-1, T).numpy(), y.view(-1, T).numpy()
    padding = (y == IGNORE_INDEX).all(axis=1)
    x, y = x[~padding], y[~padding]
    assert (y != IGNORE_INDEX).all(), "a row is padding completely or not at all"
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
    "exactly complete windows": (65, 64),
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
    """Of N tokens only the last (N - 1) mod T are never a target; the second epoch too."""
    T, tokens = 8, stream_of(*sizes)
    complete = windows_of(tokens, T)
    n = len(complete)
    assert n == (sum(sizes) - 1) // T
    rows = stretch(loaders_of(tokens, 1, 4, T, rows=3, shuffle=shuffle), 2 * n)
    for epoch in (rows[:n], rows[n : 2 * n]):
        assert np.array_equal(in_order(epoch), complete)
        assert shuffle or np.array_equal(epoch, complete)


def test_epochs_are_in_different_orders_and_steps_may_straddle_their_end():
    """31 windows, 7 rows a step: four steps end in the next epoch, and each epoch is complete."""
    T, n = 8, 31
    tokens = stream_of(100, 149)
    rows = stretch(loaders_of(tokens, 1, 7, T, rows=7, shuffle=True, seed=5), 4 * n)
    epochs = [rows[n * i : n * (i + 1), 0] // T for i in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    orders = [tuple(epoch) for epoch in epochs] + [tuple(range(n))]
    assert len(set(orders)) == 5
    other = stretch(loaders_of(tokens, 1, 7, T, rows=7, shuffle=True, seed=6), n)
    assert tuple(other[:n, 0] // T) not in orders


def test_a_step_may_be_larger_than_epochs():
    tokens = stream_of(41)
    for shuffle in (False, True):
        rows = stretch(loaders_of(tokens, 2, 3, 8, rows=23, shuffle=shuffle), 23)
        complete = windows_of(tokens, 8)
        for epoch in range(4):
            assert np.array_equal(in_order(rows[5 * epoch : 5 * epoch + 5]), complete)
        assert len({tuple(row) for row in rows[20:]}) == 3


def test_random_combinations_serve_the_stream():
    """B, T, processes, rows and shards at random: three epochs, all windows once in each."""
    rng = random.Random(1)
    for _ in range(150):
        T, B, world = rng.randint(1, 20), rng.randint(1, 9), rng.randint(1, 6)
        rows = rng.randint(1, 40)
        sizes = [rng.choice([0, 1, rng.randint(0, 2 * T), rng.randint(0, 120)]) for _ in range(6)]
        tokens, shuffle = stream_of(*sizes, T + 1), rng.random() < 0.5
        what = f"T={T} B={B} world={world} rows={rows} sizes={sizes} shuffle={shuffle}"
        complete = windows_of(tokens, T)
        n = len(complete)
        loaders = loaders_of(tokens, world, B, T, rows, shuffle=shuffle, seed=rng.randint(0, 9))
        served = stretch(loaders, 3 * n)
        for epoch in range(3):
            one = served[n * epoch : n * (epoch + 1)]
            assert np.array_equal(in_order(one) if shuffle else one, complete), what


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
    worlds = [loaders_of(tokens, w, B, T, rows, shuffle=True, seed=3) for w in (1, 2, 3, 5, 8)]
    steps = 0
    while worlds[0][0].position < 3 * 26:
        expected = step_of(worlds[0])
        for loaders in worlds[1:]:
            assert np.array_equal(step_of(loaders), expected), f"{len(loaders)}, step {steps}"
        steps += 1
    assert len({loader.position for loaders in worlds for loader in loaders}) == 1
    # B changes how the rows are cut, and nothing else
    plain = stretch(loaders_of(tokens, 1, 5, T, 1, shuffle=True, seed=3), worlds[0][0].position)
    again = stretch(loaders_of(tokens, 3, B, T, rows, shuffle=True, seed=3), len(plain))
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
    loaders = loaders_of(stream_of(500), world, B, 2, rows)
    shapes = {tuple(loader.next_step()[0].shape) for loader in loaders}
    assert shapes == {(micro_steps, size, 2)}
    shares = [int((loader.batch(0, rows)[1] != IGNORE_INDEX).sum()) // 2 for loader in loaders]
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
    loader = loaders_of(tokens, 1, 4, 8, rows=12)[0]
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
    """Several processes: the same rows at every step, though distributed in another way."""
    T, tokens = 8, stream_of(1800)
    loaders = loaders_of(tokens, world, B, T, rows=world * B * micro_steps)
    oracle = list(build_nanogpt_steps(tokens.shards[0], B, T, world))
    for step in range(len(oracle) // micro_steps):
        pairs = sum(oracle[step * micro_steps : (step + 1) * micro_steps], [])
        expected = {tuple(row) for x, y in pairs for row in torch.cat((x, y[:, -1:]), 1).tolist()}
        assert {tuple(row) for row in step_of(loaders).tolist()} == expected
    assert step >= 8


def test_twenty_losses_are_those_of_a_plain_loop(tmp_path):
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
    runtime = Runtime(0, 1, torch.device("cpu"), torch.float32)
    model = train_gpt2.build_model(config, None, None)
    plain = train_gpt2.GPT(model.config)
    plain.load_state_dict(model.state_dict())
    run = train_gpt2.build_run(config, runtime, model, open_splits(config.data))
    assert run.loader.B == B

    matrices = [p for p in plain.parameters() if p.dim() >= 2]
    vectors = [p for p in plain.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    data = build_nanogpt_steps(np.array(ids, dtype=np.uint16), B, T, 1)
    ours, theirs = [], []
    for step in range(steps):
        figures, _ = train_gpt2.train_step(run, train_gpt2.get_lr(step, config), torch.zeros(1))
        ours.append([figures["loss"].item(), figures["norm"].item()])

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
        complete = torch.from_numpy(windows_of(stream_of(41), 8))
        logits = model(complete[:, :-1])[0]
        expected = F.cross_entropy(logits.flatten(0, 1), complete[:, 1:].flatten()).item()
    assert total / (5 * 8) == pytest.approx(expected, abs=1e-5)


# -------------------------------------------------------------------------------------------------
# Resuming, and the step prepared ahead


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("rows", [5, ramp], ids=["5", "ramp"])
def test_a_loader_continues_from_any_position(rows, shuffle, world):
    """All steps of a loader set to p are those of one that ran to p, over the end of an epoch."""
    T, tokens = 4, stream_of(20, 30, 3)
    make = functools.partial(loaders_of, tokens, world, 2, T, rows, shuffle=shuffle, seed=9)
    complete, steps, positions = make(), [], []
    for _ in range(10):
        positions.append(complete[0].position)
        steps.append(step_of(complete))
    assert positions[-1] > complete[0].windows
    for first, position in enumerate(positions):
        resumed = make()
        for loader in resumed:
            loader.position = position
        for expected in steps[first:]:
            assert np.array_equal(step_of(resumed), expected)
    # on another number of processes, too
    resumed = loaders_of(tokens, 4, 1, T, rows, shuffle=shuffle, seed=9)
    for loader in resumed:
        loader.position = positions[4]
    for expected in steps[4:]:
        assert np.array_equal(step_of(resumed), expected)


@pytest.mark.parametrize("name", ["cpu", "cuda:3"])
def test_the_loader_uses_only_the_gpu_of_its_rank(monkeypatch, name):
    """In the thread too that prepares the next batch, where GPU 0 is the current one by default; on
    a machine with GPUs a run on the CPU uses none."""
    current, pinned_on = threading.local(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", functools.partial(setattr, current, "device"))

    def pin_memory(tensor):
        pinned_on.append(str(getattr(current, "device", "cuda:0")))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    loader = DataLoaderLite(stream_of(100), 3, 4, device=name)
    for _ in range(3):
        loader.next_step()
    loader.prepared.result()
    assert set(pinned_on) == ({"cuda:3"} if name == "cuda:3" else set())


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
    tokens = open_splits(str(tmp_path))["train"]
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
    with pytest.raises(UserError, match="50257"):  # a padding row of the embedding is no token
        padded.next_step()


def private_memory() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.fixture
def large_shards(tmp_path):
    """Four shards of 20 MB; removed at the end."""
    tokens = (np.arange(10_000_000) % 50_000).astype(np.uint16)
    for i in range(4):
        (write_npy, write_bin)[i % 2](tmp_path / f"big_train_{i}.{('npy', 'bin')[i % 2]}", tokens)
    write_npy(tmp_path / "big_val_0.npy", tokens[:1000])
    yield tmp_path
    for path in tmp_path.glob("big_*"):
        path.unlink()


def test_reading_through_large_shards_takes_little_memory(large_shards):
    """An epoch of 80 MB in steps of 1 MB: under 40 MB of the process's own memory."""
    before = private_memory()
    tokens = open_splits(str(large_shards))["train"]
    loader = DataLoaderLite(tokens, 4, 16384, shuffle=True)
    most, total = 0, 0
    while loader.position < loader.windows:
        x, _, _ = loader.next_step()
        total += x.numel()
        most = max(most, private_memory() - before)
    assert total >= 40_000_000 - 16384 and most < 40e6


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
    """From 32,768 tokens to total_batch_size, in complete windows, never falling."""
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

    worlds = [loaders_of(tokens, w, 7, 1024, rows, shuffle=True) for w in (1, 3, 5)]
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
