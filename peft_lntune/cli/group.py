"""How errors leave the command line: what the user can mend is one message and exit code 1, without a traceback."""

from typing import Any

import click
from safetensors import SafetensorError

__all__ = ["Commands"]

# Ours are ValueErrors, as are PEFT's; transformers raises OSError where a model is missing; ImportError names an extra.
EXPECTED = (ValueError, OSError, ImportError, SafetensorError)


class Commands(click.Group):
    """A group of commands in the order in which they were added, not that of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EXPECTED as error:
            # A closed pipe (`| head`) is click's to handle.
            if ctx.params.get("traceback") or isinstance(error, BrokenPipeError):
                raise
            raise click.ClickException(str(error) or type(error).__name__) from error
