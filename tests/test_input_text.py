"""The text that the first run learns from."""

import re
from collections import Counter

from conftest import ROOT

TEXT = (ROOT / "input.txt").read_bytes().decode("utf-8")


def test_is_long_enough_and_plain_ascii():
    """At least 300,000 printable ASCII characters and newlines, the last of them a newline."""
    assert len(TEXT) >= 300_000
    assert set(TEXT) <= {chr(code) for code in range(32, 127)} | {"\n"}
    assert TEXT.endswith("\n") and not TEXT.endswith("\n\n")


def test_is_a_play():
    """Nothing but speeches: a name in capitals and a colon, lines, one blank line in between."""
    speech = re.compile(r"[A-Z]+( [A-Z]+)*:(\n\S[^\n]*)+")
    speeches = TEXT.removesuffix("\n").split("\n\n")
    assert [s for s in speeches if not speech.fullmatch(s)] == []
    assert [line for line in TEXT.split("\n") if line != line.rstrip()] == []
    speakers = Counter(s.split("\n")[0] for s in speeches)
    assert len(speakers) >= 5 and min(speakers.values()) >= 10, speakers  # a cast, and no typos


def test_is_written_and_not_filled_into_templates():
    """At least 95 % of the sequences of 8 words (names and punctuation left out) occur once."""
    words = re.findall(r"[a-z']+", re.sub(r"^[A-Z ]+:$", "", TEXT, flags=re.M).lower())
    sequences = Counter(zip(*(words[i:] for i in range(8))))
    once = sum(count == 1 for count in sequences.values())
    assert once >= 0.95 * sequences.total()
