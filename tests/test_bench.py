"""bench.py: the work that is timed, the tables and figures, and programs that fail."""

import json
import math
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, environment
from hellaswag_helpers import make_examples, write_examples

import bench
import train_gpt2
from support.distributed import Runtime
from support.errors import SettingError, UserError

TINY = dict(n_layer=1, n_head=2, n_embd=16, T=32, B=2, rounds=1, dtype="float32", device="cpu")
PADDED = train_gpt2.GPTConfig.padded_vocab_size

# A program like nanoGPT: the model in model.py, without targets logits of the last position only,
# and statements that must not run.
PEER = """
import torch
from dataclasses import dataclass
from torch import nn
from torch.nn import functional as F
raise SystemExit("ran as a script")

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
    def forward(self, idx, targets=None):
        x = self.wte(idx)
        if targets is None:
            return self.head(x[:, [-1]]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def peer(tmp_path):
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer/model.py").write_text(PEER)
    return tmp_path / "peer"


def build(name: str, **settings):
    return bench.PROGRAMS[name](bench.Config(**TINY | settings))


@pytest.mark.parametrize("name", ["transformers", "ours", "peer"])
def test_every_program_does_the_three_things(name, peer, monkeypatch):
    """Trains, scores and samples."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    data = write_examples(peer / "data.jsonl", make_examples(3))
    program = build(name, peer=str(peer), hellaswag_data=str(data))
    before = [p.detach().clone() for p in program.model.parameters()]
    result = program.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, program.model.parameters()))
    assert all(p.grad is None for p in program.model.parameters())
    assert result["seconds"] > 0 and program.peak_mb() > 100
    assert set(result["parts"]) == {"forward", "backward", "optimizer"} | (
        {"loss"} if name != "peer" else set()
    )
    assert program.hellaswag()["count"] == 3
    assert program.sample()["count"] == 4 * 120


def test_both_optimizers_are_timed(monkeypatch, capsys):
    program = build("ours")
    before = program.model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    assert min(program.optimizers().values()) > 0
    assert not torch.equal(before, program.model.transformer.h[0].mlp.c_fc.weight)
    results = [{"adamw": 9, "muon": 9}, {"adamw": 0.1, "muon": 0.3}, {"adamw": 0.2, "muon": 0.5}]
    monkeypatch.setattr(bench, "take_turns", lambda *_: {"ours": results})
    found = bench.bench_optimizer(bench.Config(**TINY), {})
    assert found["muon"]["median"] == pytest.approx(400) and "| muon" in capsys.readouterr().out


def test_our_step_is_that_of_the_trainer():
    """The weights after a step are those of the plain loss and AdamW."""
    program = build("ours")
    model = build("ours").model
    parts = []
    program.step(parts.append)
    assert parts == ["forward", "loss", "backward", "optimizer"]
    optimizer = train_gpt2.configure_optimizer(model, train_gpt2.Config(), "cpu")
    model(*program.batch)[1].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for a, b in zip(program.model.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_every_rung_has_the_same_loss(monkeypatch):
    """Without bfloat16 all rungs compute the same, to the sixth digit."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        torch.nn.functional.scaled_dot_product_attention)  # fmt: skip
    monkeypatch.setattr(train_gpt2.GPTConfig, "padded_vocab_size", PADDED)
    monkeypatch.setattr(torch, "compile", lambda f=None, **_: f)
    found = {}
    for rung in ("float32", "flash", "rows", "fused", "chunks"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                          torch.nn.functional.scaled_dot_product_attention)  # fmt: skip
            patch.setattr(train_gpt2.GPTConfig, "padded_vocab_size", PADDED)
            program = build(rung)
            rows = program.model.lm_head.out_features
            assert rows == (50304 if "rows" in program.has else 50257)
            # The same number of random numbers, so that all rungs have the same weights.
            torch.manual_seed(0)
            with torch.no_grad():
                for parameter in program.model.parameters():
                    shape = [min(n, 50257) if n > 50000 else n for n in parameter.shape]
                    parameter.zero_()[: shape[0]] = torch.randn(shape) * 0.1
            found[rung] = [program.train()["loss"] for _ in range(2)]
    for rung, values in found.items():
        assert values == pytest.approx(found["float32"], abs=1e-5), rung
    assert found["float32"][0] != found["float32"][1]


def test_rungs_that_a_device_does_not_have_are_named():
    for rung in ("TF32", "bfloat16", "float32"):
        obstacle = {"TF32": "no tensor cores", "bfloat16": "no bfloat16 units"}.get(rung)
        assert bench.find_obstacle(rung, bench.Config(**TINY)) == obstacle
    assert bench.find_obstacle("bfloat16", bench.Config(**TINY | {"dtype": "bfloat16"})) is None


def run(*arguments, **kwargs) -> subprocess.CompletedProcess:
    settings = [f"--{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, str(ROOT / "bench.py"), *settings, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=240, **kwargs
    )


@pytest.mark.faults
def test_a_table_and_its_figures(tmp_path, peer):
    """Programs run in processes of their own; one that fails is named, and the others continue."""
    (peer / "model.py").write_text(PEER.replace("self.wte(idx)", "self.wte(idx + 60000)"))
    path = tmp_path / "out.json"
    done = run("--only=sample", f"--peer={peer}", f"--json={path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sample: peer failed: IndexError" in done.stderr
    found = json.loads(path.read_text())
    assert set(found) == {"facts", "sample"}
    assert set(found["sample"]) == {"transformers", "ours", "ours, int8"}
    ours, theirs = found["sample"]["ours"], found["sample"]["transformers"]
    assert 0 < ours["least"] <= ours["median"] <= ours["most"]
    assert f"{ours['median'] / theirs['median']:.2f} x" in done.stdout
    assert found["facts"]["date"] == time.strftime("%Y-%m-%d")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "peer"]


def test_the_command_prints_a_table_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    arguments = [f"--{name}={value}" for name, value in TINY.items()]
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments, "--only=optimizer", f"--json={path}"])
    monkeypatch.chdir(tmp_path)
    assert bench.main() == 0
    found, out = json.loads(path.read_text())["optimizer"], capsys.readouterr().out
    for name in ("adamw", "muon"):
        assert 0 < found[name]["least"] <= found[name]["median"] <= found[name]["most"]
        assert re.search(rf"\| {name} +\| {found[name]['median']:,.1f} +\|", out)
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_a_step_is_compared_with_the_fastest_product(monkeypatch, capsys):
    """Products at 1e9 and at 4e9 FLOP/s: a step at 1e9 is a quarter of what the machine can."""
    config, machine = bench.Config(**TINY), {"peak_flops": None, "dtype": "float32"}
    count = config.B * config.T
    seconds = count * bench.flops_per_token(config) / 1e9
    step = {"seconds": seconds, "count": count, "parts": {"forward": 0.5}, "loss": 9.0}
    step |= {"peak_mb": 1.0, "wall": 1.0}
    results = {
        "train": {"ours": [step] * 2},
        "matmul": {"ours": [{"flops": 1e9}, {"flops": 4e9}]},
    }
    monkeypatch.setattr(bench, "take_turns", lambda part, *_: results[part])
    assert bench.bench_matmul(config, machine)["measured"] == 4e9
    found = bench.bench_train(config, machine)
    assert found["ours"]["of_measured_matmul"] == pytest.approx(0.25)
    assert found["ours"]["ms"] == pytest.approx(1e3 * seconds)
    parts = dict(forward=500, loss=None, backward=None, optimizer=None)
    assert found["ours"]["parts_ms"] == parts and found["ours"]["mfu"] is None
    assert re.search(r"\| ours +\| [\d,]+ +\| 500 +\|( - +\|){4} 25% +\|", capsys.readouterr().out)


def test_the_ladder_is_climbed(monkeypatch, capsys):
    """On a CPU: TF32 is named as missing, the other rungs have their figures."""
    rungs = {name: bench.RUNGS[name] for name in ("float32", "TF32", "flash")}
    monkeypatch.setattr(bench, "RUNGS", rungs)
    seconds = {"float32": 0.2, "flash": 0.1}

    def take_turns(part, names, config):
        turn = {"seconds": seconds[names[0]], "count": 64, "peak_mb": 1.0, "loss": 10.0}
        return {names[0]: [turn | {"wall": 9.0}] * 2}

    monkeypatch.setattr(bench, "take_turns", take_turns)
    found = bench.bench_ladder(bench.Config(**TINY), {"peak_flops": 1e12})
    assert found["TF32"] == {"lacking": "no tensor cores"}
    assert found["float32"]["ms"] == pytest.approx(200)
    assert found["float32"]["tokens_per_s"] == pytest.approx(2 * 32 / 0.2)
    step = found["flash"]
    assert step["gain"] == pytest.approx(2) and step["first_step_s"] == 9 and step["loss"] == 10
    assert step["peak_mb"] == 1 and 0 < step["mfu"] < 1
    assert "no tensor cores" in (out := capsys.readouterr().out) and "| 2.00 x" in out


def test_rates_are_medians_of_the_timed_turns(monkeypatch, capsys):
    """The first turn, which warms up, does not count, except for the memory."""
    times = {"transformers": [100, 2, 4, 3], "ours": [100, 1, 1.5, 0.5]}
    results = {
        name: [{"seconds": s, "count": 12, "peak_mb": s} for s in seconds]
        for name, seconds in times.items()
    }
    monkeypatch.setattr(bench, "take_turns", lambda *_: results)
    found = bench.PARTS["sample"](bench.Config(**TINY), {"dtype": "float32"})
    expected = dict(median=4.0, least=3.0, most=6.0, first=0.12, peak_mb=100, of_transformers=1.0)
    assert found["transformers"] == expected
    assert found["ours"]["median"] == 12.0 and "3.00 x" in (out := capsys.readouterr().out)
    assert "first turn" in out and re.search(r"\| ours +\| 12.0 +\| [^|]+\| 0.1 +\| 3.00 x", out)


def test_after_a_turn_a_gpu_has_its_memory_back(monkeypatch):
    """Gradients too: the other programs of a part take their turns on the same GPU."""
    program, freed, ids = build("ours"), [], torch.zeros(1, 4, dtype=torch.int64)

    def train() -> dict:
        program.model(ids, ids)[1].backward()
        return {"seconds": 1}

    program.device, program.train = torch.device("cuda"), train
    monkeypatch.setattr(program, "peak_mb", lambda: 7.0)
    monkeypatch.setattr(
        torch.cuda, "empty_cache",
        lambda: freed.append(all(p.grad is None for p in program.model.parameters())),
    )  # fmt: skip
    monkeypatch.setitem(bench._programs, "ours", program)
    assert bench.do_turn("ours", bench.Config(**TINY), "train") == {"seconds": 1, "peak_mb": 7.0}
    assert freed == [True]


@pytest.mark.parametrize("arguments, B", [([], 32), (["--ladder"], 16), (["--ladder", "--B=3"], 3)])
def test_rows_of_a_step_on_a_gpu(monkeypatch, arguments, B):
    """The ladder has those of Karpathy's lecture."""
    found = []
    runtime = Runtime(0, 1, torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(bench, "choose_runtime", lambda config: runtime)
    monkeypatch.setattr(bench, "describe_machine", lambda _: dict(device="", versions={}, date="",
                                                                 command=""))  # fmt: skip
    for name in ("bench_ladder", "bench_train"):
        monkeypatch.setattr(bench, name, lambda config, machine: found.append(config.B))
    monkeypatch.setitem(bench.PARTS, "train", bench.bench_train)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only=train", *arguments])
    assert bench.main() == 0 and found == [B]


def test_flops_are_those_of_the_model():
    c = bench.Config()
    with torch.device("meta"):
        model = train_gpt2.GPT(train_gpt2.GPTConfig(n_layer=12))
    assert bench.flops_per_token(c) == model.flops_per_token(1024)
    assert math.isclose(bench.flops_per_token(c), 7.98e8, rel_tol=0.01)


def test_examples_are_evenly_from_the_file(tmp_path):
    examples = make_examples(9)
    data = write_examples(tmp_path / "data.jsonl", examples)
    config = bench.Config(**TINY, hellaswag_data=str(data))
    assert bench.find_examples(config, 4) == examples[::2][:4]
    assert bench.find_examples(config, 99) == examples


@pytest.mark.parametrize("settings, words", [
    (dict(only="trian"), ["only='trian'", "train"]),
    (dict(only="train,"), ["only='train,'"]),
    (dict(rounds=0), ["rounds=0"]),
    (dict(B=-1), ["B=-1"]),
    (dict(n_head=5), ["n_embd=16", "n_head=5"]),
    (dict(peer="/nowhere"), ["peer='/nowhere'", "model.py"]),
    (dict(hellaswag_data="/nowhere"), ["hellaswag_data='/nowhere'"]),
    (dict(device="tpu"), ["device='tpu'"]),
])  # fmt: skip
def test_wrong_input_is_refused(settings, words):
    with pytest.raises(SettingError) as refusal:
        bench.validate(bench.Config(**TINY | settings))
    for word in words:
        assert word in str(refusal.value)


def test_figures_that_cannot_be_written_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.PARTS, "train", lambda *_: {})
    arguments = [f"--{name}={value}" for name, value in TINY.items()]
    for path in ("none/out.json", "."):
        arguments += ["--only=train", f"--json={tmp_path / path}"]
        monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
        with pytest.raises(UserError, match="json=.*choose another"):
            bench.main()


def test_a_part_that_fails_costs_no_figures(tmp_path, monkeypatch):
    """Those of the parts before it are in the file before the next one begins."""
    path, seen = tmp_path / "figures.json", []

    def fail(part, names, config):
        seen.append(json.loads(path.read_text()).keys() if path.stat().st_size else set())
        return {}

    monkeypatch.setattr(bench, "take_turns", fail)
    arguments = [f"--{name}={value}" for name, value in TINY.items()]
    arguments += ["--only=matmul,optimizer", f"--json={path}"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    assert bench.main() == 0
    assert seen == [set(), {"facts", "matmul"}]
    assert json.loads(path.read_text())["optimizer"] == {}
