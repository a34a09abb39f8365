"""README's command of lm-evaluation-harness on a checkpoint, if that is installed.

The oracles are its two scores written out with our model. The data of its tasks lie in directories
with the names that the datasets have on the Hub, where `datasets` finds them without a network.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, environment
from model_helpers import make_model

from support import tokenizer

README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = re.findall("[a-z]+", TEXT)
encoding = tokenizer.get_encoding()


def write_dataset(directory: Path, name: str, splits: str, examples: list[dict]) -> None:
    """A dataset as on the Hub: a configuration whose splits all are these examples."""
    directory.mkdir(parents=True)
    files = "".join(f"  - split: {split}\n    path: data.jsonl\n" for split in splits.split())
    head = f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{files}---\n"
    (directory / "README.md").write_text(head)
    (directory / "data.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))


def log_probabilities(model, ids: list[int], n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(of all ids (n, V), of these ids (n,)) for the last n ids, with as many before as fit."""
    ids = torch.tensor(ids[-model.config.block_size - 1 :])
    found = model(ids[None, :-1])[0][0, -n:].log_softmax(-1)
    return found, found.gather(1, ids[-n:, None])[:, 0]


def score_last_words(model, texts: list[str]) -> tuple[float, float]:
    """(accuracy, perplexity) of the last word of each text; it is right if all its ids are."""
    hits, total = 0, 0.0
    for text in texts:
        n = len(encoding.encode(" " + text.split(" ")[-1]))
        every, own = log_probabilities(model, encoding.encode(text), n)
        hits, total = hits + bool((every.amax(1) == own).all()), total + own.sum().item()
    return hits / len(texts), math.exp(-total / len(texts))


def word_perplexity(model, pages: list[str]) -> float:
    """Each page follows an <|endoftext|>, and its ids are predicted a window at a time."""
    total, T = 0.0, model.config.block_size
    for page in pages:
        ids = [tokenizer.END_OF_TEXT_ID, *encoding.encode(page)]
        for start in range(1, len(ids), T):
            n = len(ids[start : start + T])
            total += log_probabilities(model, ids[: start + n], n)[1].sum().item()
    return math.exp(-total / sum(len(page.split(" ")) for page in pages))


def predicted_word(model, text: str) -> str:
    """The id that the model predicts after a text, as text."""
    logits = model(torch.tensor([encoding.encode(text)[-model.config.block_size :]]))[0][0, -1]
    return encoding.decode([logits.argmax().item()])


@torch.no_grad()
def test_the_command_of_the_readme_scores_a_checkpoint(tmp_path):
    """The line as it stands there, on texts within the window and longer ones."""
    pytest.importorskip("lm_eval", reason='pip install "lm_eval[hf]"')
    (command,) = re.findall(r"^(lm_eval .*?) +#", README, re.MULTILINE)
    model = make_model()
    model.save_pretrained(tmp_path / "log" / "step_19073")

    texts = [" ".join(WORDS[i : 4 * i + 2]) for i in range(15)]
    right = [text + predicted_word(model, text) for text in texts]
    texts += [text for text in right if re.fullmatch("[a-z ]+ [A-Za-z]+", text)]
    pages = [" ".join(WORDS[:n]) for n in (3, 25, 90)]
    lambada, wikitext = ([{key: x} for x in y] for key, y in (("text", texts), ("page", pages)))
    hub = tmp_path / "EleutherAI"
    write_dataset(hub / "lambada_openai", "default", "test", lambada)
    splits = "train validation test"
    write_dataset(hub / "wikitext_document_level", "wikitext-2-raw-v1", splits, wikitext)

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path), CUDA_VISIBLE_DEVICES="", PATH=path)
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment(**variables), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]
    found = {row[5]: float(row[7]) for row in rows if len(row) > 7 and row[3] == "none"}
    acc, perplexity = score_last_words(model, texts)
    assert 0 < acc < 1 and found["acc"] == pytest.approx(acc, abs=1e-4)
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(word_perplexity(model, pages), rel=1e-4)
