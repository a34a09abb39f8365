"""Optimizer groups, schedule, and one training step, down to its numbers."""

import math

import pytest
import torch
from model_helpers import make_model, text_batch
from torch import nn

import train_gpt2
from support import muon
from support.distributed import initialize
from support.errors import SettingError
from support.fused_loss import TrainingModel
from support.muon import load_optimizer, save_optimizer
from train_gpt2 import GPT, GPTConfig

# -------------------------------------------------------------------------------------------------
# Groups


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    """Weight decay on the weights of linear layers and embeddings, the tied one once."""
    model = make_model()
    config = train_gpt2.Config(weight_decay=0.25, max_lr=1e-3, beta1=0.8, beta2=0.9, eps=1e-7)
    groups = train_gpt2.configure_optimizer(model, config, "cpu").param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], group["weight_decay"]) for group in groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    matrices = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    assert dict(found) == {name: 0.25 if i in matrices else 0.0 for i, name in names.items()}
    for group in groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.9), 1e-7)


@pytest.mark.parametrize("embedding_lr, expected", [(0.0, 1e-3), (4e-3, 4e-3)])
def test_the_token_embedding_has_a_learning_rate_of_its_own(small, embedding_lr, expected):
    """AdamW's first step changes each weight by the rate, up to eps; without it, by max_lr."""
    config = small(max_lr=1e-3, embedding_lr=embedding_lr, weight_decay=0.0)
    run = train_gpt2.open_run(config, initialize(config.device, config.dtype))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    train_gpt2.train_step(run, config.max_lr, torch.zeros(3))
    for name, parameter in run.model.named_parameters():
        changed = (parameter - before[name]).abs().max().item()
        rate = expected if name == "transformer.wte.weight" else 1e-3
        assert changed == pytest.approx(rate, rel=1e-3), name


class EditedBlock(train_gpt2.Block):
    """A block with parameters whose names and shapes GPT-2 does not have."""

    def __init__(self, config):
        super().__init__(config)
        self.attn.gate = nn.Linear(config.n_embd, config.n_embd)
        self.extra = nn.Parameter(torch.empty(3, config.n_embd))
        self.scales = nn.Parameter(torch.empty(2, 2, config.n_embd))

    def forward(self, x, *arguments):
        x = super().forward(x, *arguments) * torch.sigmoid(self.attn.gate(x))
        return x + self.extra.sum(dim=0) + self.scales.sum(dim=(0, 1))


NEW = {"attn.gate.weight": "muon", "attn.gate.bias": "adamw", "extra": "muon", "scales": "adamw"}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_new_parameters_of_a_block_are_trained(monkeypatch, small, optimizer):
    """Matrices by Muon, vectors and others by AdamW; without Muon all by AdamW."""
    monkeypatch.setattr(train_gpt2, "Block", EditedBlock)
    config = small(optimizer=optimizer)
    run = train_gpt2.open_run(config, initialize(config.device, config.dtype))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    train_gpt2.train_step(run, config.max_lr, torch.zeros(3))
    parts = getattr(run.optimizer, "optimizers", {"adamw": run.optimizer})
    for layer in range(config.n_layer):
        for name, kind in NEW.items():
            name = f"transformer.h.{layer}.{name}"
            parameter = run.model.get_parameter(name)
            assert not torch.equal(parameter, before[name]), name
            assert parameter.grad is None, name
            trained_by = [k for k, part in parts.items() if parameter in part.state]
            assert trained_by == [kind if optimizer == "muon" else "adamw"], name


@pytest.mark.parametrize("change", ["one left out", "one twice"])
def test_a_parameter_that_is_not_in_exactly_one_group_is_an_error(monkeypatch, change):
    original = muon.configure_muon

    def configure_muon(matrices, *arguments):
        if change == "one twice":
            optimizer = original(matrices, *arguments)
            optimizer.param_groups[0]["params"].append(matrices["transformer.h.1.mlp.c_fc.weight"])
            return optimizer
        return original(dict(list(matrices.items())[1:]), *arguments)

    monkeypatch.setattr(muon, "configure_muon", configure_muon)
    with pytest.raises(AssertionError, match="exactly one group"):
        train_gpt2.configure_optimizer(
            make_model(vocab_size=300), train_gpt2.Config(optimizer="muon"), "cpu"
        )


# -------------------------------------------------------------------------------------------------
# Schedule


@pytest.mark.parametrize(
    "step, lr",
    [
        (0, 6e-5),  # a tenth of the warm-up, and not zero
        (4, 3e-4),
        (9, 6e-4),  # the last step of the warm-up
        (10, 6e-4),  # the first of the cosine
        (35, 6e-5 + 5.4e-4 * (1 + math.sqrt(0.5)) / 2),
        (60, 3.3e-4),  # half way
        (85, 6e-5 + 5.4e-4 * (1 - math.sqrt(0.5)) / 2),
        (109, 6e-5 + 5.4e-4 * (1 - math.cos(math.pi / 100)) / 2),
        (110, 6e-5),
        (100_000, 6e-5),
    ],
)
def test_learning_rate(step, lr):
    """Ten steps of warm-up to 6e-4, then a cosine that reaches 6e-5 at step 110."""
    config = train_gpt2.Config(max_lr=6e-4, min_lr=6e-5, warmup_steps=10, max_steps=110)
    assert train_gpt2.get_lr(step, config) == pytest.approx(lr, rel=1e-9)


@pytest.mark.parametrize("warmup_steps, max_steps", [(0, 1), (0, 10), (10, 10), (5, 6)])
def test_learning_rate_of_odd_schedules(warmup_steps, max_steps):
    """No warm-up, only warm-up, one step: every step has a rate of at most max_lr."""
    config = train_gpt2.Config(warmup_steps=warmup_steps, max_steps=max_steps)
    rates = [train_gpt2.get_lr(step, config) for step in range(max_steps + 1)]
    assert all(0 < rate <= config.max_lr for rate in rates) and max(rates) == config.max_lr
    assert rates[-1] == config.min_lr


def test_linear_schedule():
    """A straight line from max_lr after the warm-up to min_lr at the end, 0 included."""
    config = train_gpt2.Config(
        schedule="linear", max_lr=1.0, min_lr=0.0, warmup_steps=10, max_steps=110
    )
    rates = [train_gpt2.get_lr(step, config) for step in (9, 10, 35, 60, 109, 110, 111)]
    assert rates == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.01, 0.0, 0.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("cooldown", [0.0, 0.25, 0.4, 1.0])
def test_cooldown_is_the_share_of_the_steps_in_which_the_rate_falls(schedule, cooldown):
    """Warm-up, then max_lr, then the schedule of a run that has no other steps than the last."""
    shape = dict(schedule=schedule, max_lr=1.0, min_lr=0.1)
    config = train_gpt2.Config(**shape, cooldown=cooldown, warmup_steps=10, max_steps=110)
    falling = round(100 * cooldown)
    alone = train_gpt2.Config(**shape, warmup_steps=0, max_steps=falling)
    expected = [(step + 1) / 10 for step in range(10)] + [1.0] * (100 - falling)
    expected += [train_gpt2.get_lr(step, alone) for step in range(falling + 1)]
    assert [train_gpt2.get_lr(step, config) for step in range(111)] == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize(
    "settings, steps",
    [
        (dict(max_lr=2e-2), 100),
        pytest.param(
            dict(optimizer="muon", max_lr=2e-2, muon_lr=0.05), 60, marks=pytest.mark.faults
        ),
    ],
    ids=["adamw", "muon"],
)
def test_one_batch_is_memorized(small, settings, steps):
    """4 x 32 tokens of input.txt: a loss under 0.05 within 100 steps, with Muon within 60."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=2000))
    training, (x, y) = TrainingModel(model, compiled=False), text_batch(4, 32)
    x, y = x % 2000, y % 2000  # a smaller vocabulary, for speed
    optimizer = train_gpt2.configure_optimizer(model, small(**settings), "cpu")
    best = math.inf
    for _ in range(steps):
        loss = training(x, y) / y.numel()
        best = min(best, loss.item())
        if best < 0.05:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert best < 0.05


GOLDEN = {
    "adamw": {
        "loss": 10.805065,
        "norm of the gradient": 4.7448421,
        "sum of |w|": 113248.54,
        "sum of |change|": 3520.9738,
        "loss on the same rows after it": 10.310836,
    },
    "muon": {
        "loss": 10.805065,
        "norm of the gradient": 4.7448425,
        "sum of |w|": 113240.72,
        "sum of |change|": 3522.2387,
        "loss on the same rows after it": 10.248838,
    },
}


@pytest.mark.gpt2
@pytest.mark.parametrize("optimizer", GOLDEN)
def test_golden_step(small, optimizer):
    """One step of a fixed run, from the text file to the updated weights.

    Any change of initialization, order of the data, model, loss, clipping, schedule or optimizer
    moves these numbers. If the change is meant to do so, measure them again and say so in the
    commit; a change that should make the program only faster or clearer must not move them.
    """
    tiny = dict(n_layer=4, n_head=4, n_embd=128, T=128)
    config = small(**tiny, B=1, total_batch_size=256, device="cpu", optimizer=optimizer)
    run = train_gpt2.open_run(config, initialize(config.device, config.dtype))
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    lr = train_gpt2.get_lr(run.step, run.config)
    figures, _ = train_gpt2.train_step(run, lr, torch.zeros(3))
    pairs = list(zip(run.model.parameters(), before))
    x, y = run.loader.batch(0, 2)
    with torch.no_grad():
        found = {
            "loss": figures["loss"].item(),
            "norm of the gradient": figures["norm"].item(),
            "sum of |w|": sum(new.abs().double().sum().item() for new, _ in pairs),
            "sum of |change|": sum((new - old).abs().double().sum().item() for new, old in pairs),
            "loss on the same rows after it": run.model(x.flatten(0, 1), y.flatten(0, 1))[1].item(),
        }
    assert found == pytest.approx(GOLDEN[optimizer], rel=1e-4)


def test_a_state_without_its_kind_is_refused_in_one_line():
    """A training state of an earlier version of this program."""
    optimizer = train_gpt2.configure_optimizer(make_model(), train_gpt2.Config(), "cpu")
    with pytest.raises(SettingError, match="builds AdamW, but the run had None"):
        load_optimizer(optimizer, optimizer.state_dict())
    load_optimizer(optimizer, save_optimizer(optimizer))
