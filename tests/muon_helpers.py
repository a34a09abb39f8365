"""Steps of Muon on fixed gradients, in this process or in one of a group."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from support.muon import Muon

SHAPES = [(24, 24), (24, 24), (24, 60), (60, 24), (24, 60), (72, 24)]  # the last: three matrices


def make_weights(shapes, seed: int = 0, **where) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(**where)) for s in shapes]


def set_gradients(weights, seed: int) -> None:
    """Gradients whose singular values differ by a factor of about 100, as those of a model do."""
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        scale = torch.logspace(-2, 0, weight.size(1))
        weight.grad = (torch.randn(weight.shape, generator=generator) * scale).to(weight)


def train(steps: int = 3) -> dict:
    """The weights and the optimizer's state after steps on matrices of several shapes."""
    weights = make_weights(SHAPES)
    groups = [{"params": weights[:-1]}, {"params": weights[-1:], "parts": 3}]
    optimizer = Muon(groups, lr=0.02)
    for step in range(steps):
        set_gradients(weights, seed=step)
        optimizer.step()
    return {"weights": [w.detach() for w in weights], "optimizer": optimizer.state_dict()}


def train_in_group(rank: int, world_size: int, directory: Path) -> None:
    """Writes what `train` returns on one of several processes to `directory`/`rank`.pt."""
    store = dist.FileStore(str(directory / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    torch.save(train(), directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
