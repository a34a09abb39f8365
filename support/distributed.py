"""The process group of a run: joined even after a restart, and if one is missing, which it is."""

import os
import re
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from support.errors import UserError

watch = None  # (a group over gloo, seconds in which whoever is alive answers), once joined


class LostProcess(UserError):
    """Another process of the run is gone or hangs, so that no step can be finished."""

    code = 3


def join(rank: int, world_size: int, device, timeout_s: float) -> None:
    """Makes the default process group: nccl on CUDA, gloo elsewhere.

    timeout_s: how long the processes wait for one of them
    """
    global watch
    timeout = timedelta(seconds=timeout_s)
    group = dict(rank=rank, world_size=world_size, timeout=timeout)
    group["store"] = fresh_store(rank, world_size, timeout)
    if device.type == "cuda":
        dist.init_process_group("nccl", **group, device_id=device)
    else:
        dist.init_process_group("gloo", **group)
    patience_s = min(timeout_s, 20)
    # the others wait for the verdict of rank 0 a little longer than it waits for them
    waiting = timedelta(seconds=2 * patience_s + 5)
    watch = dist.new_group(backend="gloo", timeout=waiting), timedelta(seconds=patience_s)


def fresh_store(rank: int, world_size: int, timeout: timedelta):
    """The store of this start of the run, with nothing of dead processes in it.

    torchrun gives all processes one store, those that it starts again after a failure, too
    (`--max-restarts`). There these find the addresses that the ones before them left, call them,
    and fail or hang. So rank 0 makes up a name that no start had before, and all keys get it as a
    prefix. To whom it tells the name cannot be a process of before: each asks with a word of its
    own, and says that it has heard. Raises RuntimeError where a rank does not come in `timeout`.
    """
    store = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))[0]
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # a store of its own for each start
        return store
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", mine)
        name = store.get(f"answer/{mine}").decode()  # waits for it
        store.set(f"heard/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    missing, deadline = set(range(1, world_size)), time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"of {world_size} processes, rank {min(missing)} did not start")
        for other in missing:
            if store.check([f"asks/{other}"]):  # one of before, perhaps: it is asked for again
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", mine)
        missing = {other for other in missing if not store.check([f"heard/{mine}/{other}"])}
        time.sleep(0.01)
    return dist.PrefixStore(mine, store)


def missing(rank: int) -> str:
    """Which processes do not answer, as far as torch can tell.

    To be called by all where waiting for one another failed.
    """
    group, patience = watch
    try:
        dist.monitored_barrier(group, patience, wait_all_ranks=True)
    except RuntimeError as error:
        if ranks := re.search(r"Ranks ([\d, ]+) failed", str(error)):
            return f"no answer from rank {ranks[1]}"
        if rank > 0 and "Timed out" in str(error):
            return "no answer from rank 0"
    return "another process is gone"


def raise_if_lost(error: RuntimeError) -> None:
    """Raises LostProcess where `error` is that of waiting for another process."""
    if watch and (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
        rank = dist.get_rank()
        raise LostProcess(
            f"rank {rank}: {missing(rank)} ({str(error)[:200]}); "
            "the same command continues from the last checkpoint"
        ) from None
