"""Helpers of the Hub tests: an HTTP server on loopback that acts as huggingface.co and its CDN,
datasets on it, and runs of fineweb.py that use it.

A test module that uses the fixtures names this module in `pytest_plugins`.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, environment, reserved_port

from support import tokenizer

SECRET = "hf_thisIsSecretAndMustNotBeSeen"
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FOREVER = 10**9

# -------------------------------------------------------------------------------------------------
# The Hub


class Request(NamedTuple):
    time: float  # of the server's monotonic clock, when it arrived
    line: str  # method and path
    range: str | None
    token: str | None


class Hub:
    """Two servers, the Hub's site and its CDN, with the troubles that a test defines."""

    def __init__(self):
        self.datasets = {}  # {dataset: {commit or "main": (commit, {path: bytes})}}
        self.requests, self.troubles, self.lock = [], [], threading.Lock()
        self.held = contextlib.ExitStack()
        handler = type("ForThisHub", (Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        for server in self.servers:
            server.daemon_threads, server.block_on_close = True, False
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        # Two host names: huggingface_hub 1.33 takes two ports of one host for one server.
        self.url, self.cdn = (
            f"http://{host}:{server.server_port}"
            for host, server in zip(("127.0.0.1", "localhost"), self.servers)
        )

    def publish(self, dataset: str, files: dict[str, bytes]) -> str:
        """A new commit on `main`."""
        commit = hashlib.sha1(repr((dataset, sorted(files.items()))).encode()).hexdigest()
        revisions = self.datasets.setdefault(dataset, {})
        revisions[commit] = revisions["main"] = (commit, files)
        return commit

    def trouble(self, pattern: str, act, times: int = 1) -> None:
        """Lets `act(handler)` answer the next requests whose "METHOD path" matches the pattern.

        Where it returns True, the true answer follows.
        """
        self.troubles.append([re.compile(pattern), times, act])

    def note(self, request: Request):
        """Records a request. Returns the `act` of the trouble that it meets, or None."""
        with self.lock:
            self.requests.append(request)
            for trouble in self.troubles:
                if trouble[1] > 0 and trouble[0].search(request.line):
                    trouble[1] -= 1
                    return trouble[2]

    def asked(self, pattern: str) -> list[Request]:
        with self.lock:
            return [request for request in self.requests if re.search(pattern, request.line)]

    def fetched(self) -> list[str]:
        """The names of the files whose contents were requested, in order."""
        return [Path(request.line).name for request in self.asked("^GET /cdn/")]

    def stop_listening(self) -> None:
        """Its address refuses connections, and no other server is given its port."""
        held = self.held.enter_context(reserved_port())
        self.url = f"http://127.0.0.1:{held}"

    def close(self) -> None:
        self.held.close()
        for server in self.servers:
            server.shutdown()
            server.server_close()


ROUTES = re.compile(
    r"/(?P<where>api/datasets|datasets|cdn)/(?P<dataset>[^/]+/[^/]+)"
    r"(/(?P<what>revision|tree|paths-info|resolve)(/(?P<revision>[^/]+)(/(?P<path>.*))?)?)?"
)


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does, as far as `datasets` and `huggingface_hub` can see."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # of a client that was killed
            super().handle()

    def do_GET(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.form = parse_qs(body.decode())
        path = unquote(url.path)
        self.route = ROUTES.fullmatch(path)
        line, headers = f"{self.command} {path}", self.headers
        act = self.hub.note(
            Request(time.monotonic(), line, headers.get("Range"), headers.get("Authorization"))
        )
        if act is None or act(self):
            self.answer()

    do_HEAD = do_POST = do_GET

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Keyword X_Error_Code is the header X-Error-Code."""
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def answer(self) -> None:
        if not self.route:
            return self.send(404)
        revisions = self.hub.datasets.get(self.route["dataset"])
        if revisions is None:  # like the Hub, which does not reveal private ones
            return self.send(401, X_Error_Code="RepoNotFound")
        if (self.route["revision"] or "main") not in revisions:
            return self.send(404, X_Error_Code="RevisionNotFound")
        self.commit, files = revisions[self.route["revision"] or "main"]
        if self.route["what"] == "tree":
            self.send_tree(files, self.route["path"])
        elif self.route["what"] == "paths-info":
            self.send_json([entry(p, files[p]) for p in self.form["paths"] if p in files])
        elif self.route["what"] != "resolve":
            self.send_json({"_id": "1", "id": self.route["dataset"], "sha": self.commit})
        elif self.route["path"] not in files:
            self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit)
        elif self.route["where"] == "cdn":
            self.send_file(self.contents())
        else:
            self.send_resolved(self.contents())

    def contents(self) -> bytes:
        """The content of the requested file."""
        revisions = self.hub.datasets[self.route["dataset"]]
        return revisions[self.route["revision"]][1][self.route["path"]]

    def send_tree(self, files: dict[str, bytes], path: str | None) -> None:
        prefix, recursive = f"{path}/" if path else "", self.query["recursive"] == ["true"]
        entries = {}
        for file in sorted(files):
            if file.startswith(prefix):
                parts = file[len(prefix) :].split("/")
                for i in range(1, len(parts) if recursive else min(2, len(parts))):
                    above = prefix + "/".join(parts[:i])
                    entries[above] = {"type": "directory", "oid": "0" * 40, "path": above}
                if recursive or len(parts) == 1:
                    entries[file] = entry(file, files[file])
        if path and not entries:
            return self.send(404, X_Error_Code="EntryNotFound")
        self.send_json(list(entries.values()))

    def send_resolved(self, contents: bytes) -> None:
        """A small file itself, a large one (LFS) as a redirection to a signed address."""
        info = entry(self.route["path"], contents)
        if "lfs" not in info:
            return self.send_file(contents, X_Repo_Commit=self.commit, ETag=f'"{info["oid"]}"')
        path = f"{self.route['dataset']}/resolve/{self.commit}/{quote(self.route['path'])}"
        self.send(
            302,
            Location=f"{self.hub.cdn}/cdn/{path}?Signature=abc",
            X_Repo_Commit=self.commit,
            X_Linked_Size=str(len(contents)),
            X_Linked_ETag=f'"{info["lfs"]["oid"]}"',
        )

    def send_file(self, contents: bytes, **headers: str) -> None:
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, size = int(wanted[1]), len(contents)
            headers |= {"Content_Range": f"bytes {start}-{size - 1}/{size}"}
            return self.send(206, contents[start:], **headers)
        self.send(200, contents, **headers)


def entry(path: str, contents: bytes) -> dict:
    """The Hub's description of a file."""
    info = {"type": "file", "path": path, "size": len(contents)}
    info["oid"] = hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()
    if path.endswith((".parquet", ".gz")):
        digest = hashlib.sha256(contents).hexdigest()
        info["lfs"] = {"oid": digest, "size": len(contents), "pointerSize": 134}
    return info


# -------------------------------------------------------------------------------------------------
# Troubles


def status(code: int, **headers: str):
    return lambda handler: handler.send(code, **headers)


def cut_after(count: int, reset: bool = False):
    """Sends `count` bytes of the file, then closes or resets the connection."""

    def act(handler):
        contents = handler.contents()
        handler.send(200, contents[:count], Content_Length=str(len(contents)))
        handler.close_connection = True
        if reset:  # close() sends RST where it need not linger
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            time.sleep(0.2)  # so that the client has read what came before
            handler.connection.shutdown(socket.SHUT_RD)
            os.close(handler.connection.detach())

    return act


def short(handler):
    """Sends an incomplete body with a matching length."""
    handler.send_file(handler.contents()[:-10])


def altered(handler):
    contents = bytearray(handler.contents())
    contents[len(contents) // 2] ^= 1
    handler.send_file(bytes(contents))


def hold_until(event: threading.Event):
    """Answers when the event is set."""
    return lambda handler: event.wait(120)


def login_page(handler):
    """The answer of some networks to every request."""
    handler.send(200, b"<html>Please log in.</html>", Content_Type="text/html")


# -------------------------------------------------------------------------------------------------
# Datasets, runs, and the expected shards


def make_texts(seed: int, count: int, words: int = 200) -> list[str]:
    """English of about `words` words each."""
    all_words = (ROOT / "input.txt").read_text(encoding="utf-8").split(" ")
    places = np.random.default_rng(seed).integers(0, len(all_words) - 2 * words, count)
    return [" ".join(all_words[p : p + words + p % words]) for p in places]


def parquet(texts: list[str], rows: int = 4, padding: int = 0) -> bytes:
    """A file with `rows` rows per group and `padding` bytes in another column."""
    noise = np.random.default_rng(0).bytes(padding // len(texts))
    file = io.BytesIO()
    table = pa.table({"id": [*map(str, range(len(texts)))], "text": texts})
    table = table.append_column("noise", [[noise] * len(texts)])
    pq.write_table(table, file, row_group_size=rows, use_dictionary=False)
    return file.getvalue()


def jsonl_gz(texts: list[str], column: str) -> bytes:
    lines = [json.dumps({column: text, "url": "x"}) + "\n" for text in texts]
    return gzip.compress("".join(lines).encode(), mtime=0)


def card(configurations: dict[str, dict[str, str]]) -> bytes:
    """A README.md with {configuration: {split: glob}}."""
    lines = ["---", "license: odc-by", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: '{path}'"]
    return "\n".join([*lines, "---", "# A dataset", ""]).encode()


TEXTS = [make_texts(seed, 12) for seed in range(6)]  # of the files of a dataset
SAMPLES = [f"{i:03d}_00000.parquet" for i in range(len(TEXTS))]
ALL = sum(TEXTS, [])
SIZE = 3000  # tokens of a shard: each file fills one or two


def sample_10bt(texts=TEXTS, **kwargs) -> dict[str, bytes]:
    """A dataset in FineWeb-Edu's layout."""
    configurations = {
        "default": {"train": "data/*/*"},
        "sample-10BT": {"train": "sample/10BT/*"},
        "sample-100BT": {"train": "sample/100BT/*"},
    }
    other = parquet(["not this one"])
    files = {f"sample/10BT/{name}": parquet(part, **kwargs) for name, part in zip(SAMPLES, texts)}
    files |= {f"{d}/000_00000.parquet": other for d in ("data/CC-MAIN-2024-10", "sample/100BT")}
    return files | {"README.md": card(configurations)}


def start(cwd: Path, url: str, *arguments: str, set_up: str = "", **variables):
    """`python fineweb.py` in `cwd`; with `set_up`, statements that come before its main()."""
    if set_up:
        imports = "import fineweb; from support import errors, hub"
        set_up = f"{imports}; {set_up}; errors.run_main(fineweb.main)"
    program = ["-c", set_up] if set_up else [str(ROOT / "fineweb.py")]
    command = [*program, f"--shard_size={SIZE}", "--workers=1", *arguments]
    return start_python(cwd, url, command, **variables)


def start_python(cwd: Path, url: str, command: list[str], **variables) -> subprocess.Popen:
    """A Python process that uses `url` as the Hub."""
    kept = {
        name: value
        for name, value in environment().items()
        if not name.startswith(("HF_", "HUGGING", "SLURM_")) and "proxy" not in name.lower()
    }
    kept |= {"HF_ENDPOINT": url, "HF_HOME": str(cwd / "hf"), "HF_TOKEN": SECRET, "NO_PROXY": "*"}
    kept |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    kept |= {"PYTHONPATH": str(ROOT)} | variables
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, *command]
    return subprocess.Popen(command, cwd=cwd, env=kept, start_new_session=True, **pipes)


def kill(process: subprocess.Popen) -> None:
    """`kill -9` of a process and of all that it started. Collects what they leave behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


class Done(NamedTuple):
    code: int
    out: str
    err: str


def finish(process: subprocess.Popen, timeout: float = 60, stdin: str = "") -> Done:
    try:
        out, err = process.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        kill(process)
        raise AssertionError(f"no end in {timeout} s: {error.stderr}") from None
    assert SECRET not in out + err
    return Done(process.returncode, out, err)


def run(cwd: Path, url: str, *arguments: str, **kwargs) -> Done:
    return finish(start(cwd, url, *arguments, **kwargs))


def error_of(done: Done) -> str:
    """The error line of a run that failed."""
    assert done.code == 2 and "Traceback" not in done.err, done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.err.endswith(f"{errors[0]}\n"), done.err
    return errors[0]


def tokens_of(texts: list[str]) -> np.ndarray:
    """The oracle: one document after the other, with tiktoken."""
    encoding, ids = tokenizer.get_encoding(), []
    for text in texts:
        ids += [encoding.eot_token, *encoding.encode_ordinary(text)]
    return np.array(ids, dtype=np.uint16)


def shards_of(texts: list[str]) -> dict[str, bytes]:
    """{name: contents} of the shards that one process makes of them."""
    tokens, shards = tokens_of(texts), {}
    for number, first in enumerate(range(0, len(tokens), SIZE)):
        file = io.BytesIO()
        np.save(file, tokens[first : first + SIZE])
        split = "val" if number == 0 else "train"
        shards[f"edufineweb_{split}_{number:06d}.npy"] = file.getvalue()
    return shards


def assert_holds(directory: Path, texts: list[str]) -> None:
    """The directory must hold these shards, the manifest and the lock, and nothing else."""
    found = {path.name: path for path in directory.iterdir()}
    expected = shards_of(texts)
    assert len(expected) > 2
    assert set(found) == {*expected, "manifest.json", ".lock_00000"}
    for name, contents in expected.items():
        assert found[name].read_bytes() == contents, name


def finished_shards(directory: Path) -> dict[str, tuple[int, int]]:
    """{name: (inode, modification time)}."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in directory.glob("*.npy")}


def wait_for(condition, process: subprocess.Popen, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def hub():
    made = Hub()
    yield made
    made.close()


def assert_without_token(directory: Path) -> None:
    for path in directory.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.fixture
def no_file_holds_the_token(tmp_path):
    yield
    assert_without_token(tmp_path)
