"""The command line, `peft-lntune`: one command a file, each beside the function that does its work.

Commands only read arguments and print. From Python, call the functions: `peft_lntune.cli.inspect.inspect_adapter`,
`merge.merge_adapter`, `export.export_peft_ln_tuning`, `fisher.fisher_masks`, `plan.plan_model`,
`change.change_between`, `magnitude.magnitude_of`, and those of `peft_lntune.analysis`.
"""

import click

from peft_lntune.cli import change, closeness, export, fisher, inspect, magnitude, merge, plan
from peft_lntune.cli.group import Commands
from peft_lntune.version import __version__

__all__ = ["main"]


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 all went well; 1 an error, said in one message; 2 wrong usage.",
)
@click.version_option(__version__, prog_name="peft-lntune")
@click.option("--traceback", is_flag=True, help="Show where in the code an error comes from.")
def main(traceback: bool) -> None:
    """Tune the norms of a model, and look at what tuning did.

    Models and adapters are folders on this machine, or names on the Hugging Face Hub. Nothing is written in halves: an
    output appears whole or not at all.
    """


for _file in (plan, fisher, change, closeness, magnitude, inspect, merge, export):
    main.add_command(_file.command)
