"""hellaswag.py as a command: downloading its data, models, output, and wrong input.

Each command line runs in a process of its own. The server is on loopback.
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import hellaswag_helpers as helpers
import numpy as np
import pytest
from conftest import ROOT, environment, without_gloo
from hellaswag_helpers import (
    ALONE,
    EXAMPLES,
    GOOD,
    assert_one_error,
    command,
    make_model,
    make_questions,
    scores_in,
    write_examples,
)

from support import checkpoint, hellaswag_eval
from train_gpt2 import GPT, GPTConfig

# Fixtures
broken_file, forks, server = helpers.broken_file, helpers.forks, helpers.server


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of the model that most command lines score."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    make_model().save_pretrained(directory)
    return directory


# -------------------------------------------------------------------------------------------------
# Data


@pytest.fixture
def download_case(server, saved, tmp_path):
    """A function: kind of answer -> a case that downloads the data to tmp_path/hellaswag."""

    def case(kind: str = "good") -> dict:
        options = ("-m", saved, "-d", "cpu", "--dtype=float32", "--style=completion")
        settings = dict(FOLDER=str(tmp_path / "hellaswag"), EXAMPLES={"val": 12})
        return command(*options, URL=server.url(kind), **settings)

    return case


def test_data_is_downloaded_once(forks, download_case, server, tmp_path):
    first = forks(download_case())[0]
    assert first.code == 0, first.err
    path = tmp_path / "hellaswag" / "hellaswag_val.jsonl"
    assert path.read_bytes() == server.body
    assert first.out.startswith("downloading http://127.0.0.1") and "12 examples" in first.out
    again = forks(download_case())[0]
    assert again.code == 0 and again.out == first.out.split("\n", 1)[1]
    assert len(server.requests) == 1
    assert not list(path.parent.glob("*partial*")) + list(path.parent.glob(".*partial*"))


def test_four_processes_download_once(forks, download_case, server, tmp_path):
    results = forks(*[download_case("slow")] * 4)
    assert [result.code for result in results] == [0] * 4, results
    assert len(server.requests) == 1
    assert (tmp_path / "hellaswag" / "hellaswag_val.jsonl").read_bytes() == server.body
    assert len({result.out.splitlines()[-1] for result in results}) == 1


@pytest.mark.parametrize("cut", [-1, -40, 700, 0])
def test_a_truncated_file_is_downloaded_again(forks, download_case, server, tmp_path, cut):
    path = tmp_path / "hellaswag" / "hellaswag_val.jsonl"
    path.parent.mkdir()
    path.write_bytes(server.body[:cut])
    for refused in forks(download_case("missing")) + forks(download_case("short")):
        assert_one_error(refused, "hellaswag_val.jsonl")
        assert path.read_bytes() == server.body[:cut]  # unchanged
    result = forks(download_case())[0]
    assert result.code == 0 and "12 examples" in result.out
    assert path.read_bytes() == server.body


@pytest.mark.parametrize(
    "kind", ["missing", "broken", "short", "page", "empty", "cut", "nothing", "garbage"]
)
def test_a_bad_answer_leaves_no_file(forks, download_case, server, tmp_path, kind):
    result = forks(download_case(kind))[0]
    assert_one_error(result, "hellaswag_val.jsonl", server.url(kind).format("val"), "put the file")
    assert not (tmp_path / "hellaswag" / "hellaswag_val.jsonl").exists()
    assert len(server.requests) == 1
    assert forks(download_case())[0].code == 0


def test_a_process_killed_while_downloading_does_not_block_the_next(
    forks, download_case, server, tmp_path
):
    assert forks(download_case("kill/PID"))[0].code == -signal.SIGKILL
    assert not (tmp_path / "hellaswag" / "hellaswag_val.jsonl").exists()
    assert forks(download_case())[0].code == 0


def test_no_server_and_no_folder(forks, download_case, port, tmp_path):
    url = f"http://127.0.0.1:{port}/{{}}"
    assert_one_error(forks(download_case() | {"URL": url})[0], "does not answer", "put the file")
    (tmp_path / "file").write_text("in the way")
    assert_one_error(forks(download_case() | {"FOLDER": str(tmp_path / "file")})[0], "put the file")


def test_broken_data_is_refused_in_one_line(forks, saved, broken_file):
    case = command("-m", saved, "-d", "cpu", "--style=completion", "--data", broken_file)
    assert_one_error(forks(case)[0], "broken.jsonl")


@pytest.mark.parametrize("field", ["activity_label", "ctx_a", "ctx_b"])
def test_a_missing_field_of_the_harness_style_is_one_line(forks, saved, tmp_path, field):
    example = GOOD | {field: None}
    if field == "activity_label":
        del example[field]
    data = write_examples(tmp_path / "data.jsonl", [example])
    case = command("-m", saved, "-d", "cpu", "--style=harness", "--data", data)
    assert_one_error(forks(case)[0], "data.jsonl")


# -------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory):
    """A log directory with two valid checkpoints and, as the newest, a damaged one."""
    directory = tmp_path_factory.mktemp("run") / "log"
    for step in (1, 2, 3):
        model = make_model(seed=step)
        checkpoint.write_directory(directory / f"step_{step:05d}", model.save_pretrained)
    with open(directory / "step_00003" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    return directory


def test_the_command_scores_in_three_styles(log_dir, tmp_path):
    """The newest valid checkpoint is scored; --out has a line for each example and style."""
    data = write_examples(tmp_path / "data.jsonl", EXAMPLES)
    options = ["-m", log_dir, "-d", "cpu", "--dtype", "float32", "--data", data]
    done = subprocess.run(
        [sys.executable, ROOT / "hellaswag.py", *options, "--out", tmp_path / "out.jsonl"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step_00003: damaged, not used" in done.stderr
    assert re.search(r"step_00002: \d,\d+,\d+ parameters, cpu in float32", done.stdout)
    assert all(f"{style}: 100%" in done.stderr for style in hellaswag_eval.STYLES)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * len(EXAMPLES)
    assert list(scores_in(done.stdout)) == list(hellaswag_eval.STYLES)
    for style in hellaswag_eval.STYLES:
        questions = make_questions(EXAMPLES, style)
        found = hellaswag_eval.ending_losses(make_model(seed=2), questions, ALONE)
        assert scores_in(done.stdout)[style] == str(hellaswag_eval.score(found, questions))
        mine = [line for line in lines if line["style"] == style]
        np.testing.assert_allclose([line["losses"] for line in mine], found, atol=1e-3)
        assert [line["label"] for line in mine] == [example["label"] for example in EXAMPLES]
        assert [line["example"] for line in mine] == [
            example.get("ind", number) for number, example in enumerate(EXAMPLES)
        ]
        assert [line["lengths"] for line in mine] == [list(q.lengths) for q in questions]
        hits = [[line[k] == line["label"] for line in mine] for k in ("chosen", "chosen_norm")]
        assert scores_in(done.stdout)[style].startswith(f"acc {np.mean(hits[0]):.4f} ")
        assert f"acc_norm {np.mean(hits[1]):.4f} " in scores_in(done.stdout)[style]


def test_a_model_is_a_directory_or_the_newest_in_it(forks, log_dir, tmp_path):
    data = write_examples(tmp_path / "data.jsonl", EXAMPLES)
    options = ("-d", "cpu", "--dtype=float32", "--style=harness", "--limit=20", "--data", data)
    newest, second, first = forks(
        *[command("-m", m, *options) for m in (log_dir, *sorted(log_dir.iterdir())[1::-1])]
    )
    assert [result.code for result in (newest, second, first)] == [0] * 3
    assert scores_in(newest.out) == scores_in(second.out) != scores_in(first.out)
    assert list(scores_in(first.out)) == ["harness"]
    assert scores_in(first.out)["harness"].endswith(", 20 examples")
    questions = make_questions(EXAMPLES[:20], "harness")
    expected = hellaswag_eval.evaluate(make_model(seed=2), questions, ALONE)
    assert scores_in(newest.out)["harness"] == str(expected)


def test_an_unknown_option_writes_nothing(forks, tmp_path):
    result = forks(command("--nonsense=3", cwd=str(tmp_path)))[0]
    assert_one_error(result, "--nonsense=3", "--help")
    assert result.out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["stray"], "stray"),
        (["--sty=harness"], "--sty"),
        (["--style=fancy"], "fancy"),
        (["--limit=-1"], "limit"),
        (["--limit=many"], "many"),
        (["-m"], "--model"),
        (["-m", "unknown"], "'unknown' is neither a directory nor one of gpt2"),
        (["-m", "{tmp}"], "config.json"),
        (["-m", "{data}"], "data.jsonl: is a file"),
        (["-d", "nonsense"], "nonsense"),
        (["-d", "cuda:x"], "cuda:x"),
        (["-d", "meta"], "meta"),
        (["-d", "CPU"], "CPU"),
        (["-d", "cuda:99"], "cuda:99"),  # on no machine
        (["--dtype=nonsense"], "nonsense"),
        (["--dtype=int8"], "int8"),
        (["--data={tmp}/none.jsonl"], "none.jsonl"),
        (["--data={tmp}"], "{tmp}"),
        (["--data="], "data"),
        (["--data=/proc/self/mem"], "/proc/self/mem"),  # readable by name, not by content
        (["--out={tmp}/none/out.jsonl"], "none/out.jsonl"),
        (["--out={tmp}"], "{tmp}"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(forks, saved, tmp_path, arguments, word):
    if "/proc" in word and not Path("/proc/self/mem").exists():
        pytest.skip("Linux only")
    data = write_examples(tmp_path / "data.jsonl", EXAMPLES[:2])
    options = ["-m", saved, "-d", "cpu", "--style=completion", "--data", data]
    given = [a.format(tmp=tmp_path, data=data) for a in arguments]
    assert_one_error(forks(command(*options, *given))[0], word.format(tmp=tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_is_reported_in_one_line(forks, saved, tmp_path):
    data = write_examples(tmp_path / "data.jsonl", EXAMPLES[:2])
    result = forks(command("-m", saved, "-d", "cpu", "--data", data, "--out", "/dev/full"))[0]
    last = result.err.splitlines()[-1]
    assert result.code == 2 and last.startswith("error: ") and "/dev/full" in last, result.err
    assert "Traceback" not in result.err


def test_a_model_of_another_vocabulary_is_refused(forks, tmp_path):
    """A GPT-2 of 1,000 tokens loads, and the text has ids that it does not know."""
    shape = dict(block_size=32, vocab_size=1000, n_layer=1, n_head=1, n_embd=8)
    GPT(GPTConfig(**shape)).save_pretrained(tmp_path / "model")
    data = write_examples(tmp_path / "data.jsonl", EXAMPLES[:2])
    case = command("-m", tmp_path / "model", "-d", "cpu", "--style=completion", "--data", data)
    result = forks(case)[0]
    last = result.err.splitlines()[-1]
    assert result.code == 2 and last.startswith("error: ") and "1000" in last.replace(",", "")


def test_two_processes_share_the_examples(saved, tmp_path):
    """They print and write what one process does, once."""
    data = tmp_path / "examples.jsonl"
    write_examples(data, helpers.make_examples(12))
    script = [str(ROOT / "hellaswag.py"), "-m", str(saved), f"--data={data}", "-d", "cpu"]
    script += ["--dtype=float32", "--style=completion"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    outputs = []
    for number, prefix in enumerate(([], launcher)):
        out = tmp_path / f"{number}.jsonl"
        done = subprocess.run(
            [sys.executable, *prefix, *script, f"--out={out}"],
            env=environment(), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        text = without_gloo(done.stdout)
        outputs.append((text, [line.pop("losses") for line in lines], lines))
    (text, losses, rest), (text_of_two, losses_of_two, rest_of_two) = outputs
    assert text == text_of_two and rest == rest_of_two and len(rest) == 12
    np.testing.assert_allclose(losses_of_two, losses, atol=1e-4)


@pytest.mark.parametrize("script", ["sample.py", "bench.py", "plot.py"])
def test_a_command_of_one_process_reports_errors_whatever_RANK_says(script):
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--nothing=1"],
        env=environment(RANK="1", WORLD_SIZE="2"), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: ")
