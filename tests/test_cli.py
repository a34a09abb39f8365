"""The command line: what can be set, what the recipes contain, and which errors are reported."""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import io
import itertools
import sys
from pathlib import Path

import pytest

import train_gpt2
from support import cli, errors, validate_settings
from train_gpt2 import RAMP_START, RECIPES, Config, parse_config

FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def squeezed(text: str) -> str:
    """Text without white space, since help is wrapped."""
    return "".join(text.split())


@pytest.fixture(scope="module", autouse=True)
def source_is_read_once():
    """Each parser reads the comments of the settings from their source, which takes longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        yield


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
    validate_settings.validate(vars(config), RAMP_START)


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
def test_value_is_set_and_other_settings_keep_theirs(arguments, name, value):
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
# Errors

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


# -------------------------------------------------------------------------------------------------
# Any dataclass


@dataclasses.dataclass
class Example:
    """Settings of another command."""

    # what is read
    files: tuple = ("a.txt", "b.txt")  # names of files
    depth: int = 3  # levels, at most 50 %
    # what is written
    verbose: bool = False  # print more


def test_arguments_without_a_name_go_to_the_tuple():
    assert cli.parse(Example, {}, ["x", "y", "--depth=4"], "") == Example(("x", "y"), 4)
    assert cli.parse(Example, {}, ["--verbose", "x"], "") == Example(("x",), verbose=True)
    assert cli.parse(Example, {}, ["--verbose", "false"], "") == Example()


def test_comments_on_lines_of_their_own_are_headings(capsys):
    with pytest.raises(SystemExit):
        cli.parse(Example, {}, ["--help"], "An example.")
    out = capsys.readouterr().out
    assert "An example." in out and "levels, at most 50 % [3]" in out
    assert out.index("what is read:") < out.index("names of files [a.txt b.txt]")
    assert out.index("--depth") < out.index("what is written:") < out.index("--verbose")


@dataclasses.dataclass
class Edited:
    """Settings to which someone added one."""

    width: int = 4  # columns
    depth: int = 3


def test_a_setting_without_a_comment_can_be_given_too(capsys):
    assert cli.parse(Edited, {}, ["--depth=5"], "") == Edited(depth=5)
    with pytest.raises(SystemExit):
        cli.parse(Edited, {}, ["--help"], "")
    assert "--depth X" in capsys.readouterr().out


@pytest.mark.parametrize("heading", ["data", "model: GPT-2 124M", "batch", "evaluation", "system"])
def test_the_trainers_help_has_its_headings(help_text, heading):
    assert f"\n{heading}:\n" in help_text


@pytest.mark.parametrize("name", FIELDS)
def test_two_dashes_are_not_a_value(name):
    """argparse takes them for the end of the options, and leaves the setting without a value."""
    with pytest.raises(errors.SettingError, match=f"--{name}=--: -- is not a value"):
        parse_config([f"--{name}=--"])


def test_the_command_line_works_without_docstrings(monkeypatch, capsys):
    """`python -OO` removes them: here from the trainer and from what reads the command line."""
    for name in ("support.cli", "train_gpt2"):
        spec = importlib.util.find_spec(name)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        if name == "support.cli":
            monkeypatch.setattr("support.cli", module)
        source = Path(spec.origin).read_text(encoding="utf-8")
        exec(compile(source, spec.origin, "exec", optimize=2), vars(module))
    assert module.__doc__ is None and module.cli.parse.__doc__ is None
    with pytest.raises(SystemExit) as stop:
        module.parse_config(["--help"])
    assert stop.value.code == 0 and "--n_layer" in capsys.readouterr().out
