"""The command line of a script: a dataclass of arguments, checked before anything is written.

    @dataclass(kw_only=True)
    class Args:
        model: str = arg(group="model", help="checkpoint to start from")
        learning_rate: float = arg(2e-5, above=0, help="peak learning rate")
        resume: bool = arg(False, help="continue from the last saved state")

A field without a default is required. A field that is True by default has the flag --no_NAME. Every number is
finite, and within the range that stands beside its type.
"""

import argparse
import dataclasses
import difflib
import math
import sys
import types
from typing import Any, Literal, Union, get_args, get_origin

from lib.files import UserError

REQUIRED = dataclasses.MISSING


def arg(default: Any = REQUIRED, *, help: str, group: str | None = None, **limits: float) -> Any:
    """A field of a script's Args.

    default   the value when the flag is not given; None means "not given"; a list is copied
    group     heading in --help; it also holds for the fields that follow, until the next group
    limits    of a number: least, most (inclusive), above, below (exclusive)"""
    assert limits.keys() <= {"least", "most", "above", "below"}
    metadata = {"help": help, "group": group, "limits": limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} — see --help")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)


def parse_args(cls: type):
    """The arguments of a script from its command line. --help shows the docstring of the script and every flag.

    UserError: an unknown, abbreviated or missing flag, a value of another type, a number out of its range."""
    script = sys.modules["__main__"].__doc__
    parser = _Parser(
        description=script, formatter_class=_Help, allow_abbrev=False, usage="%(prog)s [flags]"
    )
    section, flags = parser, []
    for field in dataclasses.fields(cls):
        if field.metadata["group"]:
            section = parser.add_argument_group(field.metadata["group"])
        flags.append(_add(section, field))
    given, unknown = parser.parse_known_args()
    if unknown:
        raise UserError(_unknown(unknown[0], flags))
    args = cls(**vars(given))
    for field in dataclasses.fields(cls):
        _check_range(field, getattr(args, field.name))
    return args


def _add(section, field: dataclasses.Field) -> str:
    """Add the flag of a field to a section of the parser; returns the flag."""
    kind, required = _kind(field.type), field.default is REQUIRED
    default = None if required else field.default
    if field.default_factory is not dataclasses.MISSING:
        default, required = field.default_factory(), False
    text = field.metadata["help"].replace("%", "%%")
    if kind is bool:
        flag = f"--no_{field.name}" if default else f"--{field.name}"
        action = "store_false" if default else "store_true"
        section.add_argument(flag, dest=field.name, action=action, default=default, help=text)
        return flag
    if required:
        text += " (required)"
    elif default not in (None, [], ""):
        shown = " ".join(default) if isinstance(default, list) else f"{default}"
        text += f" (default: {shown})"
    options: dict[str, Any] = {"dest": field.name, "default": default, "help": text}
    options["required"] = required
    if get_origin(kind) is Literal:
        options["choices"] = get_args(kind)
    elif get_origin(kind) is list:
        options |= {"nargs": "+", "metavar": field.name.upper()}
    else:
        options |= {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
    section.add_argument(f"--{field.name}", **options)
    return f"--{field.name}"


def _kind(annotation):
    """`int | None` -> int; anything else as it is."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    return annotation


def _unknown(flag: str, flags: list[str]) -> str:
    name = flag.partition("=")[0]
    near = difflib.get_close_matches(name, flags, n=1)
    hint = f"did you mean {near[0]}?" if near else "see --help"
    return f"unknown argument {name} — {hint}"


def _check_range(field: dataclasses.Field, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    limits = field.metadata["limits"]
    fits = {
        "least": lambda bound: value >= bound,
        "most": lambda bound: value <= bound,
        "above": lambda bound: value > bound,
        "below": lambda bound: value < bound,
    }
    if math.isfinite(value) and all(fits[name](bound) for name, bound in limits.items()):
        return
    words = {"least": "at least", "most": "at most", "above": "above", "below": "below"}
    wanted = " and ".join(f"{words[name]} {bound:g}" for name, bound in limits.items())
    raise UserError(
        f"--{field.name} {value} — give a finite number{f' {wanted}' if wanted else ''}"
    )
