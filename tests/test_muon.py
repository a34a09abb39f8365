"""Muon: what it updates and by how much, runs with it, and optimizers that are combined."""

import multiprocessing
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import muon_helpers
import pytest
import torch
from conftest import assert_same_end, assert_same_tensors, losses, run_trainer, train_until
from model_helpers import make_model, relative_error
from muon_helpers import make_weights, set_gradients
from test_run import replace_gradients, train_past_a_nan
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import train_gpt2
from support import devices, muon
from support.distributed import initialize
from support.muon import CombinedOptimizer, Muon, step_if_finite
from support.shards import open_splits
from train_gpt2 import GPT

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
CPU = torch.device("cpu")


def with_gradients(**shape) -> GPT:
    """A small model all of whose parameters have a gradient."""
    model = make_model(**shape)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.gpt2
def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_else():
    model, config = make_model(), train_gpt2.Config(optimizer="muon", weight_decay=0.25)
    optimizer = train_gpt2.configure_optimizer(model, config, "cpu")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        kind: [(names[id(p)], g["weight_decay"]) for g in part.param_groups for p in g["params"]]
        for kind, part in optimizer.optimizers.items()
    }
    layers = range(model.config.n_layer)
    matrices = {f"transformer.h.{i}.{name}.weight" for i in layers for name in MATRICES}
    assert dict(found["muon"]) == dict.fromkeys(matrices, 0.25)
    assert sorted(n for n, _ in found["muon"] + found["adamw"]) == sorted(names.values())
    decayed = {name for name, decay in found["adamw"] if decay}
    assert decayed == {"transformer.wte.weight", "transformer.wpe.weight"}


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """A CPU that multiplies in bfloat16, as far as `configure_optimizer` can see."""
    monkeypatch.setattr(devices, "cpu_flags", lambda: {"avx512_bf16"})


def test_queries_keys_and_values_are_matrices_of_their_own(fast_bfloat16):
    """Three steps are those of PyTorch's Muon on the three matrices, each a parameter by itself."""
    config = train_gpt2.Config(optimizer="muon", weight_decay=0.1)
    model = with_gradients()
    optimizer = train_gpt2.configure_optimizer(model, config, "cpu")
    attn = model.transformer.h[0].attn
    weights = (attn.c_attn.weight, attn.c_proj.weight)
    copies = [[part.detach().clone() for part in w.chunk(n)] for w, n in zip(weights, (3, 1))]
    flat = [copy.requires_grad_() for parts in copies for copy in parts]
    plain = torch.optim.Muon(flat, lr=0.02, momentum=0.95, weight_decay=0.1)
    for step in range(3):
        for weight, parts, n in zip(weights, copies, (3, 1)):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            for part, grad in zip(parts, weight.grad.chunk(n)):
                part.grad = grad.clone()
        optimizer.step()
        plain.step()
    for weight, parts in zip(weights, copies):
        assert torch.equal(weight, torch.cat([part.detach() for part in parts]))


# -------------------------------------------------------------------------------------------------
# The arithmetic


SHAPES = {"wide": (24, 60), "tall": (60, 24), "square": (24, 24)}


def exact_steps(weight: torch.Tensor, gradients, lr: float, momentum: float, decay: float):
    """Muon by its definition, in float64."""
    weight, average = weight.double(), torch.zeros_like(weight).double()
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
        x = (1 - momentum) * gradient.double() + momentum * average
        x /= x.norm().clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x - 4.775 * gram @ x + 2.0315 * gram @ gram @ x
        rows, columns = weight.shape
        weight = (1 - lr * decay) * weight - lr * max(1, rows / columns) ** 0.5 * x
    return weight


def batch_on_cpu(monkeypatch) -> None:
    """Makes Muon orthogonalize matrices of one shape in a batch on a CPU, too, as on a GPU."""
    monkeypatch.setattr(muon, "map", lambda f, stack: f(torch.stack(stack)), raising=False)


@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_steps_are_those_of_pytorch(monkeypatch, shape, batched):
    """Bit for bit on a CPU. In a batch the products may round in another way: PyTorch's Muon and
    ours differ by no more than twice what PyTorch's differs from a computation in float64.

    The gradient of the last of three matrices is too small to be normalized.
    """
    if batched:
        batch_on_cpu(monkeypatch)
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.2)
    ours, theirs, start = (make_weights([shape] * 3) for _ in range(3))
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    gradients = []
    for step in range(5):
        for weights, optimizer in zip((ours, theirs), optimizers):
            set_gradients(weights, seed=step)
            weights[-1].grad *= 1e-9
            optimizer.step()
        gradients.append([weight.grad for weight in ours])
    for a, b, first, grads in zip(ours, theirs, start, zip(*gradients)):
        exact = exact_steps(first.detach(), grads, 0.1, 0.9, 0.2)
        rounding = (b - exact).norm()
        assert 0 < rounding < 0.02 * (first - exact).norm()
        assert (a - b).norm() <= 2 * rounding if batched else torch.equal(a, b)
    assert_same_tensors(*(o.state_dict()["state"] for o in optimizers))


@pytest.mark.parametrize("shape", [(24, 60), (24, 24)])
def test_a_stack_is_orthogonalized_as_its_matrices_are(shape):
    """Nearly all singular values become 0.7 to 1.2, whatever the scale of the other matrices."""
    scales = torch.tensor([1e-3, 1.0, 1e3, 0.0])[:, None, None]
    stack = (torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)) * scales).bfloat16()
    together = muon.orthogonalize(stack)
    assert together.dtype == torch.bfloat16 and together.shape == stack.shape
    for matrix, result in zip(stack[:3], together):
        assert relative_error(result.float(), muon.orthogonalize(matrix).float()) < 0.02
    assert not together[3].any()
    values = torch.linalg.svdvals(together[:3].float())
    assert 0.6 < values.quantile(0.1) and values.max() < 1.25


class Recorder(TorchDispatchMode):
    """Counts the operators that are called, and has the dtypes of their results by their names."""

    def __init__(self):
        super().__init__()
        self.calls, self.dtypes = Counter(), defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.dtypes[func.overloadpacket.__name__].add(result.dtype)
        return result


def test_a_step_reads_nothing_and_multiplies_all_matrices_of_a_shape_at_once():
    """On the device `meta`, which has no values: to read one raises an error."""
    weights = make_weights(muon_helpers.SHAPES, device="meta")
    set_gradients(weights, seed=0)
    groups = [{"params": weights[:-1]}, {"params": weights[-1:], "parts": 3}]
    optimizer = Muon(groups, lr=0.02)
    finite = torch.ones((), dtype=torch.bool, device="meta")
    for _ in range(2):
        with Recorder() as recorder:
            step_if_finite(optimizer, finite, finite.device)
        stacks = 2  # (24, 24), and (24, 60) with (60, 24)
        assert recorder.calls[torch.ops.aten.bmm.default] == 5 * stacks
        assert recorder.calls[torch.ops.aten.baddbmm.default] == 2 * 5 * stacks
        assert recorder.calls[torch.ops.aten.mm.default] == 0
    with pytest.raises(RuntimeError, match="meta"):
        step_if_finite(torch.optim.Muon(weights, lr=0.02), finite, finite.device)


def test_an_update_is_nearly_orthogonal(fast_bfloat16):
    """All singular values of a first update are about muon_lr, whatever those of the gradient."""
    model = with_gradients()
    q = model.transformer.h[0].attn.c_attn.weight[: model.config.n_embd]
    before = q.detach().clone()
    config = train_gpt2.Config(optimizer="muon", weight_decay=0.0, muon_lr=0.5)
    train_gpt2.configure_optimizer(model, config, "cpu").step()
    values = torch.linalg.svdvals(before - q.detach()) / 0.5
    assert 0.6 < values.min() and values.max() < 1.3


def test_products_are_in_float32_on_a_cpu_without_bfloat16(monkeypatch):
    """There a product in bfloat16 takes 20 to 40 times as long."""
    monkeypatch.setattr(devices, "cpu_flags", lambda: {"avx2"})
    model, config = with_gradients(), train_gpt2.Config(optimizer="muon", muon_lr=0.5)
    weight = model.transformer.h[0].mlp.c_fc.weight
    before = weight.detach().clone()
    with Recorder() as recorder:
        train_gpt2.configure_optimizer(model, config, "cpu").step()
    assert recorder.dtypes["mm"] == {torch.float32}
    exact = exact_steps(before, [weight.grad], config.muon_lr, 0.95, config.weight_decay)
    assert relative_error(weight.detach() - before, (exact - before).float()) < 1e-4


# -------------------------------------------------------------------------------------------------
# Ranks


def step_on_ranks(monkeypatch, optimizers) -> tuple[list[int], list[int]]:
    """One step of each optimizer, each in a thread that takes itself for a rank of a group.

    Returns by rank how many elements of matrices it orthogonalized, and how many collectives it
    took part in.
    """
    world_size = len(optimizers)
    local, barrier = threading.local(), threading.Barrier(world_size, timeout=60)
    elements, collectives, sent = [0] * world_size, [0] * world_size, [None] * world_size
    orthogonalize = muon.orthogonalize

    def count(x):
        elements[local.rank] += x.numel() if x.any() else 0  # padding is no work
        return orthogonalize(x)

    def all_gather(output, tensor):
        collectives[local.rank] += 1
        sent[local.rank] = tensor
        barrier.wait()
        output.copy_(torch.cat(sent))
        barrier.wait()

    def step(rank):
        local.rank = rank
        optimizers[rank].step()

    with monkeypatch.context() as patch, ThreadPoolExecutor(world_size) as pool:
        patch.setattr(muon.dist, "is_initialized", lambda: True)
        patch.setattr(muon.dist, "get_world_size", lambda: world_size)
        patch.setattr(muon.dist, "get_rank", lambda: local.rank)
        patch.setattr(muon, "all_gather", all_gather)
        patch.setattr(muon, "orthogonalize", count)
        list(pool.map(step, range(world_size)))
    return elements, collectives


@pytest.mark.parametrize("world_size, n_layer", [(2, 12), (3, 12), (5, 1)])
def test_ranks_share_the_matrices(monkeypatch, world_size, n_layer):
    """Each computes as much as the others, up to one matrix of each shape, and sends it in one
    collective; all end with the bits of one that computes alone."""
    config = train_gpt2.Config(optimizer="muon")
    shape = dict(n_layer=n_layer, vocab_size=300)
    models = [with_gradients(**shape) for _ in range(world_size + 1)]
    optimizers = [train_gpt2.configure_optimizer(m, config, "cpu") for m in models]
    n = models[0].config.n_embd
    for _ in range(2):
        optimizers[-1].step()
        elements, collectives = step_on_ranks(monkeypatch, optimizers[:-1])
        assert sum(elements) == n_layer * 12 * n * n
        assert max(elements) - min(elements) <= n * n + 4 * n * n
        assert collectives == [1] * world_size
    for model, optimizer in zip(models[:-1], optimizers):
        assert_same_tensors(model.state_dict(), models[-1].state_dict())
        assert_same_tensors(optimizer.state_dict(), optimizers[-1].state_dict())


def test_two_processes_have_the_bits_of_one(tmp_path):
    """Through gloo: weights and optimizer's state after three steps."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=muon_helpers.train_in_group, args=(rank, 2, tmp_path))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    for rank in range(2):
        assert_same_tensors(torch.load(tmp_path / f"{rank}.pt"), muon_helpers.train())


# -------------------------------------------------------------------------------------------------
# In the program


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_all_learning_rates_follow_the_schedule(small, schedule):
    """Those of Muon, of the token embedding, and of all other parameters."""
    config = small(
        optimizer="muon", schedule=schedule, max_lr=3e-3, min_lr=3e-4, muon_lr=0.04,
        embedding_lr=0.01, warmup_steps=4, max_steps=20,
    )  # fmt: skip
    run = train_gpt2.open_run(config, initialize(config.device, config.dtype))
    for step, part in ((0, 0.25), (3, 1.0), (4, 1.0), (12, 0.55), (20, 0.1)):
        train_gpt2.train_step(run, train_gpt2.get_lr(step, config), torch.zeros(3))
        rates = {p: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
        for name, parameter in run.model.named_parameters():
            is_matrix = ".h." in name and parameter.dim() == 2
            highest = 0.01 if ".wte." in name else 0.04 if is_matrix else 3e-3
            assert rates[parameter] == pytest.approx(highest * part), name


# -------------------------------------------------------------------------------------------------
# A step whose gradient is not finite, with any optimizer


class Lion(torch.optim.Optimizer):
    """An optimizer as someone writes it who knows nothing of this program (Chen et al. 2023)."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(group["lr"] * torch.sign(0.9 * m + 0.1 * p.grad))
                m.lerp_(p.grad, 0.01)


OPTIMIZERS = {
    "SGD": lambda a, b: torch.optim.SGD([a, b], lr=0.1),
    "SGD with momentum": lambda a, b: torch.optim.SGD([a, b], lr=0.1, momentum=0.9),
    "fused SGD": lambda a, b: torch.optim.SGD([a, b], lr=0.1, momentum=0.9, fused=True),
    "RAdam": lambda a, b: torch.optim.RAdam([a, b], lr=0.1),
    "Lion": lambda a, b: Lion([a, b]),
    "AdamW": lambda a, b: torch.optim.AdamW([a, b], lr=0.1, fused=False),
    "fused AdamW": lambda a, b: torch.optim.AdamW([a, b], lr=0.1, fused=True),
    "Lion and RAdam": lambda a, b: CombinedOptimizer(x=Lion([a]), y=torch.optim.RAdam([b])),
    "Muon": lambda a, b: Muon([a, b], lr=0.1),
    "Muon and fused AdamW": lambda a, b: CombinedOptimizer(
        muon=Muon([{"params": [a], "parts": 1}], lr=0.1),
        adamw=torch.optim.AdamW([b], lr=0.1, fused=True),
    ),
    "fused AdamW and SGD": lambda a, b: CombinedOptimizer(
        x=torch.optim.AdamW([a], lr=0.1, fused=True), y=torch.optim.SGD([b], lr=0.1, momentum=0.9)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_changes_nothing(name):
    """Parameters and state stay as they were, in the first step too; the next step trains."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 8))]
    optimizer = OPTIMIZERS[name](*parameters)

    def step(finite: bool) -> list[torch.Tensor]:
        """The parameters after a step with gradients that are finite or not."""
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        if not finite:
            parameters[1].grad[2, 3] = float("nan")
        step_if_finite(optimizer, torch.tensor(finite), CPU)
        optimizer.zero_grad()
        return [parameter.detach().clone() for parameter in parameters]

    start = [parameter.detach().clone() for parameter in parameters]
    assert_same_tensors(step(finite=False), start)
    first = step(finite=True)
    state = [{k: v.clone() for k, v in optimizer_state(optimizer)}]
    assert_same_tensors(step(finite=False), first)
    assert_same_tensors(dict(optimizer_state(optimizer)), state[0])
    second = step(finite=True)
    for before, between, after in zip(start, first, second):
        assert after.isfinite().all()
        assert not torch.equal(before, between) and not torch.equal(between, after)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps", [0, 1])
def test_muon_keeps_every_bit_in_a_step_that_is_not_finite(value, steps):
    """Those of zeros with a minus sign, too, in the first step and in a later one."""
    weight = nn.Parameter(torch.randn(6, 4))
    weight.data[1] = -0.0
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5)
    for _ in range(steps):
        weight.grad = torch.full_like(weight, -0.0)
        optimizer.step()
    weight.grad = torch.full_like(weight, value)
    before = weight.detach().clone()
    momentum = torch.zeros_like(weight)
    if steps:
        momentum = optimizer.state[weight]["momentum_buffer"].fill_(-0.0).clone()
    step_if_finite(optimizer, torch.tensor(False), CPU)
    for a, b in ((weight.detach(), before), (optimizer.state[weight]["momentum_buffer"], momentum)):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("name", ["Muon", "fused AdamW", "Muon and fused AdamW"])
def test_a_skipped_step_does_not_skip_a_later_plain_one(name):
    parameters = [nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 8))]
    optimizer = OPTIMIZERS[name](*parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    step_if_finite(optimizer, torch.tensor(False), CPU)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(parameters, before))


def optimizer_state(optimizer) -> list:
    """[(name, tensor)] of all state of an optimizer or of combined ones."""
    parts = getattr(optimizer, "optimizers", {"": optimizer})
    return [
        (f"{part}/{i}/{key}", torch.as_tensor(value))
        for part, each in parts.items()
        for i, values in each.state_dict()["state"].items()
        for key, value in values.items()
        if value is not None
    ]


def test_the_state_of_combined_optimizers_is_restored():
    """Two steps are those of an optimizer that got the state after the first one."""
    results = []
    for restored in (False, True):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4, 8))]
        optimizer = OPTIMIZERS["Lion and RAdam"](*parameters)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            if restored:
                state = optimizer.state_dict()
                optimizer = OPTIMIZERS["Lion and RAdam"](*parameters)
                optimizer.load_state_dict(state)
        results.append(parameters)
    assert_same_tensors(*results)
    optimizer.zero_grad()
    assert len(optimizer.param_groups) == 2 and all(p.grad is None for p in parameters)


# -------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize(
    "dtype",
    ["float32", *(pytest.param(d, marks=pytest.mark.faults) for d in ("bfloat16", "float16"))],
)
def test_resume_is_bit_identical(small, tmp_path, monkeypatch, dtype):
    settings = dict(
        optimizer="muon", schedule="linear", dtype=dtype, max_steps=8, checkpoint_every=3,
        val_every=4, max_lr=1e-2,
    )  # fmt: skip
    complete = small(log_dir=str(tmp_path / "complete"), **settings)
    stopped = small(log_dir=str(tmp_path / "stopped"), **settings)
    train_gpt2.train(complete)
    train_until(stopped, 5, monkeypatch)
    train_gpt2.train(stopped)
    assert_same_end(complete, stopped)
    assert losses(complete)[7] < losses(complete)[0] - 0.2


@pytest.mark.faults
def test_another_B_gives_the_same_losses(small, tmp_path):
    """Up to the effect of another order of sums, which Muon's iteration makes larger."""
    settings = dict(optimizer="muon", max_steps=20, val_every=10)
    one = small(log_dir=str(tmp_path / "one"), **settings)
    other = small(log_dir=str(tmp_path / "other"), **settings, B=3)
    train_gpt2.train(one)
    train_gpt2.train(other)
    assert losses(other) == pytest.approx(losses(one), abs=3e-4)
    assert losses(other, "val") == pytest.approx(losses(one, "val"), abs=3e-4)


@pytest.mark.faults
def test_any_number_of_processes_gives_the_same_losses(small, tmp_path):
    settings = dict(optimizer="muon", max_steps=20, val_every=10)
    one = small(log_dir=str(tmp_path / "one"), **settings)
    three = small(log_dir=str(tmp_path / "three"), **settings, B=2)
    train_gpt2.train(one)
    done = run_trainer(three, processes=3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(three) == pytest.approx(losses(one), abs=3e-4)
    assert losses(three, "val") == pytest.approx(losses(one, "val"), abs=3e-4)


def test_a_nan_gradient_skips_the_update_of_both(small, monkeypatch, capsys):
    before, bad, after = train_past_a_nan(small(optimizer="muon"), monkeypatch, capsys)
    for kind in ("muon", "adamw"):
        assert_same_tensors(before[kind]["state"], bad[kind]["state"])
    assert after["adamw"]["state"][0]["step"] == before["adamw"]["state"][0]["step"] + 1
    moved = after["muon"]["state"][0]["momentum_buffer"]
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, before["muon"]["state"][0]["momentum_buffer"])


def test_float16_scales_the_gradients_of_both(small, monkeypatch, capsys):
    config = small(optimizer="muon", dtype="float16", max_steps=8, total_batch_size=64, B=2)
    replace_gradients(monkeypatch, {2, 3, 5}, float("inf"))
    train_gpt2.train(config)
    assert capsys.readouterr().out.count("gradient overflow: update skipped") == 3
    state = torch.load(Path(config.log_dir) / "step_00008" / "train_state.pt")
    assert state["scaler"]["scale"] == 65536 / 8
    assert state["optimizer"]["adamw"]["state"][0]["step"] == 8 - 3
    momenta = [s["momentum_buffer"] for s in state["optimizer"]["muon"]["state"].values()]
    assert max(m.norm() for m in momenta) < 10  # of gradients without the scale


@pytest.mark.gpt2
def test_the_final_checkpoint_opens_in_transformers_with_the_same_loss(small):
    config = small(optimizer="muon", val_every=4, val_tokens=320, max_lr=3e-3)
    train_gpt2.train(config)
    model = AutoModelForCausalLM.from_pretrained(Path(config.log_dir) / "step_00004")
    tokens = torch.from_numpy(open_splits(config.data)["val"].read(0, 321).astype("int64"))
    x, y = tokens[:-1].view(-1, config.T), tokens[1:].view(-1, config.T)
    with torch.no_grad():
        logits = model(x).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    assert loss.item() == pytest.approx(losses(config, "val")[4], abs=1e-4)
