"""sample.py: its texts are those of `GPT.generate`, for every source, setting and output."""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment
from model_helpers import text_batch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import hellaswag
import sample
from support import checkpoint, devices, generation, quantize, tokenizer
from support.errors import UserError, run_main
from train_gpt2 import GPT, GPTConfig

V, END = tokenizer.VOCAB_SIZE, tokenizer.END_OF_TEXT_ID


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A log directory with two checkpoints, 10 and 20, of a small model that learns a text."""
    devices.keep_freed_memory()
    directory = tmp_path_factory.mktemp("run") / "log"
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    x, y = text_batch(40, 64)
    for step in range(1, 21):
        model(x[step - 1 :: 20], y[step - 1 :: 20])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            checkpoint.write_directory(directory / f"step_{step:05d}", model.save_pretrained)
    return directory


def test_8_bits_cost_little_on_text(run):
    """A trained model, real text: the losses are within 0.02 nats."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")[-20000:]
    ids = torch.tensor(tokenizer.get_encoding().encode_ordinary(text)[: 64 * 8 + 1])
    x, y = ids[:-1].view(8, 64), ids[1:].view(8, 64)
    model = GPT.from_pretrained(run)
    with torch.no_grad():
        before = model(x, y)[1].item()
        after = quantize.to_int8(model)(x, y)[1].item()
    assert before < 7.5  # it has learned something
    assert 0 < abs(after - before) < 0.02


# The string by whose ids llama.cpp's converter finds out a model's pre-tokenizer, and the hash of
# GPT-2's ids (convert_hf_to_gguf.py, get_vocab_base_pre; MIT).
GGUF_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
    "🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, "
    "'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
GGUF_HASH = "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454"


def test_llama_cpp_knows_the_tokenizer_and_every_tensor(run):
    """The converter's own check of the ids, and the names and merges that `gguf` reads."""
    directory = run / "step_00020"
    ids = AutoTokenizer.from_pretrained(directory).encode(GGUF_TEXT)
    assert hashlib.sha256(str(ids).encode()).hexdigest() == GGUF_HASH
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    special = gguf.SpecialVocab(directory, load_merges=True)
    assert len(special.merges) == 50_000
    assert special.special_token_ids["bos"] == special.special_token_ids["eos"] == END
    layers = GPT.from_pretrained(directory).config.n_layer
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, layers)
    for name in load_file(directory / "model.safetensors"):
        assert names.get_name(name, try_suffixes=(".weight", ".bias")), name


def call(*arguments, **kwargs) -> subprocess.CompletedProcess:
    """`sample.py` in a process of its own; standard output as bytes."""
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)]
    kwargs = dict(env=environment(), timeout=120, cwd=kwargs.pop("cwd", ROOT)) | kwargs
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, **kwargs)


def texts_of(*arguments, monkeypatch) -> tuple[str, str]:
    """What `sample.py` in this process prints: (standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert sample.main() == 0
    return out.getvalue(), err.getvalue()


def expected_text(directory: Path, prompt: str, n: int, seed: int, **settings) -> str:
    """One text by the model's own generate."""
    ids = torch.tensor([tokenizer.get_encoding().encode(prompt, allowed_special="all")])
    model = GPT.from_pretrained(directory)
    ids = model.generate(ids, n, generator=torch.Generator().manual_seed(seed), **settings)[
        0
    ].tolist()
    return tokenizer.get_encoding().decode(ids)


def test_one_text_has_no_heading_and_its_source_is_on_standard_error(run, tmp_path):
    """The newest checkpoint of a log directory, from another directory, as a user starts it."""
    done = call(
        os.path.relpath(run, tmp_path), "--prompt=QUEEN MARETH:\n", "--max_new_tokens=30",
        "--dtype=float32", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = expected_text(run / "step_00020", "QUEEN MARETH:\n", 30, 1337, top_k=50)
    assert done.stdout.decode() == expected + "\n"
    error = done.stderr.decode()
    assert "step_00020: cpu in float32" in error
    assert re.search(r"30 tokens in [\d.]+ s, [\d,]+ tokens/s\n$", error)
    assert list(tmp_path.iterdir()) == []


def test_three_models_are_one_block(run, tmp_path, monkeypatch):
    """A heading for each text; every text by its own model and seed."""
    GPT.from_pretrained(run / "step_00010").save_pretrained(tmp_path / "theirs")
    models = (run, run / "step_00010", tmp_path / "theirs")
    arguments = ("--num=2", "--max_new_tokens=12", "--prompt=PENNY:", "--dtype=float32")
    out, _ = texts_of(models[0], *arguments, *models[1:], monkeypatch=monkeypatch)
    names = [run / "step_00020", run / "step_00010", tmp_path / "theirs"]
    directories = [run / "step_00020", run / "step_00010", run / "step_00010"]
    expected = ""
    for name, directory in zip(names, directories):
        for i in range(2):
            text = expected_text(directory, "PENNY:", 12, 1337 + i, top_k=50)
            expected += f"--- {name}, text {i + 1} of 2\n{text}\n\n"
    assert out == expected
    alone, _ = texts_of(*models, *arguments[1:], monkeypatch=monkeypatch)
    assert alone.count("---") == 3 and "text 1" not in alone


@pytest.mark.parametrize("settings", [
    ["--temperature=0"], ["--top_k=0", "--top_p=0.9"], ["--seed=5", "--temperature=0.5"],
    ["--max_new_tokens=150", "--slide=1"], ["--max_new_tokens=150"],
])  # fmt: skip
def test_settings_reach_the_model(run, monkeypatch, settings):
    out, _ = texts_of(run, "--dtype=float32", "--prompt=A", *settings, monkeypatch=monkeypatch)
    given = dict(setting.removeprefix("--").split("=") for setting in settings)
    top_p = float(given["top_p"]) if "top_p" in given else None
    expected = expected_text(
        run / "step_00020", "A", int(given.get("max_new_tokens", 100)),
        int(given.get("seed", 1337)),
        temperature=float(given.get("temperature", 1)), top_k=int(given.get("top_k", 50)) or None,
        top_p=top_p, slide=int(given.get("slide", 16)),
    )  # fmt: skip
    assert out == expected + "\n"


def test_streamed_text_is_the_text(run, monkeypatch):
    arguments = [run, "--num=3", "--max_new_tokens=40", "--dtype=float32", "--prompt=é中\U0001f600"]
    expected, _ = texts_of(*arguments, monkeypatch=monkeypatch)
    assert texts_of(*arguments, "--stream", monkeypatch=monkeypatch)[0] == expected
    assert texts_of(*arguments, "--stream", "True", monkeypatch=monkeypatch)[0] == expected
    assert texts_of("--stream", *arguments, monkeypatch=monkeypatch)[0] == expected


def test_a_stream_comes_piece_by_piece(run, monkeypatch):
    """What is written before the last token is made is most of the text."""
    stream, written = generation.stream, []

    def spy(*args, **kwargs):
        for new in stream(*args, **kwargs):
            written.append(len(sys.stdout.getvalue()))
            yield new

    monkeypatch.setattr(generation, "stream", spy)
    out, _ = texts_of(run, "--stream", "--max_new_tokens=30", monkeypatch=monkeypatch)
    assert len(written) == 30 and written[0] < written[15] < written[29] < len(out)


def test_no_half_character_is_written():
    """Random texts as random tokens: only complete characters are written."""
    rng = random.Random(0)
    encoding = tokenizer.get_encoding()
    for _ in range(300):
        text = "".join(rng.choice("aé中\U0001f600\U0001d11e \n") for _ in range(12))
        ids = [encoding.encode_single_token(bytes([byte])) for byte in text.encode()]
        shown = ""
        for piece in sample.decode_pieces(ids):
            shown += piece
            assert text.startswith(shown)
        assert shown == text
        ids = [rng.randrange(V) for _ in range(30)]  # a model's ids need not be valid UTF-8
        assert "".join(sample.decode_pieces(ids)) == encoding.decode(ids)


def test_prompts_from_a_file_and_from_standard_input(run, tmp_path, monkeypatch):
    (tmp_path / "a b.txt").write_bytes("Ünited\r\nwe\r\n".encode())
    settings = ("--max_new_tokens=5", "--temperature=0", "--dtype=float32")
    from_file, _ = texts_of(
        run, *settings, f"--prompt=FILE:{tmp_path / 'a b.txt'}", monkeypatch=monkeypatch
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Ünited\r\nwe\n".encode())))
    from_input, _ = texts_of(run, *settings, "--prompt=-", monkeypatch=monkeypatch)
    expected = expected_text(run / "step_00020", "Ünited\r\nwe", 5, 1337, temperature=0) + "\n"
    assert from_file == from_input == expected


def test_a_prompt_has_the_ids_of_tiktoken_with_its_special_token():
    """Also where tiktoken itself fails: a word after very many spaces."""
    encoding = tokenizer.get_encoding()
    for text in ("<|endoftext|>", "a<|endoftext|><|endoftext|> b\n", "a b", "é<|endoftext|>"):
        assert sample.encode_prompt(text) == encoding.encode(text, allowed_special="all")
    text = " " * 1_200_000 + "x<|endoftext|>"
    assert encoding.decode(sample.encode_prompt(text)) == text


@pytest.mark.gpt2
def test_a_text_ends_at_end_of_text_unless_stop_is_false(run, tmp_path, monkeypatch):
    """With a model that soon predicts it, the text stops before it; --stop=False continues."""
    model = GPT.from_pretrained(run)
    with torch.no_grad():  # after 8 tokens <|endoftext|> is the likeliest
        direction = torch.tensor([1.0, -1.0]).repeat(32)
        model.transformer.wpe.weight[8:] = 30 * direction
        model.transformer.wte.weight[END] = direction
    model.save_pretrained(tmp_path / "m")
    arguments = [tmp_path / "m", "--temperature=0", "--prompt=The", "--max_new_tokens=20"]
    short, error = texts_of(*arguments, monkeypatch=monkeypatch)
    long, _ = texts_of(*arguments, "--stop=False", monkeypatch=monkeypatch)
    assert "<|endoftext|>" not in short and long.startswith(short[:-1] + "<|endoftext|>")
    assert re.search(r": \d tokens in", error)
    start, _ = texts_of(run, "--prompt=<|endoftext|>", "--temperature=0", monkeypatch=monkeypatch)
    assert start.startswith("<|endoftext|>")


def test_int8_is_reported_and_gives_text(run, monkeypatch):
    out, error = texts_of(run, "--int8", "--max_new_tokens=20", monkeypatch=monkeypatch)
    assert out.startswith("Hello, I'm a language model,") and "weights in int8" in error


def test_int8_scores_hellaswag(run, tmp_path, monkeypatch, capsys):
    """The same examples have nearly the same losses in 8 bits."""
    rng = random.Random(1)
    words = "the queen of a bridge and lamp you it river is".split()
    lines = [
        {"ctx": " ".join(rng.choices(words, k=9)), "activity_label": "A", "label": 1,
         "endings": [" ".join(rng.choices(words, k=4)) for _ in range(4)]}
        for _ in range(9)
    ]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    losses = []
    for extra in ([], ["--int8"]):
        out = tmp_path / "out.jsonl"
        arguments = ["-m", run, "--style=completion", *extra, f"--data={data}", f"--out={out}"]
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", *map(str, arguments)])
        assert hellaswag.main() == 0
        assert ("in int8" in capsys.readouterr().out) == bool(extra)
        losses.append([json.loads(line)["losses"] for line in out.read_text().splitlines()])
    a, b = torch.tensor(losses)
    assert 0 < (a - b).abs().max() < 0.3


def test_a_closed_pipe_is_no_traceback(run):
    """`sample.py ... | head -1`."""
    command = [sys.executable, str(ROOT / "sample.py"), str(run), "--stream", "--num=50"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read().decode()
        assert process.wait(60) == 141 and "Traceback" not in error and "Exception" not in error


@pytest.mark.parametrize("arguments, words", [
    (["nothing"], ["'nothing'", "gpt2-medium"]),
    (["gpt3"], ["'gpt3'", "gpt2-xl"]),
    (["{tmp}"], ["{tmp}", "no config.json", "not a model directory"]),
    (["{run}", "{tmp}"], ["{tmp}", "not a model directory"]),
    (["{tmp}/text.txt"], ["text.txt"]),
    (["{run}", "--prompt="], ["prompt=''", "empty"]),
    (["{run}", "--prompt=FILE:{tmp}/none"], ["{tmp}/none", "No such file"]),
    (["{run}", "--prompt=FILE:{tmp}"], ["{tmp}", "directory"]),
    (["{run}", "--prompt=FILE:{tmp}/empty.txt"], ["empty.txt", "is empty"]),
    (["{run}", "--prompt=" + 65 * " word"], ["65 tokens", "only 64", "shorten"]),
    (["{run}", "--top_p=2"], ["top_p=2.0", "at most 1"]),
    (["{run}", "--top_p=0"], ["top_p=0.0", "above 0"]),
    (["{run}", "--top_p=1e-300"], ["top_p=1e-300", "at least 1e-6"]),
    (["{run}", "--top_p=nan"], ["top_p=nan"]),
    (["{run}", "--temperature=-1"], ["temperature=-1.0"]),
    (["{run}", "--temperature=nan"], ["temperature=nan"]),
    (["{run}", "--temperature=inf"], ["temperature=inf"]),
    (["{run}", "--top_k=-1"], ["top_k=-1"]),
    (["{run}", "--num=0"], ["num=0"]),
    (["{run}", "--max_new_tokens=0"], ["max_new_tokens=0"]),
    (["{run}", "--slide=65"], ["slide=65", "only 64"]),
    (["{run}", "--seed=-1"], ["seed=-1"]),
    (["{run}", "--seed=1e22"], [f"seed={10**22}", "must be from 0 to"]),
    (["{run}", "--num=1e22"], [f"num={10**22}", "must be from 1 to"]),
    (["{run}", "--max_new_tokens=1e22"], [f"max_new_tokens={10**22}", "must be from 1 to"]),
    (["{run}", "--temperature=1e-300"], ["temperature=1e-300", "must be 0, or"]),
    (["a" * 5000], ["neither a directory nor"]),
    (["{run}", "--topk=5"], ["--topk", "did you mean --top_k?"]),
    (["{run}", "--num=two"], ["num='two'", "whole number"]),
    (["{run}", "--int8=maybe"], ["int8='maybe'", "True or False"]),
    (["{run}", "--device=tpu"], ["device='tpu'"]),
    (["{run}", "--device=cuda:99"], ["cuda"]),
    (["{run}", "--dtype=int4"], ["dtype='int4'"]),
    (["{tmp}/few"], ["few", "100 tokens", "50,257"]),
    (["{tmp}/damaged"], ["step_00020", "damaged"]),
])  # fmt: skip
def test_wrong_input_is_one_line(run, tmp_path, monkeypatch, arguments, words):
    """Before anything is generated: no text of the other models is started."""
    (tmp_path / "text.txt").write_text("a")
    (tmp_path / "empty.txt").write_text("\n")
    if "few" in arguments[0]:
        GPT(GPTConfig(vocab_size=100, n_layer=1, n_head=1, n_embd=8)).save_pretrained(
            tmp_path / "few"
        )
    if "damaged" in arguments[0]:
        (tmp_path / "damaged/step_00020").mkdir(parents=True)
    places = dict(tmp=tmp_path, run=run)
    monkeypatch.setattr(sys, "argv", ["sample.py", *(a.format(**places) for a in arguments)])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(UserError) as refusal:
            sample.main()
    assert out.getvalue() == ""
    message = str(refusal.value) + err.getvalue()
    assert "\n" not in str(refusal.value)
    for word in words:
        assert word.format(**places) in message


def test_wrong_input_ends_with_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(SystemExit) as end:
        run_main(sample.main)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt=-"])
    monkeypatch.setattr(sys, "stdin", None)  # sample.py --prompt=- <&-
    with pytest.raises(SystemExit) as end:
        run_main(sample.main)
    assert end.value.code == 2 and "prompt='-': is empty" in capsys.readouterr().err
    assert re.fullmatch(r"error: models='log': .*python sample.py gpt2\n", err)


def test_a_prompt_file_of_windows_is_read_or_refused_by_its_encoding(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("Once upon a time\r\n".encode("utf-8-sig"))
    assert sample.read_prompt(f"FILE:{path}") == "Once upon a time"
    path.write_bytes("Once upon a time\r\n".encode("utf-16"))
    with pytest.raises(UserError, match="prompt.txt.*UTF-16.*iconv"):
        sample.read_prompt(f"FILE:{path}")
