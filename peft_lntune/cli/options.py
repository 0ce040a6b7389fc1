"""Arguments, options and kinds of values that commands share. Their values are checked before torch is imported."""

import codecs
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from peft_lntune.storage.atomic import is_special
from peft_lntune.storage.folders import check_new_folder

__all__ = [
    "Layers",
    "OutFile",
    "adapter_to_folder",
    "check_encoding",
    "check_out",
    "csv_option",
    "is_given",
    "json_option",
    "layers_option",
    "plot_option",
    "refuse_without",
    "shared_option",
]


class OutFile(click.ParamType):
    """A file to write, in a folder that exists.

    Args:
        endings: endings that the file may have; none: any.
        needs: a package that writes the file, and what to install.
    """

    name = "file"

    def __init__(self, *endings: str, needs: tuple[str, str] | None = None) -> None:
        self.endings = endings
        self.needs = needs

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Check the path.

        Args:
            value: the path.
            param: the option, for errors.
            ctx: the context of the command, for errors.

        Returns:
            The path.

        Raises:
            click.BadParameter: the path is a folder, a device or a pipe, lies in a folder that does not exist or cannot
                be written to, or has an ending that the command cannot write.
            click.ClickException: the package that writes the file is not installed.
        """
        path = Path(value)
        if path.is_dir():
            self.fail(f"{value} is a folder. Give the path of a file.", param, ctx)
        if is_special(path):
            self.fail(f"{value} is a device or a pipe. Give the path of a file.", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"{value}: the folder {path.parent} does not exist. Make it first.", param, ctx)
        if not os.access(path.parent, os.W_OK):
            self.fail(f"{value}: the folder {path.parent} cannot be written to.", param, ctx)
        if self.endings and path.suffix.lower() not in self.endings:
            self.fail(f"{value} should end in {' or '.join(self.endings)}.", param, ctx)
        if self.needs is not None and importlib.util.find_spec(self.needs[0]) is None:
            raise click.ClickException(f"{value} cannot be written: {self.needs[1]}")
        return path


class Layers(click.ParamType):
    """Layer indices such as `0,2,4-6`."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Parse the value of the option.

        Args:
            value: the text, or a list of indices, which is returned unchanged.
            param: the option, for errors.
            ctx: the context of the command, for errors.

        Returns:
            The indices.

        Raises:
            click.BadParameter: the text is not a list of layers.
        """
        if isinstance(value, list):
            return value
        found: list[int] = []
        for piece in value.split(","):
            ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
            if ends is None or int(ends[1]) > int(ends[2] or ends[1]):
                self.fail(f"{value!r} is not a list of layers, such as 0,2,4-6.", param, ctx)
            found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
        return found


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text, with every digit.")
csv_option = click.option(
    "--csv", "csv_file", type=OutFile(), help="Write the table to this CSV file, with every digit."
)
plot_option = click.option(
    "--plot",
    type=OutFile(".png", ".pdf", ".svg", needs=("matplotlib", "plots need matplotlib: pip install 'matplotlib>=3.9'")),
    help="Draw the table into this file: PNG, PDF or SVG, by the ending.",
)
layers_option = click.option(
    "--layers/--no-layers", default=True, help="One row per layer, or one row for all layers of a component."
)
shared_option = click.option(
    "--shared", is_flag=True, help="Compare only tensors that both have in the same shape; leave out other heads."
)


def adapter_to_folder(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the arguments `ADAPTER`, `OUT` and `--model` to a command that makes a folder from a saved adapter.

    Such a command has `check=check_out`, so that OUT is checked before anything is read.

    Args:
        command: the function of the command.

    Returns:
        The function with these arguments.
    """
    model = click.option(
        "--model", help="Folder of the base model.  [default: the one that the adapter's config names]"
    )
    out = click.argument("out", type=click.Path(path_type=Path))
    return click.argument("adapter")(out(model(command)))


def check_encoding(encoding: str) -> None:
    """Refuse an encoding that Python does not know.

    Args:
        encoding: the option --encoding.

    Raises:
        click.UsageError: it is not known.
    """
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise click.UsageError(f"--encoding {encoding} is not known. Give one such as utf-8 or latin-1.") from None


def check_out(out: Path, **_: Any) -> None:
    """Refuse a folder that cannot be made.

    Args:
        out: the argument OUT.
        **_: other options of the command.

    Raises:
        ConfigError: it exists and is not an empty folder, or cannot be made.
    """
    check_new_folder(out)


def is_given(name: str) -> bool:
    """Whether the user gave an option of the running command.

    Args:
        name: name of its parameter.

    Returns:
        False if the value is the default.
    """
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def refuse_without(needed: str, *names: str) -> None:
    """Refuse options that have no effect because another one was not given.

    Args:
        needed: the other option, as written, such as `--plot`.
        *names: names of parameters.

    Raises:
        click.UsageError: one of them was given.
    """
    for name in names:
        if is_given(name):
            option = next(p for p in click.get_current_context().command.params if p.name == name)
            raise click.UsageError(f"{option.opts[0]} has no effect without {needed}.")
