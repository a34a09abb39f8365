"""Muon, with the work shared by all ranks, and several optimizers used as one."""

import math

import torch
import torch.distributed as dist

from support.devices import choose_dtype
from support.errors import SettingError

# One function: PyTorch 2.13 warns of the second name, earlier versions lack the first.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for weights that hold several matrices, its work shared by ranks.

    params: weights (rows, columns), or groups of them; the key `parts` of a group says how many
    matrices each of its weights holds, one above the other
    dtype: of the products that orthogonalize
    Every rank keeps every momentum, which costs little, so the optimizer's state is the same on all
    ranks. On a CPU a step in bfloat16 has the bits of torch.optim.Muon's, on any number of ranks.
    """

    def __init__(
        self, params, lr: float, momentum: float = 0.95, weight_decay=0.1, dtype=torch.bfloat16
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, parts=1))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, finite: torch.Tensor | None = None) -> None:
        """Updates the weights; the host does not wait for the device.

        finite: bool scalar on the device; if false, weights and momentum stay as they are
        """
        if finite is None:
            device = self.param_groups[0]["params"][0].device
            finite = torch.ones((), dtype=torch.bool, device=device)
        updates = [
            (weight, group, self.average_gradient(weight, group["momentum"], finite))
            for group in self.param_groups
            for weight in group["params"]
            if weight.grad is not None
        ]
        orthogonalize_shared([m for _, group, u in updates for m in u.chunk(group["parts"])])
        for weight, group, update in updates:
            lr, ratio = group["lr"], weight.size(0) / group["parts"] / weight.size(1)
            new = weight.mul(1 - lr * group["weight_decay"])
            new.add_(update, alpha=-lr * math.sqrt(max(1, ratio)))
            torch.where(finite, new, weight, out=weight)

    def average_gradient(self, weight, decay: float, finite: torch.Tensor) -> torch.Tensor:
        """Updates the momentum; returns Nesterov's average, which is orthogonalized."""
        if not self.state[weight]:
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        momentum = self.state[weight]["momentum_buffer"]
        new = momentum.lerp(weight.grad, 1 - decay)
        torch.where(finite, new, momentum, out=momentum)
        return weight.grad.lerp(new, decay).to(self.dtype)


def orthogonalize_shared(matrices: list[torch.Tensor]) -> None:
    """Orthogonalizes matrices (rows, columns) in place: a share on each rank.

    Those of one shape, or of its transpose, are multiplied as one batch, and one collective
    exchanges the results. On a CPU, where a batch is no faster, they are multiplied one by one: the
    rounding in a batch may depend on its size, and so on the number of ranks.
    """
    rank, world_size = 0, 1
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    stacks, done = {}, []
    for matrix in matrices:
        wide = matrix.mT if matrix.size(0) > matrix.size(1) else matrix
        stacks.setdefault(wide.shape, []).append(wide)
    for stack in stacks.values():  # padded: the shares of all ranks have one size
        stack += [torch.zeros_like(stack[0]) for _ in range(-len(stack) % world_size)]
        own = stack[rank::world_size]
        on_cpu = own[0].device.type == "cpu"
        done += map(orthogonalize, own) if on_cpu else orthogonalize(torch.stack(own))
    gathered = sent = torch.cat([matrix.flatten() for matrix in done])
    if world_size > 1:
        gathered = sent.new_empty(world_size * len(sent))
        all_gather(gathered, sent)
    for r, share in enumerate(gathered.chunk(world_size)):
        targets = [matrix for stack in stacks.values() for matrix in stack[r::world_size]]
        for matrix, result in zip(targets, share.split([m.numel() for m in targets])):
            matrix.copy_(result.view_as(matrix))


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """`x` with all singular values replaced by about 1 (0.7 to 1.2).

    x: (rows, columns), or (n, rows, columns) for n matrices at once; rows <= columns
    By five Newton-Schulz steps with the coefficients of Jordan et al. 2024.
    """
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(5):
        gram = x @ x.mT  # (..., rows, rows)
        polynomial = add_product(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = add_product(x, polynomial, x, beta=3.4445)
    return x


def configure_muon(
    matrices: dict[str, torch.Tensor], lr: float, momentum: float, weight_decay: float
) -> Muon:
    """Muon for named weights; those of queries, keys and values hold three matrices each.

    Its products are in bfloat16, or in float32 on a CPU that multiplies bfloat16 slowly.
    """
    # Checkpoints hold the momentum in this order.
    names = sorted(matrices, key=lambda name: -matrices[name].numel())
    qkv = [name for name in names if name.endswith("attn.c_attn.weight")]
    groups = [
        {"params": [matrices[name] for name in names if name not in qkv], "parts": 1},
        {"params": [matrices[name] for name in qkv], "parts": 3},
    ]
    groups = [group for group in groups if group["params"]]
    slow = choose_dtype("auto", matrices[names[0]].device) == torch.float32
    dtype = torch.float32 if slow else torch.bfloat16
    return Muon(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, dtype=dtype)


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

    Muon and fused optimizers decide on the device: they leave parameters and moments as they are if
    it is false, a fused one by its `found_inf`, as for GradScaler. For any other one the host waits
    for `finite`, and for a fused one in its first step: PyTorch's fused SGD would leave its
    momentum uninitialized.
    """
    is_fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    if isinstance(optimizer, CombinedOptimizer):
        for part in optimizer.optimizers.values():
            step_if_finite(part, finite, device)
    elif isinstance(optimizer, Muon):
        optimizer.step(finite)
    elif optimizer.state and is_fused and device.type != "mps":
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        del optimizer.found_inf  # a later step() is not to be skipped
    elif finite:
        optimizer.step()
