"""fineweb.py with a Hub: permanent errors, kills, and wrong input, each reported in one line."""

import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import requires
from fineweb_helpers import mount_tmpfs
from hub_helpers import (
    ALL,
    FINEWEB_EDU,
    FOREVER,
    SAMPLES,
    SIZE,
    TEXTS,
    Done,
    Hub,
    assert_holds,
    assert_without_token,
    card,
    error_of,
    finish,
    finished_shards,
    hold_until,
    login_page,
    make_texts,
    parquet,
    run,
    sample_10bt,
    start,
    start_python,
    status,
    tokens_of,
    wait_for,
)

pytest_plugins = ["hub_helpers"]
pytestmark = [requires("datasets"), pytest.mark.usefixtures("no_file_holds_the_token")]

# -------------------------------------------------------------------------------------------------
# Permanent errors, and kills


def test_a_permanent_error_stops_the_run_and_the_same_command_continues(hub, tmp_path):
    hub.publish(FINEWEB_EDU, sample_10bt())
    hub.trouble(f"^GET /cdn/.*{SAMPLES[3]}", status(503), FOREVER)
    done = run(tmp_path, hub.url, set_up="hub.TRIES = 2")
    error = error_of(done)
    assert SAMPLES[3] in error and "503" in error and "same command again" in error
    hub.troubles.clear()
    made, asked = finished_shards(tmp_path / "edu_fineweb10B"), len(hub.fetched())
    assert made
    done = run(tmp_path, hub.url)
    assert done.code == 0 and "continuing after" in done.err, done.err
    assert_holds(tmp_path / "edu_fineweb10B", ALL)
    assert made.items() <= finished_shards(tmp_path / "edu_fineweb10B").items()
    assert not {*hub.fetched()[asked:]} & {*SAMPLES[:3]}


def test_a_killed_run_continues_with_the_same_commit(hub, tmp_path):
    """`main` is another commit by then, and listing fails."""
    out, answered = tmp_path / "edu_fineweb10B", threading.Event()
    hub.publish(FINEWEB_EDU, sample_10bt())
    hub.trouble(f"^GET /cdn/.*{SAMPLES[3]}", hold_until(answered))
    first_three = len(tokens_of(sum(TEXTS[:3], []))) // SIZE
    process = start(tmp_path, hub.url)

    def there(name: str) -> list[Path]:
        return [*out.rglob(name)]

    wait_for(lambda: len(finished_shards(out)) >= first_three // 2, process)
    wait_for(lambda: there(SAMPLES[4]) and there(SAMPLES[5]), process)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    answered.set()
    assert there("*.incomplete")  # of the file that was on its way

    hub.publish(FINEWEB_EDU, sample_10bt([make_texts(99, 12) for _ in TEXTS]))
    hub.trouble(" /api/|README|/main/", status(500), FOREVER)
    made, asked = finished_shards(out), len(hub.fetched())
    done = run(tmp_path, hub.url)
    assert done.code == 0 and "continuing after" in done.err, done.err
    assert_holds(out, ALL)
    assert made.items() <= finished_shards(out).items()
    assert hub.fetched()[asked:] == [SAMPLES[3]]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes in /proc")
def test_no_worker_is_forked_from_a_process_that_downloads(hub, tmp_path):
    """A fork would copy the locks that downloading threads hold, and wait for them forever."""
    hub.publish(FINEWEB_EDU, sample_10bt())
    answered = threading.Event()
    hub.trouble(f"^GET /cdn/.*{SAMPLES[1]}", hold_until(answered))
    process = start(tmp_path, hub.url)
    wait_for(lambda: [*(tmp_path / "edu_fineweb10B").rglob(SAMPLES[0])], process)
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [child for task in tasks for child in task.read_text().split()]
    assert children
    for child in children:
        assert b"multiprocessing" in Path(f"/proc/{child}/cmdline").read_bytes()
    answered.set()
    assert finish(process).code == 0


@pytest.fixture
def hanging(hub):
    """A Hub that never sends its files but the first one, whose answer the test defines."""
    hub.publish("o/slow", {f"{i}.parquet": parquet(part) for i, part in enumerate(TEXTS)})
    never = threading.Event()
    hub.trouble("^GET .*/1.parquet", hold_until(never), FOREVER)
    hub.trouble("^GET .*/2.parquet", status(503), FOREVER)
    yield hub
    never.set()


def test_an_error_is_printed_during_other_downloads(hanging, tmp_path):
    hanging.trouble("^GET .*/0.parquet", status(404, X_Error_Code="EntryNotFound"), FOREVER)
    process = start(tmp_path, hanging.url, "--source=o/slow", "--out=here")
    assert "0.parquet" in error_of(finish(process, timeout=20))


def test_an_interrupt_ends_a_run_that_waits_for_files(hanging, tmp_path):
    process = start(tmp_path, hanging.url, "--source=o/slow", "--out=here")
    wait_for(lambda: "1.parquet" in hanging.fetched(), process)
    wait_for(lambda: [*(tmp_path / "here").rglob("0.parquet")], process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    done = finish(process, timeout=20)
    assert done.code == 130 and "Traceback" not in done.err, done.err


def test_a_full_disk_stops_the_run_and_loses_nothing(hub, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount_tmpfs(disk, "size=4m"):
        pytest.skip("a small file system cannot be mounted here")
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
    expected: list[str]  # must be in the line: what is wrong, and the remedy
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
import contextlib, fineweb, io, json, sys, traceback
from support import errors, hub
hub.TRIES = 2
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
    """{case: (its run, its `out`)}; in one process, to import `datasets` once."""
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
def test_wrong_input_is_reported_in_one_line(wrong_runs, case):
    done, out = wrong_runs[case]
    error = error_of(done)
    for word in WRONG[case].expected:
        assert word in error
    assert not [*out.glob("*.npy")] and not [*out.glob("manifest*")]


def test_offline_mode_is_reported_in_one_line(tmp_path):
    """Also if `datasets` has the dataset in its cache, as after build-nanogpt's fineweb.py."""
    loaded = tmp_path / "hf/datasets/o___loaded/default/0.0.0/abc"
    loaded.mkdir(parents=True)
    (loaded / "dataset_info.json").write_text('{"config_name": "default"}')
    settings = ["--source=o/loaded", "--out=here"]
    error = error_of(run(tmp_path, "http://127.0.0.1:9", *settings, HF_HUB_OFFLINE="1"))
    assert "o/loaded" in error and "HF_HUB_OFFLINE" in error
    assert [path.name for path in (tmp_path / "here").iterdir()] == [".lock_00000"]


def test_after_a_missing_column_the_remedy_works(hub, tmp_path):
    hub.publish("o/bare", {"train.parquet": parquet(ALL)})
    settings = ["--source=o/bare", "--out=here"]
    error = error_of(run(tmp_path, hub.url, *settings, "--text_column=body"))
    assert "'body'" in error and "--text_column" in error and "id, text" in error
    done = run(tmp_path, hub.url, *settings, "--text_column=text")
    assert done.code == 0, done.err
    assert_holds(tmp_path / "here", ALL)
