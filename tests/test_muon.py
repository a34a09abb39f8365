"""Muon: what it updates and by how much, and runs with it that are as exact as with AdamW."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_end, assert_same_tensors, losses, run_trainer
from test_model import make, play
from test_run import spoil_gradients, train_past_a_nan, train_until
from transformers import AutoModelForCausalLM

import train_gpt2
from train_gpt2 import GPT, GPTConfig, TrainingModel

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def with_gradients(**shape) -> GPT:
    """A small model all of whose parameters have a gradient."""
    model = make(**shape)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def test_muon_has_the_matrices_of_the_blocks_and_adamw_all_else():
    model, config = make(), train_gpt2.Config(optimizer="muon", weight_decay=0.25)
    optimizer = train_gpt2.configure_optimizer(model, config, "cpu")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        kind: [(names[id(p)], g["weight_decay"]) for g in part.param_groups for p in g["params"]]
        for kind, part in optimizer.both.items()
    }
    layers = range(model.config.n_layer)
    matrices = {f"transformer.h.{i}.{name}.weight" for i in layers for name in MATRICES}
    assert dict(found["muon"]) == dict.fromkeys(matrices, 0.25)
    assert sorted(n for n, _ in found["muon"] + found["adamw"]) == sorted(names.values())
    decayed = {name for name, decay in found["adamw"] if decay}
    assert decayed == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_queries_keys_and_values_are_matrices_of_their_own():
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


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_matrices(monkeypatch, world_size):
    """Each computes as much as the others, and all end with the bits of one that computes alone."""
    config = train_gpt2.Config(optimizer="muon")
    models = [with_gradients(n_layer=12) for _ in range(world_size + 1)]
    optimizers = [train_gpt2.configure_optimizer(m, config, "cpu") for m in models]
    for _ in range(2):
        optimizers[-1].step()
    monkeypatch.setattr(train_gpt2.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train_gpt2.dist, "get_world_size", lambda: world_size)
    for _ in range(2):
        calls = []  # of broadcast, by all processes: (tensor, owner)

        def broadcast(tensor, src, async_op, calls=calls):
            calls.append((tensor, src))
            return SimpleNamespace(wait=lambda: None)

        monkeypatch.setattr(train_gpt2.dist, "broadcast", broadcast)
        for rank, optimizer in enumerate(optimizers[:-1]):
            monkeypatch.setattr(train_gpt2.dist, "get_rank", lambda rank=rank: rank)
            optimizer.step()
        each = len(calls) // world_size
        sent = [calls[i : i + each] for i in range(0, len(calls), each)]
        shares = [0] * world_size
        for copies in zip(*sent, strict=True):
            owner = {src for _, src in copies}.pop()
            shares[owner] += copies[owner][0].numel()
            assert all(src == owner for _, src in copies)
            with torch.no_grad():
                for tensor, _ in copies:
                    tensor.copy_(copies[owner][0])
        assert max(shares) < 1.2 * min(shares)
    for model, optimizer in zip(models[:-1], optimizers):
        assert_same_tensors(model.state_dict(), models[-1].state_dict())
        assert_same_tensors(optimizer.state_dict(), optimizers[-1].state_dict())


def test_an_update_is_nearly_orthogonal():
    """All singular values of a first update are about muon_lr, whatever those of the gradient."""
    model = with_gradients()
    q = model.transformer.h[0].attn.c_attn.weight[: model.config.n_embd]
    before = q.detach().clone()
    config = train_gpt2.Config(optimizer="muon", weight_decay=0.0, muon_lr=0.5)
    train_gpt2.configure_optimizer(model, config, "cpu").step()
    values = torch.linalg.svdvals(before - q.detach()) / 0.5
    assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rates_of_both_rise_and_fall_together(small, schedule):
    config = small(
        optimizer="muon", schedule=schedule, max_lr=3e-3, min_lr=3e-4, muon_lr=0.04,
        warmup_steps=4, max_steps=20,
    )  # fmt: skip
    run, _ = train_gpt2.open_run(config, train_gpt2.set_up_processes(config))
    for step, part in ((0, 0.25), (3, 1.0), (4, 1.0), (12, 0.55), (20, 0.1)):
        train_gpt2.train_step(run, train_gpt2.get_lr(step, config), torch.zeros(3))
        for kind, highest in (("muon", 0.04), ("adamw", 3e-3)):
            rates = [group["lr"] for group in run.optimizer.both[kind].param_groups]
            assert rates == pytest.approx([highest * part] * len(rates))


def test_linear_schedule():
    """A straight line from max_lr after the warm-up to min_lr at the end, 0 included."""
    config = train_gpt2.Config(
        schedule="linear", max_lr=1.0, min_lr=0.0, warmup_steps=10, max_steps=110
    )
    rates = [train_gpt2.get_lr(step, config) for step in (9, 10, 35, 60, 109, 110, 111)]
    assert rates == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.01, 0.0, 0.0])


@pytest.mark.faults
def test_one_batch_is_learned_by_heart(small):
    """4 x 32 tokens of input.txt: a loss under 0.05 within 60 steps."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32))
    training, (x, y) = TrainingModel(model, compiled=False), play(4, 32)
    config = small(optimizer="muon", max_lr=2e-2, muon_lr=0.05)
    optimizer = train_gpt2.configure_optimizer(model, config, "cpu")
    best = math.inf
    for _ in range(60):
        loss = training(x, y) / y.numel()
        best = min(best, loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert best < 0.05


# -------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize(
    "dtype",
    ["float32", *(pytest.param(d, marks=pytest.mark.faults) for d in ("bfloat16", "float16"))],
)
def test_resume_is_bit_identical(small, tmp_path, monkeypatch, dtype):
    settings = dict(
        optimizer="muon", schedule="linear", dtype=dtype, max_steps=12, checkpoint_every=5,
        val_every=4,
    )  # fmt: skip
    whole = small(log_dir=str(tmp_path / "whole"), **settings)
    stopped = small(log_dir=str(tmp_path / "stopped"), **settings)
    train_gpt2.train(whole)
    train_until(stopped, 8, monkeypatch)
    train_gpt2.train(stopped)
    assert_same_end(whole, stopped)
    assert losses(whole)[11] < losses(whole)[0] - 0.2


@pytest.mark.faults
def test_another_B_gives_the_same_losses(small, tmp_path):
    """Up to what bfloat16, in which Muon's iteration is done, makes of another order of sums."""
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
    spoil_gradients(monkeypatch, {2, 3, 5}, float("inf"))
    train_gpt2.train(config)
    assert capsys.readouterr().out.count("gradient overflow: update skipped") == 3
    state = torch.load(Path(config.log_dir) / "step_00008" / "train_state.pt")
    assert state["scaler"]["scale"] == 65536 / 8
    assert state["optimizer"]["adamw"]["state"][0]["step"] == 8 - 3
    momenta = [s["momentum_buffer"] for s in state["optimizer"]["muon"]["state"].values()]
    assert max(m.norm() for m in momenta) < 10  # of gradients without the scale


def test_the_final_checkpoint_opens_in_transformers_with_the_same_loss(small):
    config = small(optimizer="muon", val_every=4, val_tokens=320, max_lr=3e-3)
    train_gpt2.train(config)
    model = AutoModelForCausalLM.from_pretrained(Path(config.log_dir) / "step_00004")
    tokens = torch.from_numpy(train_gpt2.open_tokens(config.data)[1].read(0, 321).astype("int64"))
    x, y = tokens[:-1].view(-1, config.T), tokens[1:].view(-1, config.T)
    with torch.no_grad():
        logits = model(x).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    assert loss.item() == pytest.approx(losses(config, "val")[4], abs=1e-4)


def test_a_run_from_before_there_was_a_choice_goes_on(small):
    """Settings that a run does not know yet count as what they are by default."""
    config = small(max_steps=4)
    train_gpt2.train(config)
    path = Path(config.log_dir) / "run.json"
    facts = json.loads(path.read_text())
    for name in ("optimizer", "schedule", "muon_lr", "muon_momentum"):
        del facts["settings"][name]
    path.write_text(json.dumps(facts))
    with pytest.raises(train_gpt2.SettingError, match="optimizer='muon'.*optimizer='adamw'"):
        train_gpt2.train(small(max_steps=6, optimizer="muon"))
    assert train_gpt2.train(small(max_steps=6)) == 0
    assert list(losses(config)) == list(range(6))
