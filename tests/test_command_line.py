"""The command line: what can be set, what the recipes hold, what is refused with which words."""

import contextlib
import dataclasses
import inspect
import io
import itertools
import sys

import pytest
import torch

import train_gpt2
from support import errors
from support.errors import UserError
from train_gpt2 import RECIPES, Config, check_config, parse_config

FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def squeezed(text: str) -> str:
    """Text without white space, since help is wrapped."""
    return "".join(text.split())


@pytest.fixture(scope="module")
def help_text():
    """What --help prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code == 0
    return out.getvalue()


@pytest.mark.parametrize("name", FIELDS)
def test_help_shows_each_setting_with_its_comment_and_default(name, help_text):
    (line,) = (s for s in inspect.getsource(Config).splitlines() if s.startswith(f"    {name}:"))
    _, separator, comment = line.rpartition("  # ")
    assert separator and comment.strip(), f"{name} has no comment"
    assert squeezed(f"--{name} X {comment} [{FIELDS[name].default}]") in squeezed(help_text)


def test_help_lists_the_recipes(help_text):
    assert squeezed("recipe" + ", ".join(RECIPES)) in squeezed(help_text)


# -------------------------------------------------------------------------------------------------
# Defaults and recipes


def test_defaults_are_the_124m_run():
    expected = dict(
        data="edu_fineweb10B", init_from="scratch", n_layer=12, n_head=12, n_embd=768, T=1024,
        total_batch_size=524_288, batch_ramp_tokens=0, max_lr=6e-4, min_lr=6e-5, warmup_steps=715,
        max_steps=19_073, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0,
        val_tokens=10_485_760, log_dir="log", resume=True, device="auto", dtype="auto",
    )  # fmt: skip
    config = parse_config([])
    assert {name: getattr(config, name) for name in expected} == expected
    assert config == Config() == parse_config(["gpt2"])


def test_all_recipes_exist():
    assert set(RECIPES) >= {"tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt3-124M"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_the_defaults_with_its_values_and_is_possible(recipe):
    config = parse_config([recipe])
    assert vars(config) == vars(Config()) | RECIPES[recipe]
    check_config(config)


@pytest.mark.parametrize(
    "recipe, parameters",
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_recipe_has_the_parameters_of_openais_model(recipe, parameters):
    c = parse_config([recipe])
    with torch.device("meta"):
        model = train_gpt2.GPT(train_gpt2.GPTConfig(c.T, 50257, c.n_layer, c.n_head, c.n_embd))
    assert model.num_parameters() == parameters


@pytest.mark.parametrize("recipe", ["gpt2", "gpt3-124M"])
def test_recipe_warms_up_over_375_million_tokens_and_ends_at_10_billion(recipe):
    c = parse_config([recipe])
    position, tokens = 0, [0]  # tokens[s]: seen before step s
    for _ in range(c.max_steps):
        position += train_gpt2.batch_rows(position, c)
        tokens.append(position * c.T)
    assert tokens[c.warmup_steps] == pytest.approx(375e6, rel=1e-2)
    assert tokens[c.max_steps] == pytest.approx(10e9, rel=1e-2)


# -------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    "arguments, name, value",
    [
        (["--max_steps=50"], "max_steps", 50),
        (["--max_steps", "50"], "max_steps", 50),
        (["--batch_ramp_tokens=4e9"], "batch_ramp_tokens", 4_000_000_000),
        (["--max_steps=1_000"], "max_steps", 1000),
        (["--val_tokens=1e6"], "val_tokens", 1_000_000),
        (["--max_lr=1e-3"], "max_lr", 1e-3),
        (["--weight_decay=0"], "weight_decay", 0.0),
        (["--shuffle=False"], "shuffle", False),
        (["--shuffle=false"], "shuffle", False),
        (["--shuffle", "0"], "shuffle", False),
        (["--shuffle=True"], "shuffle", True),
        (["--shuffle=true"], "shuffle", True),
        (["--shuffle=1"], "shuffle", True),
        (["--data=a b/c=d.txt"], "data", "a b/c=d.txt"),
        (["--sample_prompt=100 % --T=5"], "sample_prompt", "100 % --T=5"),
        (["--sample_prompt="], "sample_prompt", ""),
        (["--device=cuda:1"], "device", "cuda:1"),
        (["--max_steps=5", "--max_steps=6"], "max_steps", 6),
    ],
)
def test_value_arrives_and_leaves_the_other_settings_alone(arguments, name, value):
    config = parse_config(arguments)
    assert getattr(config, name) == value and type(getattr(config, name)) is FIELDS[name].type
    assert vars(config) == vars(Config()) | {name: value}


@pytest.mark.parametrize("order", [*itertools.permutations(["tiny", "--max_steps=5", "--T=64"])])
def test_values_override_the_recipe_wherever_they_stand(order):
    expected = vars(Config()) | RECIPES["tiny"] | {"max_steps": 5, "T": 64}
    assert vars(parse_config(list(order))) == expected


def test_every_setting_can_be_given_by_name():
    config = Config(**RECIPES["tiny"])
    assert parse_config([f"--{name}={value}" for name, value in vars(config).items()]) == config


# -------------------------------------------------------------------------------------------------
# What is refused

WRONG_ARGUMENTS = {
    "a misspelled name": (["--max_step=5"], "--max_step=5", "did you mean --max_steps?"),
    "a misspelled name, value apart": (["--max_step", "5"], "--max_step", "--max_steps?"),
    "an abbreviation": (["--max_s=5"], "--max_s=5", "did you mean --max_"),
    "another program's name": (["--batch_size=4"], "--batch_size=4", "--total_batch_size?"),
    "one dash": (["-max_steps=5"], "-max_steps=5", "--max_steps?"),
    "a misspelled name after a recipe": (["tiny", "--sed=1"], "--sed=1", "--seed?"),
    "a name like no other": (["--xyzzy=1"], "--xyzzy=1", *FIELDS),
    "a word for an int": (["--max_steps=many"], "max_steps='many'", "a whole number"),
    "a fraction for an int": (["--max_steps=1.5"], "max_steps='1.5'", "a whole number"),
    "a small fraction for an int": (["--B=1e-3"], "B='1e-3'", "a whole number"),
    "infinity for an int": (["--max_steps=inf"], "max_steps='inf'", "a whole number"),
    "nan for an int": (["--max_steps=nan"], "max_steps='nan'", "a whole number"),
    "nothing for an int": (["--max_steps="], "max_steps=''", "a whole number"),
    "underscores for an int": (["--max_steps=_5_"], "max_steps='_5_'", "a whole number"),
    "a word for a float": (["--max_lr=high"], "max_lr='high'", "a number"),
    "a word for a boolean": (["--shuffle=maybe"], "shuffle='maybe'", "True or False"),
    "a number for a boolean": (["--compile=2"], "compile='2'", "True or False"),
    "a misspelled recipe": (["tinny"], "tinny", "did you mean tiny?"),
    "a recipe in capitals": (["GPT2-XL"], "GPT2-XL", *RECIPES),
    "a recipe like no other": (["zzz"], "zzz", *RECIPES),
    "no value": (["--max_steps"], "--max_steps", "--help"),
    "no value before another name": (["--max_steps", "--T=64"], "--max_steps", "--help"),
    "an impossible value": (["tiny", "--n_head=5"], "n_head=5", "n_embd=128"),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
def test_wrong_command_line_ends_with_one_line_and_code_2(case, monkeypatch, capsys, tmp_path):
    arguments, *words = WRONG_ARGUMENTS[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        errors.run_main(train_gpt2.main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


IMPOSSIBLE = [
    (dict(n_embd=100, n_head=12), "n_head=12", "n_embd=100", "multiple"),
    (dict(total_batch_size=5000), "total_batch_size=5000", "multiple of T=1024", "5120"),
    (dict(total_batch_size=4700), "total_batch_size=4700", "multiple of T=1024", "5120"),
    (dict(total_batch_size=4600), "total_batch_size=4600", "multiple of T=1024", "4096"),
    (dict(total_batch_size=100), "total_batch_size=100", "multiple of T=1024", "1024"),
    (
        dict(batch_ramp_tokens=10**9, total_batch_size=32768),
        "batch_ramp_tokens=1000000000", "32768", "set it to 0",
    ),
    (dict(val_tokens=1023), "val_tokens=1023", "T=1024"),
    (dict(dtype="fp16"), "dtype='fp16'", "auto, float32, bfloat16 or float16"),
    (dict(dtype="float64"), "dtype='float64'", "auto, float32, bfloat16 or float16"),
    (dict(device="gpu"), "device='gpu'", "auto, cpu, cuda, cuda:N or mps"),
    (dict(device="cuda:x"), "device='cuda:x'", "auto, cpu, cuda, cuda:N or mps"),
    (dict(device="cuda:1 "), "device='cuda:1 '", "auto, cpu, cuda, cuda:N or mps"),
    (dict(beta1=1.0), "beta1=1.0", "below 1"),
    (dict(beta2=1.5), "beta2=1.5", "below 1"),
    (dict(muon_momentum=1.0), "muon_momentum=1.0", "below 1"),
    (dict(optimizer="sgd"), "optimizer='sgd'", "adamw or muon"),
    (dict(schedule="constant"), "schedule='constant'", "cosine or linear"),
    (dict(min_lr=1e-3), "min_lr=0.001", "max_lr=0.0006"),
    (dict(max_lr=1e-5), "min_lr=6e-05", "max_lr=1e-05"),
    (dict(max_lr=float("nan")), "max_lr=nan", "above 0"),
    (dict(max_lr=float("inf")), "max_lr=inf"),
    (dict(eps=float("inf")), "eps=inf"),
    (dict(min_lr=float("nan")), "min_lr=nan", "0 or more"),
    (dict(grad_clip=float("inf")), "grad_clip=inf"),
    (dict(seed=2**64), f"seed={2**64}"),
]  # fmt: skip
ABOVE_0 = (
    "n_layer", "n_head", "n_embd", "T", "total_batch_size", "max_steps", "val_tokens",
    "sample_tokens", "num_samples", "keep_checkpoints", "max_bad_steps", "max_lr", "eps",
    "muon_lr", "timeout_s",
)  # fmt: skip
NOT_BELOW_0 = (
    "seed", "B", "batch_ramp_tokens", "min_lr", "warmup_steps", "weight_decay", "beta1", "beta2",
    "grad_clip", "muon_momentum", "val_every", "hellaswag_every", "hellaswag_examples",
    "sample_every", "checkpoint_every", "gpu_hour_usd",
)  # fmt: skip
IMPOSSIBLE += [({name: 0}, f"{name}=0", "above 0") for name in ABOVE_0]
IMPOSSIBLE += [({name: -1}, f"{name}=-1", "above 0") for name in ABOVE_0]
IMPOSSIBLE += [({name: -1}, f"{name}=-1", "0 or more") for name in NOT_BELOW_0]


@pytest.mark.parametrize("case", IMPOSSIBLE, ids=lambda case: str(case[0]))
def test_impossible_setting_is_refused_with_its_value_and_the_remedy(case):
    settings, *words = case
    with pytest.raises(UserError) as error:
        check_config(Config(**settings))
    assert str(error.value).startswith(words[0] + ":"), error.value
    assert all(word in str(error.value) for word in words), error.value


def test_every_number_has_a_range():
    numbers = {name for name, field in FIELDS.items() if field.type in (int, float)}
    assert numbers == {*ABOVE_0, *NOT_BELOW_0}


@pytest.mark.parametrize(
    "settings",
    [
        {name: 0 for name in NOT_BELOW_0},
        dict(val_every=0, val_tokens=1),
        dict(min_lr=6e-4),
        dict(total_batch_size=1024),
        dict(total_batch_size=33792, batch_ramp_tokens=1),
        dict(n_head=1),
        dict(n_head=768),
        dict(max_steps=5),
        *(dict(dtype=name) for name in ("auto", "float32", "bfloat16", "float16")),
        *(dict(device=name) for name in ("auto", "cpu", "mps", "cuda", "cuda:0", "cuda:11")),
    ],
    ids=str,
)
def test_possible_settings_at_the_edge_are_accepted(settings):
    check_config(Config(**settings))
