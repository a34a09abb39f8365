"""The launcher's variables, and printing on one or on every rank."""

import io

import pytest

from support import errors, launch
from support.errors import UserError
from support.launch import SLURM, TASKS, TORCHRUN, Launch, read_launch

VARIABLES = {*TORCHRUN, *SLURM, *TASKS}


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
        ((None, None, "3", "8"), Launch(0, 1, 0, 1)),
    ],
)
def test_the_place_of_a_process_is_that_of_its_launcher(monkeypatch, names, values, expected):
    set_variables(monkeypatch, names, values)
    assert read_launch(names) == expected


def test_the_first_launcher_whose_variables_are_set_counts(monkeypatch):
    set_variables(monkeypatch, SLURM, ("1", "2", "1", "2"))
    assert read_launch(TORCHRUN, SLURM) == Launch(1, 2, 1, 2)
    set_variables(monkeypatch, TORCHRUN, ("5", "6", "0", "1"))
    assert read_launch() == read_launch(TORCHRUN, SLURM) == Launch(5, 6, 0, 1)


def test_a_batch_script_of_slurm_is_one_process(monkeypatch):
    """It has the rank of a task, but is not a task of a step."""
    set_variables(monkeypatch, SLURM, ("0", None, "0", "2"))
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert read_launch(TORCHRUN, SLURM) == Launch()


@pytest.mark.parametrize(
    "values",
    [
        ("8", "8", None, None), ("-1", "8", None, None), ("one", "8", None, None),
        ("0", "", None, None), ("", "2", None, None), ("", "", None, None), ("0", "0", None, None),
        ("1", "1", None, None), ("0", "2", "-1", None), ("0", "2", "2", "2"),
        ("0", "2", "0", "0"), ("0", "2", "x", None), ("3", None, "3", "8"), (None, "8", None, None),
        ("0", None, None, None),
    ],
)  # fmt: skip
def test_variables_that_are_left_over_or_contradict_each_other_are_one_error(monkeypatch, values):
    set_variables(monkeypatch, TORCHRUN, values)
    with pytest.raises(UserError) as error:
        read_launch()
    message = str(error.value)
    for name, value in zip(TORCHRUN, values):
        assert value is None or f"{name}={value}" in message
    assert "unset all of them" in message
    rank = errors.environment_rank()  # what decides which rank prints the error
    assert rank == 0


@pytest.mark.parametrize(
    "name", ["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
)
def test_tasks_of_another_launcher_without_ranks_are_refused(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert read_launch() == Launch()
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=f"{name}=2: .*torchrun --nproc_per_node"):
        read_launch()
    set_variables(monkeypatch, TORCHRUN, ("1", "2"))
    assert read_launch() == Launch(1, 2, 0, 1)


@pytest.mark.parametrize("address", [None, "", "no-such-machine.invalid", "a" * 70 + ".invalid"])
def test_an_address_that_does_not_resolve_is_refused(monkeypatch, address):
    set_variables(monkeypatch, ("MASTER_ADDR", "MASTER_PORT"), (address, "29500"))
    if address is None:
        monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=f"MASTER_ADDR={address or ''}: .*torchrun"):
        launch.read_address()


@pytest.mark.parametrize("port", [None, "", "x", "0", "65536", "-1", "1.5"])
def test_a_port_that_is_not_valid_is_refused(monkeypatch, port):
    set_variables(monkeypatch, ("MASTER_ADDR", "MASTER_PORT"), ("127.0.0.1", port))
    if port is None:
        monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(UserError, match=f"MASTER_PORT={port or ''}: "):
        launch.read_address()


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
