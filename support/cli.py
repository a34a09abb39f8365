"""A settings dataclass as a command line: `[recipe] [--name=value ...]`, or without recipes.

The names, types and defaults are the dataclass's fields, the help is the comment beside each. What
stands on the command line without a name goes to the field that is a tuple, if there is one.
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
    """An instance of the dataclass `settings`: its defaults, a recipe's values, then those given.

    Raises SettingError for an unknown recipe or name (with the closest valid one) or a wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(settings)}
    listed = [name for name, field in fields.items() if field.type is tuple]
    words = "[recipe] " if recipes else "".join(f"[{name} ...] " for name in listed)
    parser = Parser(
        allow_abbrev=False,
        description=description,
        usage=f"%(prog)s {words}[--setting=value ...]",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=32, width=100),
    )
    if recipes:
        parser.add_argument("recipe", nargs="?", help=", ".join(recipes))
    else:
        parser.set_defaults(recipe=None)
    for name, comment in comments(settings).items():
        if fields[name].type is tuple:
            text = f"{comment} [{' '.join(fields[name].default)}]".replace("%", "%%")
            parser.add_argument(name, nargs="*", help=text)
        else:
            text = f"{comment} [{fields[name].default}]".replace("%", "%%")
            parser.add_argument(f"--{name}", metavar="X", help=text)
    switches = {f"--{name}" for name, field in fields.items() if field.type is bool}
    given, unknown = parser.parse_known_args(spell_out(arguments, switches))
    for argument in unknown:
        name = argument.lstrip("-").split("=")[0]
        raise SettingError(f"{argument}: no such setting; {closest(name, fields, '--')}")
    if given.recipe is not None and given.recipe not in recipes:
        raise SettingError(f"{given.recipe}: no such recipe; {closest(given.recipe, recipes)}")
    values = dict(recipes.get(given.recipe, {}))
    for name, field in fields.items():
        if field.type is tuple:
            values[name] = tuple(getattr(given, name)) or field.default
        elif getattr(given, name) is not None:
            values[name] = convert(name, getattr(given, name), field.type)
    return settings(**values)


def spell_out(arguments: list[str], switches: set[str]) -> list[str]:
    """The arguments with `--switch=True` where `--switch` stands alone."""
    values = [*arguments[1:], ""]
    return [
        f"{argument}=True" if argument in switches and value.lower() not in BOOLEANS else argument
        for argument, value in zip(arguments, values)
    ]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are those of a setting."""

    def error(self, message):
        raise SettingError(f"{message}; --help lists all settings")


def comments(settings: type) -> dict[str, str]:
    """{field: the comment on its line}."""
    line = re.compile(r"^    (\w+): \w+ = .*?  # (.*)$", re.MULTILINE)
    return dict(line.findall(inspect.getsource(settings)))


def closest(name: str, names, prefix: str = "") -> str:
    """The remedy for a name that is not among `names`."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(names)}"


def convert(name: str, text: str, kind: type):
    """The value that `text` stands for. Raises SettingError where it is not of that type."""
    try:
        if kind is bool:
            return BOOLEANS[text.lower()]
        if kind is int and not text.lstrip("+-").replace("_", "").isdigit():
            number = float(text)  # so that 4e9 will do
            if number != int(number):
                raise ValueError
            return int(number)
        return kind(text)
    except (ValueError, KeyError, OverflowError):
        wanted = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
        raise SettingError(f"{name}={text!r}: must be {wanted}") from None
