"""The processes of a run: rank, device and process group, and which process is missing."""

import contextlib
import ctypes
import gc
import os
import re
import signal
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from support import devices
from support.errors import SettingError, UserError
from support.launch import Launch, read_address


@dataclass
class Runtime:
    """Rank, world size, device and dtype of this process."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products; float32 means no autocast

    @property
    def master_process(self) -> bool:
        """Whether this process prints, logs and saves."""
        return self.rank == 0

    @property
    def asynchronous(self) -> bool:
        """Whether the device may still be computing the results of a call that has returned."""
        return self.device.type == "cuda"

    def autocast(self):
        """A context in which matrix products are computed in `dtype`."""
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_float(self, value: float) -> float:
        """The sum of a number over all ranks, in float32."""
        return self.all_reduce(torch.tensor([value], device=self.device).float()).item()

    def all_gather(self, value) -> list:
        """The Python objects of all ranks, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def failing_together(self):
        """A context without collectives: if a rank raises UserError in it, all ranks do.

        They raise SettingError with the message of the first such rank.
        """
        message = None
        try:
            yield
        except UserError as error:
            message = str(error)
        for rank, found in enumerate(self.all_gather(message)):
            if found is not None:
                raise SettingError(f"rank {rank}: {found}" if rank > 0 else found)

    def check_same(self, values: dict, remedy: str) -> None:
        """Raises SettingError, on all ranks, if one of the named values is not the same on all."""
        first, *others = self.all_gather(values)
        for rank, other in enumerate(others, start=1):
            for name in first | other:  # another version may have other names
                a, b = (found.get(name) for found in (first, other))
                if a != b:
                    raise SettingError(f"{name}={a!r}, but {b!r} on rank {rank}: {remedy}")

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        if self.world_size > 1:
            dist.barrier()


def without_sync(model: nn.Module):
    """DDP's no_sync; for a plain model an empty context."""
    return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()


def initialize(
    device: str, dtype: str, launch: Launch | None = None, timeout_s: int = 600
) -> Runtime:
    """Chooses device and dtype by the settings, and joins the process group if there are several.

    launch: default: one process
    timeout_s: seconds after which a rank that waits for another one gives up
    Raises UserError if the device is not available, or if a setting has no valid form.
    """
    devices.validate_device_and_dtype(device, dtype)
    launch = launch or Launch()
    if launch.local_world_size > 1 and ":" in device:
        raise SettingError(
            f"device={device!r}: all processes would share it; each takes a GPU of its own by "
            "--device=cuda"
        )
    chosen = devices.choose_device(device, launch.local_rank)
    if chosen.type == "mps" and launch.world_size > 1:
        raise SettingError("device='mps': one process only; start several with --device=cpu")
    stop_with_launcher()
    if launch.world_size > 1 and not dist.is_initialized():
        join_process_group(launch.rank, launch.world_size, chosen, timeout_s)
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    elif chosen.type == "cpu":
        devices.keep_freed_memory()
    return Runtime(launch.rank, launch.world_size, chosen, devices.choose_dtype(dtype, chosen))


# -------------------------------------------------------------------------------------------------
# Process group

_monitor = None  # (gloo group, timeout of its barrier): finds out which rank does not answer
FIRST_ALL_REDUCE_S = 60  # most seconds that the first one on GPUs may take
NCCL_REMEDY = (
    "if all processes run, their GPUs may not reach each other: set NCCL_P2P_DISABLE=1, and for "
    "several nodes also NCCL_IB_DISABLE=1; NCCL_DEBUG=INFO shows the connections"
)


class LostProcess(UserError):
    """Another process of the run has ended or hangs, so no step can be finished."""

    code = 3


def join_process_group(rank: int, world_size: int, device, timeout_s: float) -> None:
    """Creates the default process group: nccl on CUDA, gloo elsewhere.

    Raises UserError if the address of rank 0 is not usable, LostProcess if a rank does not come or
    the GPUs do not reach each other.
    """
    global _monitor
    address, port = read_address()
    timeout = timedelta(seconds=timeout_s)
    group = dict(rank=rank, world_size=world_size, timeout=timeout)
    try:
        group["store"] = create_store(rank, world_size, timeout)
        gpu = device if device.type == "cuda" else None
        dist.init_process_group("nccl" if gpu else "gloo", **group, device_id=gpu)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        if "EADDRINUSE" in reason:
            raise UserError(
                f"MASTER_PORT={port}: in use on {address}; choose another port, the same for all "
                "processes"
            ) from None
        if isinstance(error, dist.DistBackendError):  # of NCCL; the processes have met
            raise LostProcess(f"rank {rank}: NCCL failed ({reason}); {NCCL_REMEDY}") from None
        raise LostProcess(
            f"rank {rank}: not all of {world_size} processes met at {address}:{port} within "
            f"timeout_s={timeout_s} ({reason}); start all of them with the same address"
        ) from None
    answer_s = min(timeout_s, 20)
    # The other ranks wait for the answer of rank 0 a little longer than it waits for them.
    group_timeout = timedelta(seconds=2 * answer_s + 5)
    _monitor = dist.new_group(backend="gloo", timeout=group_timeout), timedelta(seconds=answer_s)
    if device.type == "cuda":
        check_all_reduce(rank, device, min(timeout_s, FIRST_ALL_REDUCE_S))


def check_all_reduce(rank: int, device, limit_s: float) -> None:
    """Waits for a first all-reduce over all ranks; all of them must call it.

    NCCL connects the GPUs in the first one, and if they do not reach each other, that call or its
    kernel never ends. So a thread waits for both, less long than NCCL's own timeout, which ends the
    process without naming a rank.
    Raises LostProcess if it fails, or is not done within `limit_s` seconds.
    """
    tensor = torch.ones(1, device=device)

    def all_reduce() -> None:
        dist.all_reduce(tensor)
        torch.cuda.synchronize(device)

    pool = ThreadPoolExecutor(max_workers=1)
    try:
        pool.submit(all_reduce).result(limit_s)
    except (TimeoutError, dist.DistError) as error:
        reason = " ".join(str(error).split())[:200] or f"not done within {limit_s:g} s"
        found = find_missing(rank) or "all ranks answer"
        raise LostProcess(
            f"rank {rank}: the first all-reduce on the GPUs failed ({reason}): {found}; "
            f"{NCCL_REMEDY}"
        ) from None
    pool.shutdown()


def leave_group() -> None:
    """Leaves the process group, if there is one, when all ranks do.

    Its threads end with the last reference to it, such as DDP's. A thread that outlives the
    interpreter would abort the process ("terminate called without an active exception").
    """
    global _monitor
    if dist.is_initialized():
        with naming_lost_ranks():
            dist.barrier()
        _monitor = None
        gc.collect()
        dist.destroy_process_group()


def create_store(rank: int, world_size: int, timeout: timedelta):
    """The store of this start of the run, without keys of earlier processes.

    torchrun gives the same store to all processes, and also to those that it starts again after a
    failure (`--max-restarts`). They would find the addresses that earlier processes left, connect
    to them, and fail or hang. So rank 0 chooses a new name, and all keys get it as a prefix. An
    earlier process cannot receive the name: each rank asks with a word of its own, and confirms.
    Raises RuntimeError if a rank does not ask within `timeout`.
    """
    store = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))[0]
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # each start has a store of its own
        return store
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", own)
        name = store.get(f"answer/{own}").decode()  # blocks until rank 0 answers
        store.set(f"confirms/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    missing, deadline = set(range(1, world_size)), time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"of {world_size} processes, rank {min(missing)} did not start")
        for other in missing:
            if store.check([f"asks/{other}"]):  # perhaps of an earlier process: ask again
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        missing = {other for other in missing if not store.check([f"confirms/{own}/{other}"])}
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


def find_missing(rank: int) -> str:
    """Which ranks do not answer, as far as torch can find out; "" if all do.

    All ranks must call it.
    """
    group, timeout = _monitor
    try:
        dist.monitored_barrier(group, timeout, wait_all_ranks=True)
        return ""
    except RuntimeError as error:
        if ranks := re.search(r"Ranks ([\d, ]+) failed", str(error)):
            return f"no answer from rank {ranks[1]}"
        if rank > 0 and "Timed out" in str(error):
            return "no answer from rank 0"
    return "another process has ended"


def stop_with_launcher() -> None:
    """Makes the kernel send SIGTERM to this process when torchrun has ended (Linux).

    A launcher that is killed, e.g. by SIGUSR1, would otherwise leave its processes training.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def naming_lost_ranks(remedy: str = "the same command continues from the last checkpoint"):
    """A context that raises LostProcess if a collective in it fails because a rank has left."""
    try:
        yield
    except RuntimeError as error:
        if not _monitor or not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        rank = dist.get_rank()
        missing = find_missing(rank) or "another process has ended"
        raise LostProcess(f"rank {rank}: {missing} ({str(error)[:200]}); {remedy}") from None
