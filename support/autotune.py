"""Choices made by trying: the micro-batch that fits the device, and whether the model compiles."""

import contextlib
import math
import time

import torch

from support.distributed import Runtime, without_sync
from support.errors import UserError
from support.launch import print0


@contextlib.contextmanager
def naming_lack_of_memory():
    """A context that raises UserError, with the setting to change, if the device is full."""
    try:
        yield
    except RuntimeError as error:  # that of a CPU has no class of its own
        if "allocate memory" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).split("Allocator: ")[-1].split(". ")[0]
        raise UserError(f"{reason}; give a smaller --B, or 0 for the most that fit") from None


def divide_evenly(n: int, most: int) -> int:
    """The largest part if n is divided into as few equal parts of at most `most` as possible."""
    return math.ceil(n / math.ceil(n / most))


def choose_micro_batch(rows: int, most: int, T: int, training_model, runtime: Runtime) -> int:
    """Rows of a micro-batch for a rank's share of `rows` rows of T tokens.

    most: the setting B. 0: on a GPU the largest power of two that fits, up to 65,536 tokens;
        elsewhere 4,096 tokens, since more do not make a CPU faster
    The share is divided evenly: 171 rows at most 64 at a time become 3 x 57, not 64 + 64 + 43.
    """
    if most == 0 and runtime.device.type != "cuda":
        most = max(1, 4096 // T)
    elif most == 0:
        most = 1 << max(0, (65536 // T).bit_length() - 1)
        while most > 1 and not fits(training_model, most, T, runtime):
            most //= 2
        most = min(runtime.all_gather(most))
    return divide_evenly(rows, most)


def fits(training_model, B: int, T: int, runtime: Runtime) -> bool:
    """Whether a forward and backward pass of B rows fits, next to the memory of AdamW and DDP."""
    buffers, compiled = [], training_model.compiled
    training_model.use(compiled=False)
    try:
        buffers += [torch.empty_like(p) for p in training_model.parameters() for _ in range(3)]
        run_dummy_step(training_model, B, T, runtime)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        buffers.clear()
        training_model.zero_grad(set_to_none=True)
        training_model.use(compiled)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # the peak of the run is not that of a trial


def run_dummy_step(model, B: int, T: int, runtime: Runtime) -> None:
    """A forward and backward pass of (B, T) zeros; the gradients stay in the model."""
    idx = torch.zeros((B, T), dtype=torch.int64, device=runtime.device)
    with without_sync(model):
        with runtime.autocast():
            loss = model(idx, idx)
        loss.backward()


def compile_or_fall_back(training_model, ddp_model, B: int, T: int, runtime: Runtime) -> None:
    """Compiles the training and the validation step on a dummy batch; eager mode if that fails.

    ddp_model: None: compiles validation only
    If it fails on any rank, all ranks use eager mode.
    """
    if not training_model.compiled:
        return
    start, problem = time.perf_counter(), ""
    try:
        if ddp_model is not None:
            run_dummy_step(ddp_model, B, T, runtime)
        idx = torch.zeros((B, T), dtype=torch.int64, device=runtime.device)
        with runtime.autocast():
            training_model.evaluate(idx, idx)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler and its tool chain raise anything
        problem = " ".join(f"{type(error).__name__}: {error}".split("\n")[:2])
    training_model.zero_grad(set_to_none=True)
    if runtime.sum_float(bool(problem)) > 0:
        training_model.use(compiled=False)
        problem = problem or "on another rank"
        print0(f"torch.compile failed; falling back to eager mode: {problem}")
    else:
        print0(f"compiled in {time.perf_counter() - start:.0f} s")
