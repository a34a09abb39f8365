"""docs/changing-the-model.md: each diff applies, and acts equally on all paths.

The diffs are taken from the page, so one that is added there is tested too. Each is applied to a
copy of `train_gpt2.py`, which then takes the place of `train_gpt2` within a test.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    TEXT,
    assert_one_line,
    assert_same_end,
    assert_same_tensors,
    command_line,
    environment,
    losses,
    outcome,
    read_log,
    train_until,
)
from hellaswag_helpers import ALONE
from model_helpers import (
    assert_same_gradients,
    loss_and_gradients,
    random_ids,
    relative_error,
    with_ignored,
)
from torch.nn import functional as F

import train_gpt2 as stock
from support.errors import SettingError, UserError
from support.fused_loss import TrainingModel
from support.hellaswag_eval import Question, ending_losses
from support.huggingface import MODIFIED

pytestmark = pytest.mark.gpt2  # the diffs are against the unchanged file
PAGE = (ROOT / "docs" / "changing-the-model.md").read_text(encoding="utf-8")


class Change(NamedTuple):
    """A section of the page and its row in the table."""

    title: str
    diff: str
    model_type: str  # of its checkpoints
    continues: bool  # whether it continues a run of the unchanged file


def read_changes() -> dict[str, Change]:
    """{title: change} of the sections of the page that have a diff."""
    rows = re.findall(r"^\| \[(.+?)\]\(#(.+?)\) \| `(.+?)` \| (.+?) \|$", PAGE, re.MULTILINE)
    facts = {title: (kind, end.startswith("continues")) for title, _, kind, end in rows}
    assert [link for _, link, *_ in rows] == [t.lower().replace(" ", "-") for t, *_ in rows]
    changes = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        title = section.split("\n")[0]
        for diff in re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            assert title not in changes, f"{title}: more than one diff"
            changes[title] = Change(title, diff, *facts[title])
    assert facts.keys() == changes.keys()
    return changes


CHANGES = read_changes()

# -------------------------------------------------------------------------------------------------
# Changed copies of train_gpt2.py


def apply(diff: str, directory: Path) -> Path:
    """A copy of `train_gpt2.py` in `directory` with the diff applied, as the page says."""
    directory.mkdir(parents=True, exist_ok=True)
    path = Path(shutil.copy(ROOT / "train_gpt2.py", directory))
    (directory / "change.diff").write_text(diff, encoding="utf-8")
    variables = os.environ | {"GIT_CEILING_DIRECTORIES": str(directory.parent)}
    command = ["git", "apply", "--recount", "change.diff"]
    done = subprocess.run(command, cwd=directory, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"docs/changing-the-model.md: {done.stderr}{diff}"
    assert path.read_bytes() != (ROOT / "train_gpt2.py").read_bytes()
    return path


def load(path: Path) -> ModuleType:
    """The module of a changed `train_gpt2.py`."""
    spec = importlib.util.spec_from_file_location("train_gpt2", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "train_gpt2", module)  # where dataclasses look for it
        spec.loader.exec_module(module)
    return module


def load_edited(path: Path, old: str, new: str) -> ModuleType:
    """The module of `path` with one more edit, in a file beside it."""
    source = path.read_text(encoding="utf-8")
    assert old in source
    edited = path.with_name("edited.py")
    edited.write_text(source.replace(old, new), encoding="utf-8")
    return load(edited)


class Changed(NamedTuple):
    """A change, applied."""

    change: Change
    module: ModuleType
    directory: Path  # with the changed train_gpt2.py in it


def make_changed(title: str, tmp_path_factory) -> Changed:
    directory = tmp_path_factory.mktemp("changed")
    return Changed(CHANGES[title], load(apply(CHANGES[title].diff, directory)), directory)


@pytest.fixture(scope="module", params=CHANGES)
def changed(request, tmp_path_factory):
    """Each change of the page in turn."""
    return make_changed(request.param, tmp_path_factory)


@pytest.fixture(autouse=True)
def import_changed(request, monkeypatch):
    """Within a test of a change, `import train_gpt2` gives the changed module."""
    if "changed" in request.fixturenames:
        module = request.getfixturevalue("changed").module
        monkeypatch.setitem(sys.modules, "train_gpt2", module)


def make_model(module: ModuleType):
    """A small GPT whose parameters all have a large effect, and whose attention is not uniform."""
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=300)
    model = module.GPT(module.GPTConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


# -------------------------------------------------------------------------------------------------
# Checks, which also must find a wrong variant


def check_losses(model) -> None:
    """Training, validation and `forward` have one loss, and training has autograd's gradients."""
    x, y = random_ids(2, 4, 32, vocab_size=300)
    y = with_ignored(y, 0.2)
    count = (y >= 0).sum()
    logits, loss = model(x, y)
    plain = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
    training = TrainingModel(model, compiled=False)
    expected, gradients = loss_and_gradients(model, loss)
    found, found_gradients = loss_and_gradients(model, training(x, y) / count)
    validation = training.evaluate(x, y) / count
    assert [plain.item(), found, validation.item()] == pytest.approx([expected] * 3, rel=1e-5)
    assert_same_gradients(found_gradients, gradients)


@torch.no_grad()
def check_cache(model) -> None:
    """Greedy text with the cache is that of complete forward passes."""
    ids = prompt = random_ids(4, 8, vocab_size=300)
    for _ in range(24):
        ids = torch.cat((ids, model(ids)[0][:, -1:].argmax(dim=2)), dim=1)
    assert model.generate(prompt, 24, temperature=0).equal(ids)


@torch.no_grad()
def check_packed_rows(model) -> None:
    """HellaSwag's rows of a context with four endings have the losses of plain rows."""
    ids = iter(random_ids(500, vocab_size=300).tolist())
    sizes = [(5, (3, 6, 1, 4)), (12, (4, 4, 5, 2)), (30, (2, 8, 1, 3))]  # the last one is cut

    def take(n: int) -> list[int]:
        return [next(ids) for _ in range(n)]

    questions = [Question(take(n), [take(m) for m in more], [1] * 4, 0) for n, more in sizes]
    found, expected = ending_losses(model, questions, ALONE), []
    for question in questions:
        for ending in question.endings:
            row = torch.tensor((question.context + ending)[-33:])
            logits = model(row[None, :-1])[0][0]
            each = F.cross_entropy(logits, row[1:], reduction="none")
            expected.append(each[-len(ending) :].sum().item())
    np.testing.assert_allclose(found.flatten(), expected, rtol=1e-4)


# -------------------------------------------------------------------------------------------------
# The page


def test_the_page_has_the_ten_changes():
    assert len(CHANGES) >= 10


def count_changed_lines(diff: str) -> int:
    """Added and removed lines, without those of a new class or function and without empty ones."""
    count, indent = 0, None  # of the new class or function
    for line in diff.splitlines()[2:]:
        text = line[1:]
        if not text.strip():
            continue
        depth = len(text) - len(text.lstrip())
        if indent is not None and not (line[0] == "+" and depth > indent):
            indent = None
        if indent is None and re.match(r"\+ *(class|def|@staticmethod)\b", line):
            indent = depth
            continue
        count += line[0] in "+-" and indent is None
    return count


@pytest.mark.parametrize("title", CHANGES)
def test_a_change_is_small(title):
    """Two places and ten lines at most, beside the lines of a new class or function."""
    diff = CHANGES[title].diff
    assert diff.count("\n@@ ") <= 2
    assert 1 <= count_changed_lines(diff) <= 10


# -------------------------------------------------------------------------------------------------
# One function on all paths


def test_training_validation_and_forward_agree(changed):
    check_losses(make_model(changed.module))


def test_text_with_and_without_cache_agrees(changed):
    check_cache(make_model(changed.module))


def test_packed_and_plain_rows_agree(changed):
    check_packed_rows(make_model(changed.module))


@pytest.mark.faults
@pytest.mark.parametrize("title", ["Rotary positions", "Softcap on the logits"])
def test_compiled_code_gives_the_same_loss(title, tmp_path_factory, error_on_recompile):
    model = make_model(make_changed(title, tmp_path_factory).module)
    x, y = random_ids(2, 4, 32, vocab_size=300)
    results = []
    for compiled in (False, True):
        training = TrainingModel(model, compiled)
        loss, gradients = loss_and_gradients(model, training(x, y))
        results.append((loss, training.evaluate(x, y).item(), gradients))
    assert results[1][:2] == pytest.approx(results[0][:2], rel=1e-5)
    assert_same_gradients(results[1][2], results[0][2])


# -------------------------------------------------------------------------------------------------
# Checkpoints of the model


@pytest.fixture(scope="module")
def stock_directory(tmp_path_factory):
    """A checkpoint of the unchanged code."""
    directory = tmp_path_factory.mktemp("stock")
    make_model(stock).save_pretrained(directory)
    return directory


@torch.no_grad()
def test_a_checkpoint_has_the_same_logits_wherever_it_is_accepted(changed, tmp_path):
    """`transformers` and the unchanged code open what computes GPT-2, and refuse the rest."""
    from transformers import AutoModelForCausalLM

    model, ids = make_model(changed.module), random_ids(2, 32, vocab_size=300)
    model.save_pretrained(tmp_path)
    expected, kind = model(ids)[0], changed.change.model_type
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    assert changed.module.GPT.from_pretrained(tmp_path)(ids)[0].equal(expected)
    if kind == MODIFIED:
        with pytest.raises(ValueError, match=MODIFIED):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(UserError):
            stock.GPT.from_pretrained(tmp_path)
    else:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert relative_error(theirs(ids).logits, expected) < 1e-5
        assert stock.GPT.from_pretrained(tmp_path)(ids)[0].equal(expected)


@torch.no_grad()
def test_changed_code_refuses_a_checkpoint_of_another_function(changed, stock_directory):
    if changed.change.model_type == MODIFIED:
        with pytest.raises(UserError):
            changed.module.GPT.from_pretrained(stock_directory)
    else:
        ids = random_ids(2, 32, vocab_size=300)
        model = changed.module.GPT.from_pretrained(stock_directory)
        assert model(ids)[0].equal(make_model(stock)(ids)[0])


# -------------------------------------------------------------------------------------------------
# Runs

RUN = SMALL | dict(
    max_lr=1e-2, warmup_steps=1, max_steps=4, val_every=4, val_tokens=64, device="cpu",
)  # fmt: skip


def make_config(module: ModuleType, directory: Path, **settings):
    """The settings of a small run in `directory`/log."""
    directory.mkdir(exist_ok=True)
    (directory / "text.txt").write_text(TEXT, encoding="utf-8")
    places = dict(data=str(directory / "text.txt"), log_dir=str(directory / "log"))
    return module.Config(**places, **RUN | settings)


@pytest.fixture(scope="module")
def complete(changed):
    """A run of the changed code that was not stopped. Not to be written to."""
    config = make_config(changed.module, changed.directory / "complete")
    assert changed.module.train(config) == 0
    return config


@pytest.fixture(scope="module")
def stock_run(tmp_path_factory):
    """The same of the unchanged code."""
    config = make_config(stock, tmp_path_factory.mktemp("stock_run"))
    assert stock.train(config) == 0
    return config


def copy_run(config, module: ModuleType, directory: Path, **settings):
    """The settings to continue a copy of a run with a module, whose new settings have defaults."""
    shutil.copytree(Path(config.log_dir).parent, directory)
    places = dict(data=str(directory / "text.txt"), log_dir=str(directory / "log"))
    known = {field.name for field in dataclasses.fields(module.Config)}
    kept = {name: value for name, value in vars(config).items() if name in known}
    return module.Config(**kept | places | settings)


def assert_continues_or_not(config, continues: bool, capsys) -> None:
    """`import train_gpt2` must give the code that is to continue the run."""
    code, output, errors = outcome(config, capsys)
    if continues:
        assert code == 0 and "continuing from" in output, errors
    else:
        assert code == 2
        assert_one_line(errors, ())


def test_a_changed_run_learns(complete):
    found = losses(complete)
    assert found[3] < found[0] - 0.1 and losses(complete, "val")[4] < losses(complete, "val")[0]


def test_a_changed_run_resumes_bit_for_bit(changed, complete, tmp_path, monkeypatch):
    killed = make_config(changed.module, tmp_path / "killed", checkpoint_every=2)
    train_until(killed, 3, monkeypatch)
    assert changed.module.train(killed) == 0
    assert_same_end(complete, killed)


def test_changed_code_continues_a_stock_run_or_refuses(changed, stock_run, tmp_path, capsys):
    config = copy_run(stock_run, changed.module, tmp_path / "copy", max_steps=5)
    assert_continues_or_not(config, changed.change.continues, capsys)


def test_stock_code_continues_a_changed_run_or_refuses(
    changed, complete, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "train_gpt2", stock)
    config = copy_run(complete, stock, tmp_path / "copy", max_steps=5)
    assert_continues_or_not(config, changed.change.continues, capsys)


@pytest.mark.faults
def test_two_processes_give_the_losses_of_one(changed, complete, tmp_path):
    (changed.directory / "support").symlink_to(ROOT / "support")
    config = make_config(changed.module, tmp_path / "two", B=2)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = [*launcher, str(changed.directory / "train_gpt2.py"), *command_line(config)]
    done = subprocess.run(
        [sys.executable, *program], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for stream in ("train", "val"):
        assert losses(config, stream) == pytest.approx(losses(complete, stream), abs=1e-4)


# -------------------------------------------------------------------------------------------------
# What single changes promise, and wrong variants of them


def test_positions_counted_in_attention_are_found(tmp_path):
    """Rotary by `arange(T)`: right in training, wrong with a cache and in packed rows."""
    path = apply(CHANGES["Rotary positions"].diff, tmp_path)
    wrong = "positions = torch.arange(T, device=x.device)\n        q, k = self.rotate(q"
    model = make_model(load_edited(path, "q, k = self.rotate(q", wrong))
    check_losses(model)
    for check in (check_cache, check_packed_rows):
        with pytest.raises(AssertionError):
            check(model)


def test_keys_that_are_cached_before_they_are_changed_are_found(tmp_path):
    """QK-norm after the cache is right; rotary after it turns old keys by new positions."""
    path = apply(CHANGES["Rotary positions"].diff, tmp_path)
    line = "        q, k = self.rotate(q, positions), self.rotate(k, positions)\n"
    cached = "            k, v = cache.add(k, v)  # of all tokens so far\n"
    source = path.read_text(encoding="utf-8").replace(line, "").replace(cached, cached + line)
    path.write_text(source, encoding="utf-8")
    model = make_model(load(path))
    check_losses(model)
    with pytest.raises(AssertionError):
        check_cache(model)


def test_a_softcap_on_one_path_is_found(tmp_path):
    """In `token_losses` it acts on losses and not on samples; `logits` is where it acts on both."""
    path = shutil.copy(ROOT / "train_gpt2.py", tmp_path)
    capped = "logits = 30 * torch.tanh(logits.float() / 30)"
    model = make_model(load_edited(Path(path), "logits = logits.float()", capped))
    for check in (check_losses, check_packed_rows):
        with pytest.raises(AssertionError):
            check(model)


def test_a_new_setting_must_match_on_resume(tmp_path, capsys, monkeypatch):
    module = load(apply(CHANGES["Another schedule"].diff, tmp_path))
    monkeypatch.setitem(sys.modules, "train_gpt2", module)
    config = make_config(module, tmp_path / "run", max_steps=2, decay_power=2.0)
    assert module.train(config) == 0
    for decay_power, code in ((1.0, 2), (2.0, 0)):
        other = dataclasses.replace(config, max_steps=3, decay_power=decay_power)
        found, _, errors = outcome(other, capsys)
        assert found == code
        assert not code or "decay_power=1.0: " in errors and "decay_power=2.0; " in errors


def test_the_schedule_falls_by_a_power(tmp_path):
    module = load(apply(CHANGES["Another schedule"].diff, tmp_path))
    settings = dict(schedule="linear", max_lr=1.0, min_lr=0.0, warmup_steps=2, max_steps=10)
    config = module.Config(**settings, cooldown=0.5, decay_power=2.0)
    rates = [module.get_lr(step, config) for step in range(11)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 15 / 16, 0.75, 7 / 16, 0])
    longest = module.Config(**settings, decay_power=1.0)  # the stock schedule
    before = stock.Config(**settings)
    steps = range(11)
    expected = [stock.get_lr(step, before) for step in steps]
    assert [module.get_lr(step, longest) for step in steps] == expected


def test_a_nan_gradient_leaves_another_optimizer_as_it_was(tmp_path):
    module = load(apply(CHANGES["Another optimizer"].diff, tmp_path))
    run = module.open_run(make_config(module, tmp_path / "run"), ALONE)
    assert [*run.optimizer.optimizers] == ["lion", "adamw"]

    def step() -> tuple[dict, dict]:
        """Copies of the weights and of the optimizer's state after a step."""
        module.train_step(run, 1e-3, torch.zeros(3))
        weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        states = run.optimizer.state_dict()
        states = {name: state["state"] for name, state in states.items()}
        return weights, torch.utils._pytree.tree_map(torch.clone, states)

    first = step()
    handle = run.model.transformer.wte.weight.register_hook(lambda grad: grad * float("nan"))
    second = step()
    handle.remove()
    assert_same_tensors(first, second)
    moved = [not p.equal(second[0][name]) for name, p in step()[0].items()]
    assert all(moved)


def test_a_second_validation_set_and_a_figure_are_logged(tmp_path):
    for title, stream, values in (
        ("A second validation set", "play", 2),
        ("One more figure", "weight_norm", 2),
    ):
        directory = tmp_path / stream
        module = load(apply(CHANGES[title].diff, directory))
        config = make_config(module, directory / "run", max_steps=2)
        assert module.train(config) == 0
        found = losses(config, stream)
        assert len(found) == values and all(np.isfinite([*found.values()])), read_log(config)


def test_a_new_setting_is_an_option_of_the_command_line(tmp_path, monkeypatch):
    module = load(apply(CHANGES["Another schedule"].diff, tmp_path))
    monkeypatch.setitem(sys.modules, "train_gpt2", module)
    assert module.parse_config(["--decay_power=2"]).decay_power == 2
    with pytest.raises(SettingError, match="decay_power"):
        module.parse_config(["--decay_power=high"])
