"""Errors on the command line: those that the user can fix give one message and exit code 1, without a traceback."""

from typing import Any

import click
from safetensors import SafetensorError

__all__ = ["Commands"]

# Ours and PEFT's are ValueErrors; transformers raises OSError if a model is missing; ImportError names an extra.
EXPECTED = (ValueError, OSError, ImportError, SafetensorError)


class Commands(click.Group):
    """A group that lists its commands in the order in which they were added, and turns errors into messages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names of the commands in the order in which they were added."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. Errors that the user can fix become a `click.ClickException`."""
        try:
            return super().invoke(ctx)
        except EXPECTED as error:
            # A closed pipe (`| head`) is click's to handle.
            if ctx.params.get("traceback") or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(str(error) or type(error).__name__) from error
