"""fineweb.py against a Hub: a real HTTP server on loopback that plays huggingface.co and its CDN.

Shown: datasets become the oracle's shards; what is wrong is told in one line; 429, 5xx, cuts, short
and altered files are overcome; kills, new commits and lost listings do not matter; the token
reaches the Hub and nothing else.
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
from conftest import ROOT, environment

from support import hub as hub_module
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
    """Two servers, the Hub's site and its CDN, with the troubles that a test asks for."""

    def __init__(self):
        self.datasets = {}  # {dataset: {commit or "main": (commit, {path: bytes})}}
        self.requests, self.troubles, self.lock = [], [], threading.Lock()
        handler = type("ForThisHub", (Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        for server in self.servers:
            server.daemon_threads, server.block_on_close = True, False
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def publish(self, dataset: str, files: dict[str, bytes]) -> str:
        """A new commit on `main`."""
        commit = hashlib.sha1(repr((dataset, sorted(files.items()))).encode()).hexdigest()
        revisions = self.datasets.setdefault(dataset, {})
        revisions[commit] = revisions["main"] = (commit, files)
        return commit

    def trouble(self, pattern: str, act, times: int = 1) -> None:
        """Has `act(handler)` answer the next requests of which "METHOD path" has the pattern.

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
        """The names of the files whose contents were asked for, in order."""
        return [Path(request.line).name for request in self.asked("^GET /cdn/")]

    def close(self) -> None:
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
        if revisions is None:  # the Hub says neither whether it is private nor whether it is there
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
        """What the file is that this request is for."""
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
        facts = entry(self.route["path"], contents)
        if "lfs" not in facts:
            return self.send_file(contents, X_Repo_Commit=self.commit, ETag=f'"{facts["oid"]}"')
        path = f"{self.route['dataset']}/resolve/{self.commit}/{quote(self.route['path'])}"
        self.send(
            302,
            Location=f"{self.hub.cdn}/cdn/{path}?Signature=abc",
            X_Repo_Commit=self.commit,
            X_Linked_Size=str(len(contents)),
            X_Linked_ETag=f'"{facts["lfs"]["oid"]}"',
        )

    def send_file(self, contents: bytes, **headers: str) -> None:
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, size = int(wanted[1]), len(contents)
            headers |= {"Content_Range": f"bytes {start}-{size - 1}/{size}"}
            return self.send(206, contents[start:], **headers)
        self.send(200, contents, **headers)


def entry(path: str, contents: bytes) -> dict:
    """What the Hub tells of a file."""
    facts = {"type": "file", "path": path, "size": len(contents)}
    facts["oid"] = hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()
    if path.endswith((".parquet", ".gz")):
        digest = hashlib.sha256(contents).hexdigest()
        facts["lfs"] = {"oid": digest, "size": len(contents), "pointerSize": 134}
    return facts


# Troubles


def status(code: int, **headers: str):
    return lambda handler: handler.send(code, **headers)


def cut_after(count: int, reset: bool = False):
    """Sends `count` bytes of the file, then ends the connection, politely or not."""

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
    """Sends less than all, and that as all."""
    handler.send_file(handler.contents()[:-10])


def altered(handler):
    contents = bytearray(handler.contents())
    contents[len(contents) // 2] ^= 1
    handler.send_file(bytes(contents))


def hold_until(event: threading.Event):
    """Answers only then."""
    return lambda handler: event.wait(120)


def login_page(handler):
    """What some networks answer to anything."""
    handler.send(200, b"<html>Please log in.</html>", Content_Type="text/html")


# -------------------------------------------------------------------------------------------------
# Datasets, runs, and what the shards should be


def make_texts(seed: int, count: int, words: int = 200) -> list[str]:
    """English of about `words` words each."""
    all_words = (ROOT / "input.txt").read_text(encoding="utf-8").split(" ")
    places = np.random.default_rng(seed).integers(0, len(all_words) - 2 * words, count)
    return [" ".join(all_words[p : p + words + p % words]) for p in places]


def parquet(texts: list[str], rows: int = 4, padding: int = 0) -> bytes:
    """A file with `rows` rows a group and `padding` bytes that no text needs."""
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
        set_up = f"import errors, fineweb, hub; {set_up}; errors.run_main(fineweb.main)"
    program = ["-c", set_up] if set_up else [str(ROOT / "fineweb.py")]
    command = [*program, f"--shard_size={SIZE}", "--workers=1", *arguments]
    return start_python(cwd, url, command, **variables)


def start_python(cwd: Path, url: str, command: list[str], **variables) -> subprocess.Popen:
    """A Python process that takes `url` for the Hub."""
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
    """The one line that ends a run which failed."""
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
    """There must be these shards and the manifest, and nothing else but the lock."""
    found = {path.name: path for path in directory.iterdir()}
    expected = shards_of(texts)
    assert len(expected) > 2
    assert set(found) == {*expected, "manifest.json", ".lock_00000"}
    for name, contents in expected.items():
        assert found[name].read_bytes() == contents, name


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


@pytest.fixture(autouse=True)
def no_file_holds_the_token(tmp_path):
    yield
    assert_without_token(tmp_path)


def assert_without_token(directory: Path) -> None:
    for path in directory.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


# Runs that mostly wait: begun before all tests, so that these need not wait for them.


def no_hub(hub: Hub) -> list[str]:
    """Nobody listens at its address; `huggingface_hub` alone tries that for half a minute."""
    hub.close()
    return []


def trouble_in_listing(hub: Hub) -> list[str]:
    hub.publish(FINEWEB_EDU, sample_10bt())
    hub.trouble("^HEAD .*README.md", status(500))
    hub.trouble("^GET /api/datasets/.*/revision/", status(429, Retry_After="2"))
    hub.trouble("^GET /api/datasets/.*/tree/[^/]*/sample/10BT$", status(429, Retry_After="2"))
    hub.trouble("^POST /api/datasets/.*/paths-info/", status(503))
    return []


NINE = {f"{seed}.parquet": make_texts(seed, 6) for seed in range(9)}


def trouble_in_fetching(hub: Hub) -> list[str]:
    hub.publish("o/nine", {name: parquet(texts) for name, texts in NINE.items()})
    hub.trouble("^GET .*/0.parquet", status(429, Retry_After="2"))
    # huggingface_hub asks a second time at once before it waits, so it is refused twice.
    hub.trouble("^HEAD .*/1.parquet", status(429, Retry_After="2"), 2)
    hub.trouble("^GET .*/2.parquet", hold_until(threading.Event()))
    hub.trouble("^GET .*/3.parquet", altered)
    hub.trouble("^GET .*/4.parquet", short)
    hub.trouble("^GET .*/5.parquet", cut_after(5000, reset=True))
    for number, code in ((6, 500), (7, 502), (8, 503)):
        hub.trouble(f"^GET .*/{number}.parquet", status(code))
    return ["--source=o/nine"]


@pytest.fixture(scope="module", autouse=True)
def waiting(tmp_path_factory):
    """{name: (Hub, working directory, run)}."""
    runs = {}
    for prepare in (no_hub, trouble_in_listing, trouble_in_fetching):
        made, cwd = Hub(), tmp_path_factory.mktemp(prepare.__name__)
        settings = [*prepare(made), "--out=here"]
        process = start(cwd, made.url, *settings, HF_HUB_DOWNLOAD_TIMEOUT="1")
        runs[prepare.__name__] = made, cwd, process
    yield runs
    for made, cwd, process in runs.values():
        kill(process)
        made.close()
        assert_without_token(cwd)


# -------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(working directory, Hub, run) of `python fineweb.py` with no setting but the shard's size."""
    made, cwd = Hub(), tmp_path_factory.mktemp("built")
    made.publish(FINEWEB_EDU, sample_10bt())
    yield cwd, made, run(cwd, made.url)
    made.close()


def test_no_setting_builds_fineweb_edu_in_the_working_directory(built):
    cwd, made, done = built
    assert done.code == 0, done.err
    assert_holds(cwd / "edu_fineweb10B", ALL)
    assert f"{len(shards_of(ALL))} shards, {len(tokens_of(ALL)):,} tokens" in done.out
    assert f"{len(SAMPLES)} files of" in done.err and "free" in done.err
    assert sorted(made.fetched()) == SAMPLES  # each once, and none of another configuration


def test_the_manifest_names_the_commit_and_the_files(built):
    cwd, made, _ = built
    manifest = json.loads((cwd / "edu_fineweb10B" / "manifest.json").read_text())
    commit, files = made.datasets[FINEWEB_EDU]["main"]
    assert manifest["commit"] == commit and manifest["settings"]["name"] == "sample-10BT"
    names = [f"sample/10BT/{name}" for name in SAMPLES]
    expected = [(name, len(files[name]), hashlib.sha256(files[name]).hexdigest()) for name in names]
    found = [(source["file"], source["bytes"], source["sha256"]) for source in manifest["sources"]]
    assert found == expected


def test_the_token_is_given_to_the_hub_and_to_nobody_else(built):
    cwd, made, _ = built
    for where in ("api/datasets/.*/tree", "datasets/.*/resolve/.*README", "datasets/.*parquet"):
        requests = made.asked(f" /{where}")
        assert requests and {request.token for request in requests} == {f"Bearer {SECRET}"}
    assert {request.token for request in made.asked(" /cdn/")} == {None}
    assert_without_token(cwd)


def test_a_finished_directory_needs_no_network(built):
    cwd, made, _ = built
    asked = len(made.requests)
    done = run(cwd, made.url, HF_HUB_OFFLINE="1")
    assert done.code == 0 and "finished already" in done.out, done.err
    assert len(made.requests) == asked
    assert_holds(cwd / "edu_fineweb10B", ALL)


def test_a_lost_shard_is_made_anew_from_the_commit_it_came_from(built):
    cwd, made, _ = built
    made.publish(FINEWEB_EDU, sample_10bt([make_texts(99, 5)]))
    made.trouble("/api/", status(500), FOREVER)
    (cwd / "edu_fineweb10B" / "edufineweb_train_000002.npy").unlink()
    asked = len(made.fetched())
    done = run(cwd, made.url)
    assert done.code == 0, done.err
    assert_holds(cwd / "edu_fineweb10B", ALL)
    assert SAMPLES[-1] not in made.fetched()[asked:]


def test_source_name_and_text_column(hub, tmp_path):
    """Compressed jsonl in sub-directories, in the order of the dataset, with a difficult name."""
    texts = {"en/a/x.jsonl.gz": TEXTS[0], "en/b & c/50% #1.jsonl.gz": TEXTS[1]}
    files = {name: jsonl_gz(part, "content") for name, part in texts.items()}
    files["de/x.jsonl.gz"] = jsonl_gz(["anders"], "content")
    configurations = {"english": {"train": "en/**"}, "german": {"train": "de/*"}}
    hub.publish("some-one/web_text.v2", files | {"README.md": card(configurations)})
    settings = ["--source=some-one/web_text.v2", "--name=english", "--text_column=content"]
    done = run(tmp_path, hub.url, *settings, "--out=here")
    assert done.code == 0, done.err
    assert_holds(tmp_path / "here", TEXTS[0] + TEXTS[1])


def test_no_more_files_lie_on_the_disk_than_are_soon_needed(hub, tmp_path):
    many = [make_texts(seed, 8, words=60) for seed in range(12)]
    files = {f"{i:02d}.parquet": parquet(part, rows=1) for i, part in enumerate(many)}
    hub.publish("o/many", files)
    counts = []

    def count(handler):
        counts.append(len([*(tmp_path / "here").rglob("*.parquet")]))
        return True

    hub.trouble("^GET /cdn/", count, FOREVER)
    settings = ["--source=o/many", "--out=here"]
    done = run(tmp_path, hub.url, *settings, set_up="fineweb.SAVE_S = 0")
    assert done.code == 0, done.err
    assert len(counts) == len(many) and max(counts) <= hub_module.AHEAD + 2
    assert_holds(tmp_path / "here", sum(many, []))


# -------------------------------------------------------------------------------------------------
# Several processes


def test_each_rank_fetches_its_own_files_only(hub, tmp_path):
    hub.publish(FINEWEB_EDU, sample_10bt())
    ranks = [
        start(tmp_path, hub.url, RANK=str(rank), WORLD_SIZE="2", HF_TOKEN=f"{SECRET}{rank}")
        for rank in range(2)
    ]
    for done in map(finish, ranks):
        assert done.code == 0, done.err
    assert sorted(hub.fetched()) == SAMPLES
    for rank, share in enumerate((SAMPLES[:3], SAMPLES[3:])):
        asked = hub.asked("^HEAD /datasets/.*parquet")
        mine = [Path(r.line).name for r in asked if r.token == f"Bearer {SECRET}{rank}"]
        assert sorted(mine) == share
    assert np.array_equal(all_tokens(tmp_path / "edu_fineweb10B"), tokens_of(ALL))


def all_tokens(directory: Path) -> np.ndarray:
    """In the order of the manifest."""
    shards = json.loads((directory / "manifest.json").read_text())["shards"]
    return np.concatenate([np.load(directory / shard["file"]) for shard in shards])


def test_a_rank_that_begins_later_takes_the_commit_of_the_others(hub, tmp_path):
    commit = hub.publish(FINEWEB_EDU, sample_10bt())
    assert run(tmp_path, hub.url, RANK="0", WORLD_SIZE="2").code == 0
    hub.publish(FINEWEB_EDU, sample_10bt() | {"LICENSE": b"a new file"})
    done = run(tmp_path, hub.url, RANK="1", WORLD_SIZE="2")
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "edu_fineweb10B" / "manifest.json").read_text())
    assert manifest["commit"] == commit
    assert np.array_equal(all_tokens(tmp_path / "edu_fineweb10B"), tokens_of(ALL))


# -------------------------------------------------------------------------------------------------
# Troubles that pass


def gap_after(hub: Hub, count: int, pattern: str) -> float:
    """Seconds from the `count`-th of these requests to the next one."""
    times = [request.time for request in hub.asked(pattern)]
    return times[count] - times[count - 1]


def test_listing_overcomes_429_and_5xx(waiting):
    """A 429 is not asked again before its Retry-After is over, on the server's own clock."""
    hub, cwd, process = waiting["trouble_in_listing"]
    done = finish(process)
    assert done.code == 0, done.err
    assert_holds(cwd / "here", ALL)
    assert gap_after(hub, 1, "^GET /api/datasets/.*/revision/") >= 2
    assert gap_after(hub, 1, "^GET /api/datasets/.*/sample/10BT$") >= 2
    assert "HTTP 429" in done.err  # said, so that nobody wonders


@pytest.mark.faults
def test_a_silence_while_listing_does_not_last_for_ever(hub, tmp_path):
    hub.publish(FINEWEB_EDU, sample_10bt())
    answered = threading.Event()
    hub.trouble("^(GET|POST) /api/datasets/.*/(tree|paths-info)/", hold_until(answered))
    process = start(tmp_path, hub.url, set_up="hub.SILENCE_S = 1")
    assert finish(process, timeout=20).code == 0
    answered.set()
    assert_holds(tmp_path / "edu_fineweb10B", ALL)


def test_fetching_overcomes_what_networks_do(waiting):
    """429 with Retry-After, 5xx, a reset, a silence, a body that is short or altered."""
    hub, cwd, process = waiting["trouble_in_fetching"]
    done = finish(process)
    assert done.code == 0, done.err
    assert_holds(cwd / "here", sum(NINE.values(), []))
    assert gap_after(hub, 1, "^GET .*/0.parquet") >= 2
    assert gap_after(hub, 2, "^HEAD .*/1.parquet") >= 2
    fetched = hub.fetched()
    for name in NINE:
        assert fetched.count(name) >= (1 if name == "1.parquet" else 2)  # its HEAD was refused


def test_a_download_that_was_cut_goes_on_where_it_stopped(hub, tmp_path):
    """`huggingface_hub` writes 10 MiB at a time, so the file must have more."""
    hub.publish("o/big", {"big.parquet": parquet(ALL, padding=12_000_000)})
    hub.trouble("^GET /cdn/", cut_after(11_000_000))
    done = run(tmp_path, hub.url, "--source=o/big", "--out=here")
    assert done.code == 0, done.err
    assert_holds(tmp_path / "here", ALL)
    assert [request.range for request in hub.asked("^GET /cdn/")] == [None, f"bytes={10 << 20}-"]


def test_an_address_that_expired_is_asked_for_anew(hub, tmp_path):
    """The CDN's signed addresses hold for an hour; a slow download may need longer."""
    hub.publish("o/bare", {"train.parquet": parquet(ALL)})
    hub.trouble("^GET /cdn/", status(403))
    done = run(tmp_path, hub.url, "--source=o/bare", "--out=here")
    assert done.code == 0, done.err
    assert_holds(tmp_path / "here", ALL)
    assert len(hub.asked("^HEAD .*train.parquet")) == 2


@pytest.mark.faults
def test_a_failure_of_xet_storage_is_overcome(hub, tmp_path):
    """Where the Hub keeps large files; its client says everything by a RuntimeError."""
    pytest.importorskip("hf_xet")

    def resolved(handler):
        contents = handler.contents()
        handler.send(
            302,
            Location=f"{hub.cdn}/nowhere",
            X_Repo_Commit=handler.route["revision"],
            X_Linked_Size=str(len(contents)),
            X_Linked_ETag=f'"{hashlib.sha256(contents).hexdigest()}"',
            X_Xet_Hash=hashlib.sha256(contents).hexdigest(),
            Link=f'<{hub.url}/xet-token>; rel="xet-auth"',
        )

    headers = {
        "X_Xet_Cas_Url": hub.cdn,
        "X_Xet_Access_Token": "t",
        "X_Xet_Token_Expiration": "9" * 10,
    }
    hub.publish("o/bare", {"train.parquet": parquet(ALL)})
    hub.trouble("^HEAD .*train.parquet", resolved)
    hub.trouble("^GET /xet-token", status(200, **headers), FOREVER)
    done = run(tmp_path, hub.url, "--source=o/bare", "--out=here")
    assert hub.asked("/reconstructions/")
    assert done.code == 0, done.err
    assert_holds(tmp_path / "here", ALL)


# -------------------------------------------------------------------------------------------------
# Troubles that stay, and kills


def test_what_does_not_pass_ends_the_run_and_the_same_command_goes_on(hub, tmp_path):
    hub.publish(FINEWEB_EDU, sample_10bt())
    hub.trouble(f"^GET /cdn/.*{SAMPLES[3]}", status(503), FOREVER)
    done = run(tmp_path, hub.url, set_up="hub.TRIES = 2")
    error = error_of(done)
    assert SAMPLES[3] in error and "503" in error and "same command again" in error
    hub.troubles.clear()
    made, asked = finished_shards(tmp_path / "edu_fineweb10B"), len(hub.fetched())
    assert made
    done = run(tmp_path, hub.url)
    assert done.code == 0 and "going on after" in done.err, done.err
    assert_holds(tmp_path / "edu_fineweb10B", ALL)
    assert made.items() <= finished_shards(tmp_path / "edu_fineweb10B").items()
    assert not {*hub.fetched()[asked:]} & {*SAMPLES[:3]}


def finished_shards(directory: Path) -> dict[str, tuple[int, int]]:
    """{name: what changes when it is written again}."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in directory.glob("*.npy")}


def test_a_killed_run_goes_on_with_the_commit_it_began_with(hub, tmp_path):
    """Though `main` is another one by then, and nothing can be listed any more."""
    out, answered = tmp_path / "edu_fineweb10B", threading.Event()
    hub.publish(FINEWEB_EDU, sample_10bt())
    hub.trouble(f"^GET /cdn/.*{SAMPLES[3]}", hold_until(answered))
    first_three = len(tokens_of(sum(TEXTS[:3], []))) // SIZE
    process = start(tmp_path, hub.url, set_up="fineweb.SAVE_S = 0")

    def there(name: str) -> list[Path]:
        return [*out.rglob(name)]

    wait_for(lambda: len(finished_shards(out)) >= first_three, process)
    wait_for(lambda: there(SAMPLES[4]) and there(SAMPLES[5]), process)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    answered.set()
    assert there("*.incomplete")  # of the file that was on its way

    hub.publish(FINEWEB_EDU, sample_10bt([make_texts(99, 12) for _ in TEXTS]))
    hub.trouble(" /api/|README|/main/", status(500), FOREVER)
    made, asked = finished_shards(out), len(hub.fetched())
    done = run(tmp_path, hub.url)
    assert done.code == 0 and "going on after" in done.err, done.err
    assert_holds(out, ALL)
    assert made.items() <= finished_shards(out).items()
    assert hub.fetched()[asked:] == [SAMPLES[3]]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes in /proc")
def test_no_worker_is_a_copy_of_a_process_that_fetches(hub, tmp_path):
    """A fork would copy the locks that the fetching threads hold, and wait for them for ever."""
    hub.publish(FINEWEB_EDU, sample_10bt())
    answered = threading.Event()
    hub.trouble(f"^GET /cdn/.*{SAMPLES[1]}", hold_until(answered))
    process = start(tmp_path, hub.url)
    wait_for(lambda: finished_shards(tmp_path / "edu_fineweb10B"), process)
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [child for task in tasks for child in task.read_text().split()]
    assert children
    for child in children:
        assert b"multiprocessing" in Path(f"/proc/{child}/cmdline").read_bytes()
    answered.set()
    assert finish(process).code == 0


@pytest.fixture
def hanging(hub):
    """A Hub whose first file's answer is a test's business, and whose others never come."""
    hub.publish("o/slow", {f"{i}.parquet": parquet(part) for i, part in enumerate(TEXTS)})
    never = threading.Event()
    hub.trouble("^GET .*/1.parquet", hold_until(never), FOREVER)
    hub.trouble("^GET .*/2.parquet", status(503), FOREVER)
    yield hub
    never.set()


def test_an_error_is_told_though_other_files_are_on_their_way(hanging, tmp_path):
    hanging.trouble("^GET .*/0.parquet", status(404, X_Error_Code="EntryNotFound"), FOREVER)
    process = start(tmp_path, hanging.url, "--source=o/slow", "--out=here")
    assert "0.parquet" in error_of(finish(process, timeout=20))


def test_an_interrupt_ends_a_run_that_waits_for_files(hanging, tmp_path):
    process = start(tmp_path, hanging.url, "--source=o/slow", "--out=here")
    wait_for(lambda: "1.parquet" in hanging.fetched(), process)
    wait_for(lambda: finished_shards(tmp_path / "here"), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    done = finish(process, timeout=20)
    assert done.code == 130 and "Traceback" not in done.err, done.err


def test_no_hub_ends_the_run(waiting):
    _, cwd, process = waiting["no_hub"]
    done = finish(process)
    error = error_of(done)
    assert FINEWEB_EDU in error and "same command again" in error
    assert "trying again in" not in done.err  # for another half a minute
    assert not (cwd / "here").exists()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="mounts a disk")
def test_a_full_disk_ends_the_run_with_what_is_there_intact(hub, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        big = parquet(TEXTS[1], padding=8_000_000)
        hub.publish("o/two", {"0.parquet": parquet(TEXTS[0]), "1.parquet": big})
        settings = ["--source=o/two", f"--out={disk}/here"]
        assert re.search("no room|disk is full", error_of(run(tmp_path, hub.url, *settings)))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        done = run(tmp_path, hub.url, *settings)
        assert done.code == 0, done.err
        assert_holds(disk / "here", TEXTS[0] + TEXTS[1])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# -------------------------------------------------------------------------------------------------
# Wrong input


class Wrong(NamedTuple):
    settings: str
    said: list[str]  # what the line must hold: the thing that is wrong, and the remedy
    trouble: tuple | None = None


LIMITED = "Access to this dataset is restricted."
GATED = dict(X_Error_Code="GatedRepo", X_Error_Message=LIMITED)
BAD_TOKEN = dict(X_Error_Message="Invalid credentials in Authorization header")
WRONG = {
    "unknown configuration": Wrong("o/two --name=third", ["third", "--name", "one", "other"]),
    "configuration not chosen": Wrong("o/two", ["o/two", "--name", "one", "other"]),
    "unknown dataset": Wrong("o/missing", ["o/missing", "HF_TOKEN"]),
    "unknown dataset, to a user": Wrong(
        "o/absent",
        ["o/absent", "check its name"],
        ("o/absent", status(404, X_Error_Code="RepoNotFound")),
    ),
    "gated": Wrong("o/gated", ["o/gated", "HF_TOKEN"], ("o/gated/", status(403, **GATED))),
    "gated, to a guest": Wrong("o/guest", ["o/guest", "HF_TOKEN"], ("o/gue", status(401, **GATED))),
    "gated files": Wrong(
        "o/files", ["train.parquet", "HF_TOKEN"], ("o/files/.*parquet", status(403, **GATED))
    ),
    "wrong token": Wrong("o/token", ["o/token", "HF_TOKEN"], ("o/token", status(401, **BAD_TOKEN))),
    "no train split": Wrong("o/test_only", ["o/test_only", "no train split", "only test"]),
    "file of an unknown kind": Wrong("o/csv", ["o/csv", "a.csv", "parquet"]),
    "no data": Wrong("o/empty", ["o/empty"]),
    "file that only the card has": Wrong("o/lacks", ["o/lacks", "lost.parquet"]),
    "dataset that is a program": Wrong("o/program", ["o/program", "script"]),
    "name that is no dataset's": Wrong("o/some.py", ["o/some.py"]),
    "damaged card": Wrong("o/damaged", ["o/damaged"]),
    "refusal": Wrong("o/refused", ["train.parquet", "451"], ("/cdn/o/refused", status(451))),
    "network that wants a login": Wrong(
        "o/login", ["o/login", "network"], ("/api/.*o/login", login_page)
    ),
}
ONE_AFTER_THE_OTHER = """
import contextlib, errors, fineweb, hub, io, json, sys, traceback
hub.TRIES = hub.LISTING_TRIES = 2
if __name__ == "__main__":
    done = []
    for arguments in json.load(sys.stdin):
        sys.argv = ["fineweb.py", *arguments]
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            try:
                errors.run_main(fineweb.main)
            except SystemExit as end:
                done.append([end.code, "", ""])
            except Exception:
                done.append([1, "", ""])
                traceback.print_exc()
        done[-1][2] = stderr.getvalue()
    print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def wrong_runs(tmp_path_factory):
    """{case: (its run, its `out`)}; in one process, which need not import all anew for each."""
    one_file = {"train.parquet": parquet(ALL[:20])}
    datasets = {
        "o/two": one_file | {"README.md": card({n: {"train": "*"} for n in ("one", "other")})},
        "o/test_only": one_file | {"README.md": card({"default": {"test": "*.parquet"}})},
        "o/csv": {"a.csv": b"text\nhello\n"},
        "o/empty": {"README.md": b"# Nothing yet"},
        "o/lacks": one_file | {"README.md": card({"default": {"train": "lost.parquet"}})},
        "o/program": one_file | {"program.py": b"import datasets"},
        "o/damaged": one_file | {"README.md": b"---\nconfigs: [a: b: {\n---\n"},
    }
    datasets |= {f"o/{n}": one_file for n in "gated guest files token refused login".split()}
    made, cwd = Hub(), tmp_path_factory.mktemp("wrong")
    for name, files in datasets.items():
        made.publish(name, files)
    for pattern, act in [wrong.trouble for wrong in WRONG.values() if wrong.trouble]:
        made.trouble(pattern, act, FOREVER)
    outs = {case: cwd / str(number) for number, case in enumerate(WRONG)}
    arguments = [
        [f"--out={outs[case]}", "--workers=1", *f"--source={wrong.settings}".split()]
        for case, wrong in WRONG.items()
    ]
    process = start_python(cwd, made.url, ["-c", ONE_AFTER_THE_OTHER])
    done = finish(process, stdin=json.dumps(arguments))
    made.close()
    assert done.code == 0, done.err
    assert_without_token(cwd)
    runs = [Done(*values) for values in json.loads(done.out)]
    return {case: (run, outs[case]) for case, run in zip(WRONG, runs)}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_told_in_one_line(wrong_runs, case):
    done, out = wrong_runs[case]
    error = error_of(done)
    for word in WRONG[case].said:
        assert word in error
    assert not [*out.glob("*.npy")] and not [*out.glob("manifest*")]


def test_offline_is_told_in_one_line(tmp_path):
    """Also where `datasets` once loaded the dataset, as build-nanogpt has it do."""
    loaded = tmp_path / "hf/datasets/o___loaded/default/0.0.0/abc"
    loaded.mkdir(parents=True)
    (loaded / "dataset_info.json").write_text('{"config_name": "default"}')
    settings = ["--source=o/loaded", "--out=here"]
    error = error_of(run(tmp_path, "http://127.0.0.1:9", *settings, HF_HUB_OFFLINE="1"))
    assert "o/loaded" in error and "HF_HUB_OFFLINE" in error
    assert not (tmp_path / "here").exists()


def test_after_a_missing_column_the_remedy_works(hub, tmp_path):
    hub.publish("o/bare", {"train.parquet": parquet(ALL)})
    settings = ["--source=o/bare", "--out=here"]
    error = error_of(run(tmp_path, hub.url, *settings, "--text_column=body"))
    assert "'body'" in error and "--text_column" in error and "id, text" in error
    done = run(tmp_path, hub.url, *settings, "--text_column=text")
    assert done.code == 0, done.err
    assert_holds(tmp_path / "here", ALL)
