"""The README: each command is one that works, and a newcomer can follow it word by word."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

import bench
import fineweb
import hellaswag
import plot
import sample
import train_gpt2
from support import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
# What a command's comment begins with if it cannot be run everywhere, or takes long.
MARKS = ("network", "GPU", "minutes")


def commands() -> list[tuple[str, str]]:
    """(command, comment) of each indented line of the README that starts a program of ours."""
    lines = re.findall(r"^    ((?:pip|python|torchrun) .*)$", README, re.MULTILINE)
    return [tuple(part.strip() for part in f"{line} # ".split(" # ")[:2]) for line in lines]


def parse(script: str, arguments: list[str]) -> None:
    """Has a script's own parser read a command line, which raises where it makes no sense."""
    if script == "train_gpt2.py":
        train_gpt2.parse_config(arguments)
    elif script in ("hellaswag.py", "plot.py"):
        {"hellaswag.py": hellaswag, "plot.py": plot}[script].parse(arguments)
    else:
        module = {"fineweb.py": fineweb, "sample.py": sample, "bench.py": bench}[script]
        cli.parse(module.Config, {}, arguments, "")


def test_every_command_is_read_by_its_program():
    assert len(commands()) >= 25
    for command, _ in commands():
        for part in command.split(" && "):
            words = shlex.split(part)
            if words[0] == "pip" or words[1:3] == ["-m", "pytest"]:
                continue
            at = next(i for i, word in enumerate(words) if word.endswith(".py"))
            parse(words[at], words[at + 1 :])


def test_what_the_readme_names_is_there():
    for name in set(re.findall(r"`(?:tests/)?(\w+\.(?:py|tiktoken|txt|md|toml))`", README)):
        made = name in ("log.txt", "progress.txt", "gpt2.sh")
        assert made or any((folder / name).exists() for folder in (ROOT, ROOT / "tests")), name
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    settings = train_gpt2.Config.__dataclass_fields__
    table = README[README.index("| to change | edit |") :]
    for name in ("data", "B", "max_steps", "init_from", "sample_prompt", "dtype", "tracker"):
        assert f"`{name}`" in table and name in settings


# What pip installs is there already; `bench.py` and the tests have tests of their own.
WALK = [
    command
    for command, comment in commands()
    if comment.split(":")[0].split(",")[0] not in MARKS and "python -m pytest" not in command
]


@pytest.mark.faults
def test_a_newcomer_follows_it_word_by_word(tmp_path):
    """All that needs neither network nor GPU, in the order of the page, in a fresh copy."""
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    assert len(WALK) >= 10
    outputs = {}
    for command in WALK:
        command = command.removeprefix("pip install -r requirements.txt && ")
        words = shlex.split(command)
        assert words[0] == "python", command
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, env=environment(), capture_output=True,
            text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        outputs.setdefault(command, []).append(done.stdout)
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    again = next(found for found in outputs.values() if len(found) == 2)
    assert "finished:" in again[0] and "this run is finished" in again[1]

    snippet = re.search(r"^(    from transformers .*\n(?:    .*\n)+)", README, re.MULTILINE)[1]
    code = re.sub(r"^    ", "", snippet, flags=re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(HF_HUB_OFFLINE="1"),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("QUEEN MARETH:"), done.stderr
    assert Path(tmp_path / "log_tiny" / "curves.png").exists()


def test_every_public_function_and_class_says_what_it_gives():
    missing = [
        f"{path.name}: {node.name}"
        for path in ROOT.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not ast.get_docstring(node)
        if not node.name.startswith("_") and node.name != "main"
    ]
    assert missing == []
