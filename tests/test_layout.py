"""The form of the repository: sizes, names, and imports that point one way.

These limits keep the program readable from the first line to the last. If one fails, move or
remove lines elsewhere; do not raise the limit or write denser lines.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

COMMANDS = ["bench", "fineweb", "hellaswag", "plot", "sample", "train_gpt2"]
SUPPORT = [f"support.{p.stem}" for p in sorted((ROOT / "support").glob("*.py"))]
HEAVY = (
    "transformers", "datasets", "matplotlib", "tensorboard", "wandb", "huggingface_hub", "pyarrow",
)  # fmt: skip
TRAINER = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
MAX_LINES = {
    "train_gpt2.py": (1000, "move what a reader of the trainer does not come for to support/"),
    "README.md": (200, "keep what a new user needs; details belong to docs/ or the docstrings"),
    **{
        str(path.relative_to(ROOT)): (700, "move tests to the file of their module, or split it")
        for path in sorted((ROOT / "tests").glob("*.py"))
    },
}


def path_of(module: str) -> Path:
    """The file of a module of the project."""
    return ROOT / f"{module.replace('.', '/')}.py"


def lines_of(node) -> int:
    return node.end_lineno - node.lineno + 1


# -------------------------------------------------------------------------------------------------
# Sizes


EDITED = "train_gpt2.py"  # by users, whose model may be longer than GPT-2


@pytest.mark.parametrize(
    "name", [pytest.param(EDITED, marks=pytest.mark.gpt2), *(n for n in MAX_LINES if n != EDITED)]
)
def test_a_file_is_not_too_long(name):
    most, remedy = MAX_LINES[name]
    found = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert found <= most, f"{name} has {found} lines, at most {most} are allowed: {remedy}"


def test_functions_of_the_trainer_fit_a_screen():
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    sizes = {n.name: lines_of(n) for n in ast.walk(ast.parse(TRAINER)) if isinstance(n, kinds)}
    long = {name: size for name, size in sizes.items() if size > 45}
    assert not long, f"train_gpt2.py: functions of more than 45 lines: {long}; split each of them"


@pytest.mark.gpt2
def test_the_model_is_short_and_comes_early():
    classes = {n.name: n for n in ast.parse(TRAINER).body if isinstance(n, ast.ClassDef)}
    names = ["CausalSelfAttention", "MLP", "Block", "GPT"]
    missing = [name for name in names if name not in classes]
    assert not missing, f"train_gpt2.py: no class {missing}; the model must be defined there"
    total = sum(lines_of(classes[name]) for name in names)
    assert total <= 150, f"the model has {total} lines, at most 150: no plumbing belongs into it"
    line = classes["GPTConfig"].lineno
    assert line < 230, f"the model begins at line {line} of train_gpt2.py: shorten what is before"


# -------------------------------------------------------------------------------------------------
# Files


def test_the_root_contains_the_six_commands():
    found = sorted(path.stem for path in ROOT.glob("*.py"))
    assert found == COMMANDS, "the root has commands only; what they share belongs to support/"


def test_support_is_one_level():
    folders = [p.name for p in (ROOT / "support").iterdir() if p.is_dir()]
    folders = [name for name in folders if name != "__pycache__"]
    assert not folders, f"support/ has the folders {folders}: it must stay one level"


def test_support_is_listed_in_its_docstring():
    """`support/__init__.py` has one line for each module."""
    text = ast.get_docstring(ast.parse(path_of("support.__init__").read_text(encoding="utf-8")))
    words = {line.split()[0].removesuffix(".py") for line in text.splitlines() if line.split()}
    modules = {name.removeprefix("support.") for name in SUPPORT} - {"__init__"}
    missing = sorted(modules - words)
    assert not missing, f"support/__init__.py: add a line to its docstring for {missing}"


# -------------------------------------------------------------------------------------------------
# Imports


def imports_of(module: str) -> set[str]:
    """The modules of the project that a module imports, anywhere in its file."""
    found = set()
    for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = f"support.{node.module}".rstrip(".") if node.level else node.module
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    return found & {*COMMANDS, *SUPPORT}


def test_support_imports_no_command():
    wrong = {module: imports_of(module) & {*COMMANDS} for module in SUPPORT}
    wrong = {module: names for module, names in wrong.items() if names}
    assert not wrong, f"{wrong}: commands import support; pass what is needed as an argument"


def test_there_is_no_import_cycle():
    """Imports within functions count too: they only hide a cycle."""
    graph = {module: imports_of(module) for module in (*COMMANDS, *SUPPORT)}

    def find_cycle(path: list[str]) -> list[str]:
        for name in sorted(graph[path[-1]]):
            if name in path:
                return [*path[path.index(name) :], name]
            if cycle := find_cycle([*path, name]):
                return cycle
        return []

    for module in graph:
        cycle = find_cycle([module])
        assert not cycle, f"{' -> '.join(cycle)}: move what both need to a module of its own"


def test_an_import_is_light_and_has_no_effect(tmp_path):
    """In a new interpreter: no heavy package, no process group, no file.

    The trainer takes little more time than torch alone.
    """
    modules = [name for name in (*COMMANDS, *SUPPORT) if name != "support.__init__"]
    program = f"""
import importlib, sys, time
import torch.distributed as dist
started = time.perf_counter()
import train_gpt2
seconds = time.perf_counter() - started
if seconds > 2:
    sys.exit(f"import train_gpt2 takes {{seconds:.1f}} s: import less in it")
for package in ("tiktoken", "torch._inductor.compile_fx"):
    if package in sys.modules:
        sys.exit(f"import train_gpt2 imports {{package}}: import it where it is needed")
for name in {modules}:
    importlib.import_module(name)
    heavy = [package for package in {HEAVY} if package in sys.modules]
    if heavy:
        sys.exit(f"import {{name}} imports {{heavy}}: import them in the function that needs them")
    if dist.is_initialized():
        sys.exit(f"import {{name}} opens a process group: open it in a function")
"""
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT / "support", copy / "support", ignore=shutil.ignore_patterns("__pycache__")
    )
    for command in COMMANDS:
        shutil.copy(path_of(command), copy)
    before = {*tmp_path.rglob("*")}
    variables = environment(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1", HOME=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=copy, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr
    written = sorted(map(str, {*tmp_path.rglob("*")} - before))
    assert not written, f"imports write {written}: write files in functions only"
