"""Muon, with the work shared by all ranks, and several optimizers used as one."""

import itertools

import torch
import torch.distributed as dist

from support.errors import SettingError


class Muon(torch.optim.Muon):
    """PyTorch's Muon for weights that hold several matrices, with its work shared by all ranks.

    The key `parts` of a parameter group says how many matrices its weights hold, one above the
    other. Each rank orthogonalizes a share of all matrices and broadcasts the results. Every rank
    keeps every momentum, which costs little, so the optimizer's state is the same on all ranks.
    """

    @torch.no_grad()
    def step(self) -> None:
        self.matrices = []
        super().step()
        if dist.is_initialized():
            owners = itertools.cycle(range(dist.get_world_size()))
            sent = [dist.broadcast(m, next(owners), async_op=True) for m in self.matrices]
            for work in sent:
                work.wait()

    def _init_group(self, group, params, grads, momenta):
        result = super()._init_group(group, params, grads, momenta)
        lists = params, grads, momenta
        split = [[part for t in tensors for part in t.chunk(group["parts"])] for tensors in lists]
        for tensors in lists:
            tensors.clear()
        rank, world_size = 0, 1
        if dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        for matrix, grad, momentum in zip(*split):
            if len(self.matrices) % world_size == rank:
                for tensors, tensor in zip(lists, (matrix, grad, momentum)):
                    tensors.append(tensor)
            else:  # another rank updates this matrix
                momentum.lerp_(grad, 1 - group["momentum"])
            self.matrices.append(matrix)
        return result


def configure_muon(
    matrices: dict[str, torch.Tensor], lr: float, momentum: float, weight_decay: float
) -> Muon:
    """Muon for named weights; those of queries, keys and values hold three matrices each."""
    # Large matrices first, so that ranks that take turns get equal shares of the work.
    names = sorted(matrices, key=lambda name: -matrices[name].numel())
    qkv = [name for name in names if name.endswith("attn.c_attn.weight")]
    groups = [
        {"params": [matrices[name] for name in names if name not in qkv], "parts": 1},
        {"params": [matrices[name] for name in qkv], "parts": 3},
    ]
    groups = [group for group in groups if group["params"]]
    return Muon(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)


class CombinedOptimizer:
    """Several optimizers with the interface of one, as GradScaler and checkpoints need it."""

    def __init__(self, **optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def describe_optimizer(optimizer) -> str:
    """The classes of an optimizer, such as `Muon and AdamW`."""
    combined = isinstance(optimizer, CombinedOptimizer)
    parts = optimizer.optimizers.values() if combined else [optimizer]
    return " and ".join(type(part).__name__ for part in parts)


def save_optimizer(optimizer) -> dict:
    """The state of an optimizer, and the `kind` by which `load_optimizer` recognizes it."""
    return optimizer.state_dict() | {"kind": describe_optimizer(optimizer)}


def load_optimizer(optimizer, saved: dict) -> None:
    """Loads what `save_optimizer` returned.

    Raises SettingError if the optimizer is of other classes, or has other groups of parameters.
    """
    found, reason = describe_optimizer(optimizer), f"the run had {saved.get('kind')}"
    try:
        if found == saved.get("kind"):
            optimizer.load_state_dict(saved)
            return
    except (KeyError, ValueError) as error:
        reason = f"the run had other groups of parameters ({error})"
    raise SettingError(
        f"configure_optimizer in train_gpt2.py builds {found}, but {reason}; undo the edit, or "
        "start a new run from the weights with --init_from and another --log_dir"
    )


def step_if_finite(optimizer, finite: torch.Tensor, device: torch.device) -> None:
    """Updates the parameters if `finite` (bool scalar on the device) is true.

    A fused optimizer decides on the device: it leaves parameters and moments as they are if its
    `found_inf` is 1, as it does for GradScaler. For any other one the host waits for `finite`, and
    in a first step for all: PyTorch's fused SGD would leave its momentum uninitialized.
    """
    is_fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if isinstance(optimizer, CombinedOptimizer):
        for part in optimizer.optimizers.values():
            step_if_finite(part, finite, device)
    elif optimizer.state and is_fused and device.type != "mps":
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        del optimizer.found_inf  # a later step() is not to be skipped
    elif finite:
        optimizer.step()
