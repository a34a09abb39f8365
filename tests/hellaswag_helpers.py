"""Helpers of the HellaSwag tests: examples, a small model, commands in processes, and a server."""

import functools
import http.server
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, command_line, environment

from support import fused_loss, hellaswag_eval
from support.distributed import Runtime
from train_gpt2 import GPT, GPTConfig

ALONE = Runtime(0, 1, torch.device("cpu"), torch.float32)

# -------------------------------------------------------------------------------------------------
# Examples and models

WORDS = (
    "the a man woman boy roof water then she he they jumps sits over under carefully slowly 3 "
    "1,000 it's don't naïve Straße 日本語 привет 🙂 and, but. why? TV"
).split()
MARKS = ["[title]", "[step]", "[header]", "[substeps]", "[]"]


def text(rng: random.Random, most: int) -> str:
    """Up to `most` words, with marks, double spaces and spaces at the end among them."""
    count = rng.randint(1, most)
    words = [rng.choice(WORDS if rng.random() < 0.85 else MARKS) for _ in range(count)]
    between = [rng.choice([" "] * 9 + ["  "]) for _ in words[1:]] + [rng.choice(["", "", "", " "])]
    return "".join(part for pair in zip(words, between) for part in pair)


def make_examples(count: int, seed: int = 0, most: int = 12) -> list[dict]:
    """HellaSwag-like examples; every third lacks ctx_a and ctx_b, as some copies of it do."""
    rng, examples = random.Random(seed), []
    for number in range(count):
        a, b = text(rng, rng.choice([3, most])), rng.choice(["", text(rng, 3)])
        example = {
            "ind": 100 + number,
            "activity_label": text(rng, 3),
            "ctx": f"{a} {b}" if b else a,
            "label": rng.randrange(4),
            "endings": [text(rng, rng.choice([1, 4, most])) for _ in range(4)],
        }
        examples.append(example | ({"ctx_a": a, "ctx_b": b} if number % 3 else {}))
    return examples


def make_example(ctx_a: str, ctx_b: str, endings: list[str], activity: str = "Roof") -> dict:
    """An example of given texts, with label 1."""
    ctx = f"{ctx_a} {ctx_b}" if ctx_b else ctx_a
    return {
        "activity_label": activity, "ctx": ctx, "ctx_a": ctx_a, "ctx_b": ctx_b, "label": 1,
        "endings": endings,
    }  # fmt: skip


ONLY_SPACES = make_example("all within] [step]", "", ["but", "a", "single", "space"], "[not closed")
HAND_MADE = [
    ONLY_SPACES,
    make_example(
        "A man is on a roof.", "he", ["sits.", "pulls up roofing.", "is using wrap.", "x"]
    ),
    make_example(
        "How to clean a mirror [title] Wipe it. [step] Take a cloth  that is dry.", "",
        ["[title] Dry it. [step] Use paper.", "[substeps] Rub.", "It [header] is. ", "[step] N"],
        "Home and Garden",
    ),
    make_example("[header] How to sing [title] Breathe [step]", "", ["a", "b", ".", "é"], "Arts"),
    make_example("Ends with a mark [step] ", "the Boy's dog", ["[step]", "runs", "  two", "naps "]),
    make_example("", "", ["Nothing", "stands", "before", "these"]),
    make_example("", "", ["Nothing", "but", "an activity", "here"], "[title]"),
    make_example("all within]", "", ["no", "context", "is", "left"], "[not closed"),
    make_example("日本語 の 文 🙂", "ÉTÉ", ["日本", "🙂🙂🙂", "ß", "\u00a0nbsp"], "Straße"),
    make_example("tab\tand\nline", "", ["\ttab", "line\n", "\n", "end"]),
    make_example("Long. " * 75, "he", ["runs " * 3, "sits", "is " * 20, "x"]),
    make_example("A short context", "", ["one ending is long " * 8, "x", "a b c", "d " * 12]),
    make_example(
        "", "", ["every ending " * 20, "is longer than " * 10, "the whole " * 15, "row " * 40]
    ),
]  # fmt: skip
EXAMPLES = HAND_MADE + make_examples(15)

SHAPES = {
    "one head": dict(block_size=64, n_layer=1, n_head=1, n_embd=16),
    "short window": dict(block_size=24, n_layer=2, n_head=2, n_embd=32),
    "long window": dict(block_size=128, n_layer=3, n_head=4, n_embd=32),
}


@functools.cache
def make_model(name: str = "short window", seed: int = 0) -> GPT:
    """A random model whose attention and positions matter, unlike those of a new one."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SHAPES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.2 / parameter.std())
    return model.eval()


def write_examples(path: Path, examples: list[dict]) -> Path:
    """Writes a .jsonl of examples, and returns its path."""
    lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path


def make_questions(examples: list[dict], style: str = "completion"):
    """The questions of examples in one style."""
    return [hellaswag_eval.make_question(example, style) for example in examples]


def set_batches(monkeypatch, batch_tokens: int, loss_chunk: int, length_step: int) -> None:
    """Sets the sizes of the batches."""
    monkeypatch.setitem(hellaswag_eval.BATCH_TOKENS, "cpu", batch_tokens)
    monkeypatch.setitem(fused_loss.CHUNK_ROWS, "cpu", loss_chunk)
    monkeypatch.setattr(hellaswag_eval, "LENGTH_STEP", length_step)


# -------------------------------------------------------------------------------------------------
# Commands in processes: one process imports torch, and forks another one for each command line

FORKS = """
import json, os, signal, sys, tempfile, traceback
from pathlib import Path

import hellaswag, train_gpt2
from support import hellaswag_eval, tokenizer
from support.errors import run_main

# What takes a second the first time happens before the forks.
import filelock, tqdm, urllib.request
config = train_gpt2.GPTConfig(block_size=1, n_layer=1, n_head=1, n_embd=1)
with tempfile.TemporaryDirectory() as directory:
    train_gpt2.GPT(config).save_pretrained(directory)
    train_gpt2.GPT.from_pretrained(directory)
tokenizer.get_encoding()


def prepare(case):
    os.environ.update(case.get("environment", {}))
    os.chdir(case.get("cwd", "."))
    for name in ("URL", "FOLDER", "EXAMPLES", "BATCH_TOKENS"):
        if name in case:
            setattr(hellaswag_eval, name, case[name])
    hellaswag_eval.URL = hellaswag_eval.URL.replace("PID", str(os.getpid()))
    hellaswag_eval.FOLDER = Path(hellaswag_eval.FOLDER)
    original, calls = hellaswag_eval.score, []

    def score(*arguments):
        calls.append(1)
        if len(calls) == case.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    hellaswag_eval.score = score
    sys.argv = [case["program"], *case["arguments"]]
    return {"hellaswag": hellaswag, "train_gpt2": train_gpt2}[case["program"]].main


def begin(case):
    files = [tempfile.TemporaryFile("w+") for _ in range(2)]
    if child := os.fork():
        return child, files
    code = 1
    try:
        signal.alarm(120)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for file, descriptor in zip(files, (1, 2)):
            os.dup2(file.fileno(), descriptor)
        run_main(prepare(case))
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def result(child, files):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in files:
        file.seek(0)
    return [code, *(file.read() for file in files)]


for line in sys.stdin:
    begun = [begin(case) for case in json.loads(line)]
    print(json.dumps([result(*one) for one in begun]), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def forks():
    """A function: cases, run at the same time -> their code, out, err."""
    env = environment(PYTHONPATH=str(ROOT), NO_PROXY="*", no_proxy="*")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    driver = subprocess.Popen([sys.executable, "-c", FORKS], **pipes)

    def run(*cases: dict) -> list[SimpleNamespace]:
        driver.stdin.write(json.dumps(cases) + "\n")
        driver.stdin.flush()
        results = json.loads(driver.stdout.readline())
        return [SimpleNamespace(code=code, out=out, err=err) for code, out, err in results]

    yield run
    driver.stdin.close()
    driver.wait(timeout=60)


def command(*arguments, **settings) -> dict:
    """A case of `forks`: hellaswag.py with these arguments."""
    return {"program": "hellaswag", "arguments": [str(a) for a in arguments], **settings}


def training(config, **settings) -> dict:
    """A case of `forks`: train_gpt2.py with this configuration."""
    return {"program": "train_gpt2", "arguments": command_line(config), **settings}


def scores_in(output: str) -> dict[str, str]:
    """{style: score} as hellaswag.py printed them."""
    return dict(re.findall(r"^(\w+): (acc .*)$", output, re.MULTILINE))


def assert_one_error(result, *words: str) -> None:
    """Exit code 2, and on standard error one line that contains `words`."""
    assert result.code == 2, result.err
    assert re.fullmatch(r"error: .+\n", result.err), result.err
    for word in words:
        assert word in result.err


# -------------------------------------------------------------------------------------------------
# Data: a server whose answers depend on the address, and files


class Server(http.server.ThreadingHTTPServer):
    """Serves twelve examples at /good/, and other answers at other addresses."""

    daemon_threads = True
    lines = [json.dumps(example) + "\n" for example in make_examples(12, most=6)]
    body = "".join(lines).encode()

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, kind: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{kind}/hellaswag_{{}}.jsonl"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests.append(self.path)
        kind, complete = self.path.split("/")[1], self.server.body
        if kind == "garbage":
            self.wfile.write(b"this is no HTTP\r\n\r\n")
        if kind in ("garbage", "nothing"):
            return
        if kind.startswith("slow"):
            time.sleep(1)
        short = complete[: len(complete) // 2]
        pages = {"short": short, "page": b"<p>\nLog in\n</p>\n", "empty": b""}
        content = pages.get(kind, complete)
        self.send_response({"missing": 404, "slow_missing": 404, "broken": 500}.get(kind, 200))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if kind in ("cut", "kill") else content)
        if kind == "kill":
            self.wfile.flush()
            os.kill(int(self.path.split("/")[2]), signal.SIGKILL)


@pytest.fixture
def server():
    with Server() as server:
        yield server
        server.shutdown()


GOOD = make_example("A man is on a roof.", "he", ["sits.", "pulls.", "is.", "x"])
BROKEN = {
    "not JSON": "hello\n",
    "not UTF-8": b"\xff\xfe\x00",
    "empty": "",
    "only blank lines": "\n\n",
    "a list": "[1, 2]\n",
    "a number": "7\n",
    "null": "null\n",
    "no label": json.dumps({k: v for k, v in GOOD.items() if k != "label"}),
    "no ctx": json.dumps({k: v for k, v in GOOD.items() if k != "ctx"}),
    "no endings": json.dumps({k: v for k, v in GOOD.items() if k != "endings"}),
    "three endings": json.dumps(GOOD | {"endings": ["a", "b", "c"]}),
    "endings are numbers": json.dumps(GOOD | {"endings": [1, 2, 3, 4]}),
    "endings are one text": json.dumps(GOOD | {"endings": "abcd"}),
    "ctx is null": json.dumps(GOOD | {"ctx": None}),
    "label 4": json.dumps(GOOD | {"label": 4}),
    "label -1": json.dumps(GOOD | {"label": -1}),
    "label is text": json.dumps(GOOD | {"label": "one"}),
    "cut off": json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:50],
}


@pytest.fixture(params=BROKEN)
def broken_file(request, tmp_path):
    """A file that is not a .jsonl of examples."""
    path, content = tmp_path / "broken.jsonl", BROKEN[request.param]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
