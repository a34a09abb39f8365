"""The launcher's variables, and printing on one or on every rank."""

import io

import pytest

from support import errors, launch
from support.errors import UserError
from support.launch import SLURM, TORCHRUN, Launch, read_launch

VARIABLES = {*TORCHRUN, *SLURM}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def set_variables(monkeypatch, names, values) -> None:
    for name, value in zip(names, values):
        if value is not None:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize("names", [TORCHRUN, SLURM], ids=["torchrun", "srun"])
@pytest.mark.parametrize(
    "values, expected",
    [
        ((None, None, None, None), Launch(0, 1, 0, 1)),
        (("0", "1", None, None), Launch(0, 1, 0, 1)),
        (("3", "8", "1", "2"), Launch(3, 8, 1, 2)),
        (("3", "8", None, None), Launch(3, 8, 0, 1)),
        (("3", None, "3", "8"), Launch(0, 1, 0, 1)),
        ((None, "8", None, None), Launch(0, 1, 0, 1)),
    ],
)
def test_the_place_of_a_process_is_that_of_its_launcher(monkeypatch, names, values, expected):
    set_variables(monkeypatch, names, values)
    assert read_launch(names) == expected


def test_the_first_launcher_whose_variables_are_set_counts(monkeypatch):
    set_variables(monkeypatch, SLURM, ("1", "2", "1", "2"))
    assert read_launch() == Launch() and read_launch(TORCHRUN, SLURM) == Launch(1, 2, 1, 2)
    set_variables(monkeypatch, TORCHRUN, ("5", "6", "0", "1"))
    assert read_launch() == read_launch(TORCHRUN, SLURM) == Launch(5, 6, 0, 1)


@pytest.mark.parametrize(
    "values",
    [
        ("8", "8", None, None), ("-1", "8", None, None), ("one", "8", None, None),
        ("0", "", None, None), ("0", "0", None, None), ("0", "2", "-1", None),
        ("0", "2", "0", "0"), ("0", "2", "x", None),
    ],
)  # fmt: skip
def test_variables_that_contradict_each_other_are_one_error(monkeypatch, values):
    set_variables(monkeypatch, TORCHRUN, values)
    with pytest.raises(UserError) as error:
        read_launch()
    message = str(error.value)
    assert f"RANK={values[0]}:" in message and f"WORLD_SIZE={values[1]}" in message
    assert "unset all of them" in message
    rank = errors.environment_rank()  # what decides which rank prints the error
    assert rank == 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_rank_0_prints_lines_and_other_ranks_do_not(monkeypatch, capsys):
    launch.print0("one")
    set_variables(monkeypatch, TORCHRUN, ("0", "2"))
    launch.print0("two", bold=True)
    monkeypatch.setenv("RANK", "1")
    launch.print0("three")
    assert capsys.readouterr() == ("one\ntwo\n", "")


@pytest.mark.parametrize("no_color", [False, True])
def test_only_a_terminal_has_bold_lines(monkeypatch, no_color):
    monkeypatch.setenv("NO_COLOR", "1" if no_color else "")
    for file, terminal in ((io.StringIO(), False), (Terminal(), True)):
        launch.print0("words", bold=True, file=file)
        launch.print0("words", file=file)
        bold = terminal and not no_color
        assert file.getvalue() == ("\033[1mwords\033[0m\n" if bold else "words\n") + "words\n"


def test_a_line_of_every_rank_names_the_rank_if_there_are_several(monkeypatch, capsys):
    launch.print_rank("alone")
    set_variables(monkeypatch, SLURM, ("1", "3"))
    launch.print_rank("srun")
    set_variables(monkeypatch, TORCHRUN, ("2", "3"))
    launch.print_rank("torchrun")
    assert capsys.readouterr() == ("", "alone\nrank 1: srun\nrank 2: torchrun\n")
