"""A store for the processes of a run to find one another in, with nothing of dead ones in it.

torchrun gives all processes one store, those that it starts again after a failure, too
(`--max-restarts`). There these find the addresses that the ones before them left, call them, and
fail or hang. (With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 it would make a new one for each start.)
"""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist


def fresh_store(rank: int, world_size: int, timeout: timedelta):
    """The store of this start of the run: for `init_process_group(store=...)`.

    Rank 0 makes up a name that no start had before, and all keys get it as a prefix. To whom it
    tells the name cannot be a process of before: each asks with a word of its own, and says that it
    has heard. Raises RuntimeError where a rank does not come within `timeout`.
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
