"""A command line made from a dataclass of settings: `[recipe] [--name=value ...]`.

Names, types and defaults are the dataclass's fields; the help is the comment on each field's line,
and a comment on a line of its own is the heading of the fields below it. Arguments without a name
go to the field of type tuple, if there is one.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import re

from support.errors import SettingError

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def parse(settings: type, recipes: dict[str, dict], arguments: list[str], description: str):
    """An instance of the dataclass `settings`: its defaults, then a recipe's values, then those
    of the command line.

    Raises SettingError for an unknown recipe or name (with the closest valid one) or a wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(settings)}
    switches = {f"--{name}" for name, field in fields.items() if field.type is bool}
    parser = build_parser(settings, recipes, description)
    given, unknown = parser.parse_known_intermixed_args(expand_switches(arguments, switches))
    for argument in unknown:
        name = argument.lstrip("-").split("=")[0]
        raise SettingError(f"{argument}: no such setting; {suggest(name, fields, '--')}")
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in vars(given).items()}
    recipe = values.pop("recipe", None)
    if recipe is not None and recipe not in recipes:
        raise SettingError(f"{recipe}: no such recipe; {suggest(recipe, recipes)}")
    return settings(**recipes.get(recipe, {}) | values)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises its errors as SettingError."""

    def error(self, message):
        raise SettingError(f"{message}; --help lists all settings")

    def parse_known_args(self, args=None, namespace=None):
        """argparse's, but -- is refused as a value; argparse would leave the setting without one"""
        for argument in args or ():
            if argument.startswith("-") and argument.endswith("=--"):
                self.error(f"{argument}: -- is not a value")
        return super().parse_known_args(args, namespace)


def build_parser(settings: type, recipes: dict[str, dict], description: str) -> Parser:
    """The parser of `parse`, with the settings in the groups of the dataclass."""
    fields = {field.name: field for field in dataclasses.fields(settings)}
    positional = "".join(f"[{n} ...] " for n, field in fields.items() if field.type is tuple)
    parser = Parser(
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # the result has only what is given
        description=description,
        usage=f"%(prog)s {'[recipe] ' if recipes else positional}[--setting=value ...]",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=32, width=100),
    )
    if recipes:
        parser.add_argument("recipe", nargs="?", help=", ".join(recipes))
    for heading, comments in grouped_comments(settings).items():
        group = parser.add_argument_group(heading) if heading else parser
        for name, comment in comments.items():
            kind, default = fields[name].type, fields[name].default
            shown = " ".join(default) if kind is tuple else default
            text = f"{comment} [{shown}]".replace("%", "%%")
            if kind is tuple:
                group.add_argument(name, nargs="*", help=text)
            else:
                to_kind = functools.partial(convert, name, kind=kind)
                group.add_argument(f"--{name}", metavar="X", type=to_kind, help=text)
    return parser


def grouped_comments(settings: type) -> dict[str, dict[str, str]]:
    """{heading: {field: the comment on its line}}, in the order of the source."""
    groups, heading = {}, ""
    for line in inspect.getsource(settings).splitlines():
        if match := re.match(r"    # (.*)$", line):
            heading = match[1]
        elif match := re.match(r"    (\w+): \w+ = .*?(?:  # (.*))?$", line):
            groups.setdefault(heading, {})[match[1]] = match[2] or ""
    return groups


def expand_switches(arguments: list[str], switches: set[str]) -> list[str]:
    """The arguments, with `--switch=True` where a boolean `--switch` is given without a value."""
    following = [*arguments[1:], ""]
    return [
        f"{argument}=True" if argument in switches and value.lower() not in BOOLEANS else argument
        for argument, value in zip(arguments, following)
    ]


def suggest(name: str, names, prefix: str = "") -> str:
    """The remedy for a name that is not among `names`: the closest one, or all."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else f"choose from {', '.join(names)}"


def convert(name: str, text: str, kind: type):
    """The value of a setting that is given as text. Raises SettingError if the type is wrong."""
    try:
        if kind is bool:
            return BOOLEANS[text.lower()]
        if kind is int and not text.lstrip("+-").replace("_", "").isdigit():
            number = float(text)  # accepts 4e9
            if number != int(number):
                raise ValueError
            return int(number)
        return kind(text)
    except (ValueError, KeyError, OverflowError):
        wanted = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
        raise SettingError(f"{name}={text!r}: must be {wanted}") from None
