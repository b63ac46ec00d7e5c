"""The command line of a script: a dataclass of arguments, checked before anything is written.

    @dataclass(kw_only=True)
    class Args:
        model: str = arg(group="model", help="checkpoint to start from")
        learning_rate: float = arg(2e-5, above=0, help="peak learning rate")
        resume: bool = arg(False, help="continue from the last saved state")

A field without a default is required. A field that is True by default has the flag --no_NAME. Every
number is finite, within the range that stands beside its type, and at most LARGEST in size. The
arguments of the group "runtime" do not change the result."""

import argparse
import dataclasses
import difflib
import operator
import sys
import types
from argparse import RawDescriptionHelpFormatter
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin

from lib.files import UserError

REQUIRED = dataclasses.MISSING
LIMITS = {  # how a limit is checked, and how it is called
    "least": (operator.ge, "at least"),
    "most": (operator.le, "at most"),
    "above": (operator.gt, "above"),
    "below": (operator.lt, "below"),
}
LARGEST = {int: 2**31 - 1, float: 1e38}  # so that products of two fit in 64 bits


def arg(default: Any = REQUIRED, *, help: str, group: str | None = None, **limits: float) -> Any:
    """A field of a script's Args.

    default   the value when the flag is not given; None means "not given"; a list becomes a tuple
    group     heading in --help; it also holds for the fields that follow, until the next group
    limits    of a number: least, most (inclusive), above, below (exclusive)"""
    assert limits.keys() <= LIMITS.keys()
    default = tuple(default) if isinstance(default, list) else default
    metadata = {"help": help, "group": group, "limits": limits}
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message[:300]} — see --help")


def parse_args(cls: type):
    """The arguments of a script from its command line. --help shows the docstring of the script and
    every flag. UserError: an unknown, abbreviated or missing flag, a value of another type, a
    number out of its range."""
    parser = _Parser(
        usage="%(prog)s [flags]",
        description=sys.modules["__main__"].__doc__,
        formatter_class=partial(RawDescriptionHelpFormatter, max_help_position=34, width=110),
        allow_abbrev=False,
    )
    section, flags = parser, []
    for field in dataclasses.fields(cls):
        if field.metadata["group"]:
            section = parser.add_argument_group(field.metadata["group"])
        flags.append(_add(section, field))
    given, unknown = parser.parse_known_args()
    if unknown:
        name = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(name, flags, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        raise UserError(f"unknown argument {name} — {hint}")
    for field in dataclasses.fields(cls):
        _check_range(field, getattr(given, field.name))
    return cls(**vars(given))


def _add(section, field: dataclasses.Field) -> str:
    """Add the flag of a field to a section of the parser; returns the flag."""
    default, kind = field.default, field.type
    if get_origin(kind) in (Union, types.UnionType):  # int | None
        kind = next(kind for kind in get_args(kind) if kind is not type(None))
    options = {"dest": field.name, "default": default, "help": field.metadata["help"]}
    options["help"] = options["help"].replace("%", "%%")
    if kind is bool:
        flag = f"--no_{field.name}" if default else f"--{field.name}"
        section.add_argument(flag, action="store_false" if default else "store_true", **options)
        return flag
    if default is REQUIRED:
        options["required"] = True
        options["help"] += " (required)"
    elif default not in (None, (), ""):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        options["help"] += f" (default: {shown})"
    if get_origin(kind) is Literal:
        options |= {"choices": get_args(kind), "type": type(get_args(kind)[0])}
    elif get_origin(kind) in (list, tuple):
        number = "+" if get_origin(kind) is list else len(get_args(kind))
        options |= {"nargs": number, "type": get_args(kind)[0], "metavar": field.name.upper()}
    else:
        options |= {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
    section.add_argument(f"--{field.name}", **options)
    return f"--{field.name}"


def _check_range(field: dataclasses.Field, value) -> None:
    limits = field.metadata["limits"].items()
    for number in value if isinstance(value, list) else [value]:
        if type(number) not in LARGEST:
            continue
        largest = LARGEST[type(number)]
        within = all(LIMITS[name][0](number, n) for name, n in limits)
        if not (abs(number) <= largest and within):  # a NaN is not below anything
            wanted = [f"{LIMITS[name][1]} {n:g}" for name, n in limits] or [f"up to {largest:g}"]
            shown = f"--{field.name} {str(number)[:30]}"
            raise UserError(f"{shown} — give a finite number {' and '.join(wanted)}")


def identity(args, inputs: dict) -> dict:
    """What decides the result of a run, for lib/launch.claim_output: all arguments but those of the
    group "runtime" and output_dir, and `inputs`, the fingerprints of what the run reads."""
    arguments, group = {}, None
    for field in dataclasses.fields(args):
        group = field.metadata["group"] or group
        if group != "runtime" and field.name != "output_dir":
            arguments[field.name] = getattr(args, field.name)
    return {"arguments": arguments, "inputs": inputs}
