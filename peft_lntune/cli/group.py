"""Commands: errors that the user can fix give one message and exit code 1, without a traceback."""

from collections.abc import Callable
from typing import Any

import click

from peft_lntune.cli.start import quiet

__all__ = ["Command", "Commands", "command"]


class Command(click.Command):
    """A command that checks its options before it imports torch.

    Args:
        *args: as for `click.Command`.
        check: called with the options before anything is imported or read; it raises what is wrong with them.
        **kwargs: as for `click.Command`.
    """

    def __init__(self, *args: Any, check: Callable[..., None] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check = check

    def invoke(self, ctx: click.Context) -> Any:
        """Check the options, import the package, and run the command."""
        if self.check is not None:
            ctx.invoke(self.check, **ctx.params)  # usage errors get the line with the usage
        with quiet():
            return super().invoke(ctx)


def command(
    name: str, short_help: str, check: Callable[..., None] | None = None
) -> Callable[[Callable[..., Any]], Command]:
    """Make a function a command of `peft-lntune`.

    Args:
        name: name of the command.
        short_help: what it does, in the list of all commands.
        check: checks options that do not go together or cannot be right. Called with all options, before the package is
            imported; it raises a `click.UsageError` or an error of this package.

    Returns:
        A decorator.
    """
    return click.command(name, cls=Command, short_help=short_help, check=check)


class Commands(click.Group):
    """A group that lists its commands in the order in which they were added, and turns errors into messages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names of the commands in the order in which they were added."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. Errors that the user can fix become a `click.ClickException`."""
        # Ours and PEFT's are ValueErrors. transformers raises OSError for a missing model; ImportError names an extra.
        expected: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)
        try:
            return super().invoke(ctx)
        except Exception as error:
            damaged = type(error).__name__ == "SafetensorError"  # importing it would slow down --help
            # A closed pipe (`| head`) is click's to handle.
            if ctx.params.get("traceback") or isinstance(error, BrokenPipeError):
                raise
            if not (damaged or isinstance(error, expected)):
                raise
            raise click.ClickException(str(error) or type(error).__name__) from error
