"""requirements.txt: pip keeps an installed torch, and each line has a range and a reason."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, environment, requires
from packaging.requirements import Requirement

LINES = [
    line
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
NEEDED = [Requirement(line.partition("#")[0]) for line in LINES]
TORCH_VERSIONS = ["2.8.0", "2.9.0", "2.11.0", "2.13.0", "2.13.0+cpu", "2.14.0"]


def lowest(requirement: Requirement) -> str:
    """The lower bound of a requirement's range."""
    return next(part.version for part in requirement.specifier if part.operator == ">=")


@pytest.mark.parametrize("line", LINES)
def test_a_line_has_a_range_and_a_reason(line):
    requirement, _, reason = line.partition("  # ")
    operators = {part.operator for part in Requirement(requirement).specifier}
    assert operators == {">=", "<"} and len(reason) > 5


def run_pip(command: str, directory, torch: str) -> subprocess.CompletedProcess:
    """A shell command's `pip install` where all requirements are installed, torch as given.

    The packages are metadata in `directory` only. pip installs nothing and sees no index.
    """
    for requirement in NEEDED:
        name = requirement.name.replace("-", "_")
        version = torch if name == "torch" else lowest(requirement)
        info = directory / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {requirement.name}\nVersion: {version}\n"
        )
    pip = f"{shlex.quote(sys.executable)} -m pip install --dry-run --no-index --no-deps"
    kept = {name: value for name, value in environment().items() if not name.startswith("PIP_")}
    kept |= {"PYTHONPATH": str(directory), "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        command.replace("pip install", pip), shell=True, cwd=ROOT, env=kept, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip


def test_the_range_of_torch_is_what_the_tests_ran_with():
    assert list(NEEDED[0].specifier.filter(TORCH_VERSIONS)) == TORCH_VERSIONS[1:-1]


@requires("pip")
@pytest.mark.parametrize("version", ["2.11.0", "2.10.0a0+b558c986e8.nv25.11"])
def test_pip_keeps_an_installed_torch_of_the_range(tmp_path, version):
    """Also one of NVIDIA's containers, which is a pre-release."""
    done = run_pip("pip install -r requirements.txt", tmp_path, version)
    assert done.returncode == 0, done.stderr
    assert f"already satisfied: {NEEDED[0]}" in done.stdout
    assert done.stdout.count("already satisfied") == len(NEEDED)


@requires("pip")
def test_pip_replaces_a_newer_torch(tmp_path):
    """Which fails here, where it finds no other."""
    done = run_pip("pip install -r requirements.txt", tmp_path, "2.14.1")
    assert done.returncode == 1 and "No matching distribution found for torch" in done.stderr


@requires("pip")
def test_the_readmes_command_keeps_a_newer_torch(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"`(grep [^`]*pip install [^`]*)`", readme)
    done = run_pip(command, tmp_path, "2.14.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("already satisfied") == len(NEEDED) - 1
    assert "already satisfied: torch" not in done.stdout
