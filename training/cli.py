"""One command line for every program: a dataclass of arguments becomes options, help and a YAML file."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from spatialalign.errors import SpatialAlignError

T = TypeVar("T")


def parse(arguments: type[T], argv: Sequence[str] | None = None) -> T:
    """Parse a command line into the dataclass ``arguments``.

    Every field becomes an option of the same name, documented by the string below the field; ``--config file.yaml``
    sets any of them, and options after it win. Wrong options end the program with exit status 2.
    """
    from docstring_parser import parse_from_object
    from jsonargparse import ArgumentParser

    documented = parse_from_object(arguments)
    help_of = {param.arg_name: param.description or "" for param in documented.params}
    # Added one by one: jsonargparse's own way also runs the module's TYPE_CHECKING imports, heavy libraries and all.
    parser = ArgumentParser(prog=_prog(arguments), description=_description(documented))
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    hints = typing.get_type_hints(arguments)
    fields = [field for field in dataclasses.fields(arguments) if field.init]  # type: ignore[arg-type]
    for field in fields:
        options: dict[str, Any] = {"type": hints[field.name], "help": help_of.get(field.name, "")}
        if field.default is not dataclasses.MISSING:
            options["default"] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            options["default"] = field.default_factory()
        else:
            options["required"] = True
        parser.add_argument(f"--{field.name}", **options)
    values = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    return arguments(**{field.name: values[field.name] for field in fields})


def command(arguments: type[T], run: Callable[[T], object], argv: Sequence[str] | None = None) -> None:
    """The ``main`` of a program: parse, run, and turn an error a user can act on into one line and exit status 2."""
    try:
        run(parse(arguments, argv))
    except SpatialAlignError as error:
        print(f"{_prog(arguments)}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        raise SystemExit(130) from None


def _prog(arguments: type) -> str:
    """``python -m training.dpo`` for the arguments of that program, however it was started."""
    module = arguments.__module__
    spec = getattr(sys.modules[module], "__spec__", None)
    return f"python -m {spec.name if module == '__main__' and spec is not None else module}"


def _description(documented: Any) -> str:
    parts = [documented.short_description, documented.long_description]
    return "\n".join(part for part in parts if part)
