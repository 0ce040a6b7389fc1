"""`peft-lntune inspect`: the contents of an adapter folder, without loading a model."""

import click

from peft_lntune.cli.group import command as make
from peft_lntune.cli.options import json_option

__all__ = ["command"]


@make("inspect", "What is in an adapter folder, without loading a model.")
@click.argument("adapter")
@json_option
def command(adapter: str, as_json: bool) -> None:
    """Report what is in the folder ADAPTER: kind and parts, entries and their places, bytes, and how its mask was made.

    No model is loaded. If the weights do not match the config, the report ends with an error.

    \b
    Example:
      peft-lntune inspect ./my-adapter
    """
    from peft_lntune.cli.inspect import inspect_adapter
    from peft_lntune.cli.printing import print_result

    report = inspect_adapter(adapter)
    print_result(as_json, report.to_data(), report)
    if report.problem:
        raise click.ClickException(report.problem)
