"""README.md and docs/*.md: each command works, and a newcomer can follow them word by word."""

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
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
# What a command's comment begins with if it cannot be run everywhere, or takes long.
MARKS = ("network", "GPU", "minutes")


def blocks(page: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[tuple[str, str]]:
    """(command, comment) of each line of a page that starts a program of this repository."""
    lines = "\n".join(blocks(page, "sh"))
    lines = re.findall(r"^((?:pip|python|torchrun) .*)$", lines, re.MULTILINE)
    return [tuple(part.strip() for part in f"{line} # ".split(" # ")[:2]) for line in lines]


def parse(script: str, arguments: list[str]) -> None:
    """Parses a command line with a script's own parser, which raises if it is wrong."""
    if script == "train_gpt2.py":
        train_gpt2.parse_config(arguments)
    elif script in ("hellaswag.py", "plot.py"):
        {"hellaswag.py": hellaswag, "plot.py": plot}[script].parse(arguments)
    else:
        module = {"fineweb.py": fineweb, "sample.py": sample, "bench.py": bench}[script]
        cli.parse(module.Config, {}, arguments, "")


def test_every_command_is_parsed_by_its_program():
    found = [command for page in PAGES.values() for command, _ in commands(page)]
    assert len(found) >= 25
    for command in found:
        for part in command.split(" && "):
            words = shlex.split(part)
            if words[0] == "pip" or words[1:3] == ["-m", "pytest"]:
                continue
            at = next(i for i, word in enumerate(words) if word.endswith(".py"))
            parse(words[at], words[at + 1 :])


def test_commands_with_one_log_dir_are_one_run():
    """Whoever gives all commands of a page in their order is never refused by the run before."""
    for name, page in PAGES.items():
        runs = {}
        for command, _ in commands(page):
            for part in command.split(" && "):
                words = shlex.split(part)
                if "train_gpt2.py" not in words:
                    continue
                config = train_gpt2.parse_config(words[words.index("train_gpt2.py") + 1 :])
                if not config.eval_only:
                    settings = vars(config).items()
                    kept = {k: v for k, v in settings if k not in train_gpt2.MAY_CHANGE - {"data"}}
                    assert runs.setdefault(config.log_dir, kept) == kept, (name, part)


def test_every_program_line_is_in_a_block_of_commands():
    """So that the tests here see it: a fence of another kind, or no fence, would hide it."""
    for name, page in PAGES.items():
        seen = len(commands(page))
        lines = re.findall(r"^ *(?:pip install|python|torchrun) .*$", page, re.MULTILINE)
        assert len(lines) == seen, name


def test_all_files_and_settings_that_the_pages_name_exist():
    written = ("log.txt", "progress.txt", "gpt2.sh", "run.json", "files.json", "manifest.json")
    folders = (ROOT, ROOT / "tests", ROOT / "support", ROOT / "docs")
    for page, text in PAGES.items():
        for name in set(re.findall(r"`((?:\w+/)?\w+\.(?:py|tiktoken|txt|md|toml))`", text)):
            exists = any((folder / name).exists() for folder in folders)
            assert exists or name in written, (page, name)
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
            assert ((ROOT / page).parent / target).exists(), (page, target)
    settings = train_gpt2.Config.__dataclass_fields__
    for name in ("data", "B", "max_steps", "init_from", "sample_prompt", "dtype", "tracker"):
        assert f"`{name}`" in README and name in settings, name
    for page, text in PAGES.items():
        for name in set(re.findall(r"`--(\w+)[=`]", text)):
            known = settings.keys() | fineweb.Config.__dataclass_fields__
            known |= sample.Config.__dataclass_fields__.keys()
            known |= bench.Config.__dataclass_fields__.keys()
            assert name in known or name in ("help", "style", "out", "limit"), (page, name)


# What pip installs is there already; `bench.py` and the tests have tests of their own.
WALK = [
    command
    for page in PAGES.values()
    for command, comment in commands(page)
    if re.split("[:,]", comment)[0] not in MARKS and "python -m pytest" not in command
]


@pytest.mark.faults
def test_a_newcomer_follows_the_pages_word_by_word(tmp_path):
    """All that needs neither network nor GPU, in the order of the pages, in a fresh copy."""
    copied = shutil.ignore_patterns(".*", "log*", "__pycache__", "shared", "tests")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=copied)
    tmp_path = tmp_path / "copy"
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

    code = next(block for block in blocks(README, "python") if "from transformers" in block)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(HF_HUB_OFFLINE="1"),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("QUEEN MARETH:"), done.stderr
    assert Path(tmp_path / "log_tiny" / "curves.png").exists()


def test_every_public_function_and_class_has_a_docstring():
    missing = [
        f"{path.name}: {node.name}"
        for path in (*ROOT.glob("*.py"), *(ROOT / "support").glob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not ast.get_docstring(node)
        if not node.name.startswith("_") and node.name != "main"
    ]
    assert missing == []
