"""One command line for every program: a dataclass of arguments becomes options, help and a YAML file."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spatialalign.errors import SpatialAlignError

T = TypeVar("T")


_OPTIONS_OF = "options of"


def options_of(settings: type) -> Any:
    """A dataclass field that collects those options of another dataclass that were given, as a dict.

    Every field of ``settings`` becomes an option of the program, without a default: what was not given is not in the
    dict, so that it can come from a preset, and a null that was given is.
    """
    return dataclasses.field(default_factory=dict, metadata={_OPTIONS_OF: settings})


def parse(arguments: type[T], argv: Sequence[str] | None = None, verb: str = "") -> T:
    """Parse a command line into the dataclass ``arguments``.

    Every field becomes an option of the same name, documented by the string below the field; ``--config file.yaml``
    sets any of them, and options after it win. Wrong options end the program with exit status 2; for a misspelt one, on
    the command line or in the file, the nearest name is suggested. ``verb`` is the sub-command, for a program that has
    some.
    """
    from docstring_parser import parse_from_object
    from jsonargparse import ArgumentParser

    # Added one by one: jsonargparse's own way also runs the module's TYPE_CHECKING imports, heavy libraries and all.
    parser = ArgumentParser(
        prog=_prog(arguments, verb), description=_description(parse_from_object(arguments)), exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    names = _add_options(parser, arguments, defaults=True)
    collected = {
        field.name: field.metadata[_OPTIONS_OF] for field in _fields(arguments) if _OPTIONS_OF in field.metadata
    }
    groups = {name: _add_options(parser, settings, defaults=False) for name, settings in collected.items()}
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        values = parser.parse_args(given)
    except argparse.ArgumentError as error:
        parser.exit_on_error = True
        known = ["config", *names, *(name for group in groups.values() for name in group)]
        parser.error(_suggestions(given, known) or str(error))
    found = {name: values[name] for name in names}
    for field, group in groups.items():
        found[field] = {name: values[name] for name in group if name in values}
    return arguments(**found)


def _fields(arguments: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(arguments) if field.init]


def _add_options(parser: Any, arguments: type, defaults: bool) -> list[str]:
    """Add an option per field; returns their names."""
    from docstring_parser import parse_from_object

    help_of = {param.arg_name: param.description or "" for param in parse_from_object(arguments).params}
    hints = typing.get_type_hints(arguments)
    names = []
    for field in _fields(arguments):
        if _OPTIONS_OF in field.metadata:
            continue
        options: dict[str, Any] = {"type": hints[field.name], "help": help_of.get(field.name, "")}
        if not defaults:
            options["default"] = argparse.SUPPRESS
        elif field.default is not dataclasses.MISSING:
            options["default"] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            options["default"] = field.default_factory()
        else:
            options["required"] = True
        parser.add_argument(f"--{field.name}", **options)
        names.append(field.name)
    return names


def _suggestions(argv: Sequence[str], known: Sequence[str]) -> str:
    """A line for the options on the command line and in its YAML files that do not exist; empty when all do."""
    wrong = [("", word[2:].split("=")[0]) for word in argv if word.startswith("--") and word != "--"]
    for path in _config_files(argv):
        wrong += [(f"{path}: ", str(key)) for key in _keys(path)]
    accepted = {*known, "help", "print_config"}
    parts = []
    for where, name in wrong:
        if name not in accepted:
            near = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.5)
            parts.append(f"{where}there is no option {name!r}" + (f"; the nearest is {near[0]!r}" if near else ""))
    return ". ".join(parts)


def _config_files(argv: Sequence[str]) -> list[str]:
    after = [following for word, following in zip(argv, argv[1:], strict=False) if word == "--config"]
    return after + [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]


def _keys(path: str) -> Iterable[Any]:
    """The keys of a YAML file; none when it cannot be read, which the parser reports better."""
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    return value if isinstance(value, dict) else []


def command(arguments: type[T], run: Callable[[T], object], argv: Sequence[str] | None = None, verb: str = "") -> None:
    """The ``main`` of a program: parse, run, and turn an error a user can act on into one line and exit status 2."""
    try:
        run(parse(arguments, argv, verb))
    except SpatialAlignError as error:
        print(f"{_prog(arguments, verb)}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        raise SystemExit(130) from None


def subcommands(
    verbs: Mapping[str, tuple[type, Callable[[Any], object]]], description: str, argv: Sequence[str] | None = None
) -> None:
    """The ``main`` of a program with sub-commands, each a dataclass of arguments and the function that takes it."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in verbs:
        arguments, run = verbs[given[0]]
        command(arguments, run, given[1:], given[0])
        return
    prog = _prog(next(iter(verbs.values()))[0])
    parser = argparse.ArgumentParser(prog, description=description, formatter_class=argparse.RawTextHelpFormatter)
    lines = [f"{name}: {(arguments.__doc__ or '').splitlines()[0]}" for name, (arguments, _) in verbs.items()]
    parser.add_argument("command", help="\n".join([*lines, f"options of each: {prog} <command> --help"]))
    parser.parse_args([word for word in given[:1] if word in ("-h", "--help")] or given[:1])
    near = difflib.get_close_matches(given[0], list(verbs), n=1, cutoff=0.5)
    hint = f"; the nearest is {near[0]!r}" if near else f"; expected one of {', '.join(verbs)}"
    parser.error(f"there is no command {given[0]!r}{hint}")


def _prog(arguments: type, verb: str = "") -> str:
    """``python -m training.dpo`` for the arguments of that program, however it was started."""
    module = arguments.__module__
    spec = getattr(sys.modules[module], "__spec__", None)
    name = f"python -m {spec.name if module == '__main__' and spec is not None else module}"
    return f"{name} {verb}" if verb else name


def _description(documented: Any) -> str:
    parts = [documented.short_description, documented.long_description]
    return "\n".join(part for part in parts if part)
