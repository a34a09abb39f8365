"""fineweb.py with a Hub: an HTTP server on loopback that acts as huggingface.co and its CDN.

Datasets become the oracle's shards; 429, 5xx, interrupted downloads, short and altered files are
retried; the token reaches the Hub and nothing else.
"""

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import requires
from hub_helpers import (
    ALL,
    FINEWEB_EDU,
    FOREVER,
    SAMPLES,
    SECRET,
    SIZE,
    TEXTS,
    Hub,
    altered,
    assert_holds,
    assert_without_token,
    card,
    cut_after,
    error_of,
    finish,
    hold_until,
    jsonl_gz,
    kill,
    make_texts,
    parquet,
    run,
    sample_10bt,
    shards_of,
    short,
    start,
    status,
    tokens_of,
)

from support import hub as hub_module

pytest_plugins = ["hub_helpers"]
pytestmark = [requires("datasets"), pytest.mark.usefixtures("no_file_holds_the_token")]

# -------------------------------------------------------------------------------------------------
# Runs that mostly wait: started before all tests, so that these need not wait for them


def no_hub(hub: Hub) -> list[str]:
    """Its address refuses connections; `huggingface_hub` itself retries for half a minute."""
    hub.stop_listening()
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
    # huggingface_hub sends a second request at once before it waits, so it is refused twice.
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
# Complete runs


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


def test_the_token_is_sent_to_the_hub_only(built):
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


def test_shards_are_rebuilt_from_the_same_commit(built):
    cwd, made, _ = built
    made.publish(FINEWEB_EDU, sample_10bt([make_texts(99, 5)]))
    made.trouble("/api/", status(500), FOREVER)
    (cwd / "edu_fineweb10B" / "edufineweb_train_000012.npy").unlink()
    asked = len(made.fetched())
    done = run(cwd, made.url)
    assert done.code == 0, done.err
    assert_holds(cwd / "edu_fineweb10B", ALL)
    assert SAMPLES[0] not in made.fetched()[asked:]


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


def test_few_downloaded_files_are_on_the_disk_at_a_time(hub, tmp_path):
    many = [make_texts(seed, 8, words=60) for seed in range(12)]
    files = {f"{i:02d}.parquet": parquet(part, rows=1) for i, part in enumerate(many)}
    hub.publish("o/many", files)
    counts = []

    def count(handler):
        counts.append(len([*(tmp_path / "here").rglob("*.parquet")]))
        return True

    hub.trouble("^GET /cdn/", count, FOREVER)
    settings = ["--source=o/many", "--out=here"]
    done = run(tmp_path, hub.url, *settings)
    assert done.code == 0, done.err
    of_a_shard = 2 + SIZE // min(len(tokens_of(texts)) for texts in many)
    assert of_a_shard <= 6
    assert len(counts) == len(many) and max(counts) <= hub_module.AHEAD + of_a_shard
    assert_holds(tmp_path / "here", sum(many, []))


# -------------------------------------------------------------------------------------------------
# Several ranks


def test_each_rank_downloads_only_its_own_files(hub, tmp_path):
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


def test_a_later_rank_uses_the_commit_of_the_others(hub, tmp_path):
    commit = hub.publish(FINEWEB_EDU, sample_10bt())
    assert run(tmp_path, hub.url, RANK="0", WORLD_SIZE="2").code == 0
    hub.publish(FINEWEB_EDU, sample_10bt() | {"LICENSE": b"a new file"})
    done = run(tmp_path, hub.url, RANK="1", WORLD_SIZE="2")
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "edu_fineweb10B" / "manifest.json").read_text())
    assert manifest["commit"] == commit
    assert np.array_equal(all_tokens(tmp_path / "edu_fineweb10B"), tokens_of(ALL))


# -------------------------------------------------------------------------------------------------
# Temporary errors


def gap_after(hub: Hub, count: int, pattern: str) -> float:
    """Seconds from the `count`-th of these requests to the next one."""
    times = [request.time for request in hub.asked(pattern)]
    return times[count] - times[count - 1]


def test_listing_is_retried_after_429_and_5xx(waiting):
    """After a 429 no request comes before its Retry-After is over, by the server's clock."""
    hub, cwd, process = waiting["trouble_in_listing"]
    done = finish(process)
    assert done.code == 0, done.err
    assert_holds(cwd / "here", ALL)
    assert gap_after(hub, 1, "^GET /api/datasets/.*/revision/") >= 2
    assert gap_after(hub, 1, "^GET /api/datasets/.*/sample/10BT$") >= 2
    assert "HTTP 429" in done.err


@pytest.mark.faults
def test_listing_times_out_without_an_answer(hub, tmp_path):
    hub.publish(FINEWEB_EDU, sample_10bt())
    answered = threading.Event()
    hub.trouble("^(GET|POST) /api/datasets/.*/(tree|paths-info)/", hold_until(answered))
    process = start(tmp_path, hub.url, set_up="hub.SILENCE_S = 1")
    assert finish(process, timeout=20).code == 0
    answered.set()
    assert_holds(tmp_path / "edu_fineweb10B", ALL)


def test_downloads_are_retried_after_network_errors(waiting):
    """429 with Retry-After, 5xx, a reset, no answer, an incomplete or altered body."""
    hub, cwd, process = waiting["trouble_in_fetching"]
    done = finish(process)
    assert done.code == 0, done.err
    assert_holds(cwd / "here", sum(NINE.values(), []))
    assert gap_after(hub, 1, "^GET .*/0.parquet") >= 2
    assert gap_after(hub, 2, "^HEAD .*/1.parquet") >= 2
    fetched = hub.fetched()
    for name in NINE:
        assert fetched.count(name) >= (1 if name == "1.parquet" else 2)  # its HEAD was refused


def test_an_interrupted_download_is_resumed(hub, tmp_path):
    """`huggingface_hub` writes 10 MiB at a time, so the file must have more."""
    hub.publish("o/big", {"big.parquet": parquet(ALL, padding=12_000_000)})
    hub.trouble("^GET /cdn/", cut_after(11_000_000))
    done = run(tmp_path, hub.url, "--source=o/big", "--out=here")
    assert done.code == 0, done.err
    assert_holds(tmp_path / "here", ALL)
    assert [request.range for request in hub.asked("^GET /cdn/")] == [None, f"bytes={10 << 20}-"]


def test_an_expired_address_is_requested_again(hub, tmp_path):
    """The CDN's signed addresses hold for an hour; a slow download may need longer."""
    hub.publish("o/bare", {"train.parquet": parquet(ALL)})
    hub.trouble("^GET /cdn/", status(403))
    done = run(tmp_path, hub.url, "--source=o/bare", "--out=here")
    assert done.code == 0, done.err
    assert_holds(tmp_path / "here", ALL)
    assert len(hub.asked("^HEAD .*train.parquet")) == 2


@pytest.mark.faults
def test_an_error_of_xet_storage_is_retried(hub, tmp_path):
    """The Hub's storage of large files; its client raises RuntimeError for everything."""
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


def test_no_hub_ends_the_run(waiting):
    _, cwd, process = waiting["no_hub"]
    done = finish(process)
    error = error_of(done)
    assert FINEWEB_EDU in error and "same command again" in error
    assert "trying again in" not in done.err  # for another half a minute
    assert [path.name for path in (cwd / "here").iterdir()] == [".lock_00000"]


def test_a_new_client_has_the_limit_too():
    """After an error of the connection `huggingface_hub` makes one."""
    import huggingface_hub

    for _ in range(2):
        hub_module.limit_silence()
        huggingface_hub.close_session()
        client = huggingface_hub.get_session()
        request = client.build_request("GET", "http://localhost/")
        assert set(request.extensions["timeout"].values()) == {None}
        assert len(client.event_hooks["request"]) == 2  # the other one is of huggingface_hub
        client.event_hooks["request"][-1](request)
        assert set(request.extensions["timeout"].values()) == {hub_module.SILENCE_S}


def test_a_file_that_is_open_on_windows_is_removed_later(tmp_path, monkeypatch):
    files = [{"file": f"{i}.parquet", "bytes": 1, "sha256": None} for i in range(3)]
    downloads = hub_module.Downloads("a/b", "main", files, tmp_path)
    downloads.results = dict.fromkeys(range(3))
    for file in files:
        (tmp_path / file["file"]).touch()

    def refuse(self, missing_ok=False):
        raise PermissionError(13, "in use by another process")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        downloads.remove_before(1)
    assert (tmp_path / "0.parquet").exists()
    downloads.remove_before(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.parquet"]
