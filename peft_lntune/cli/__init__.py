"""The command line, `peft-lntune`. `commands` has one file per command, which reads options and prints; the functions
that do the work are beside it and can be called from Python.

From Python: `peft_lntune.cli.inspect.inspect_adapter`, `merge.merge_adapter`, `export.export_peft_ln_tuning`,
`export.export_lora`, `fisher.fisher_masks`, `plan.plan_model`, `change.change_between`, `doctor.examine_checkpoints`,
`magnitude.magnitude_of`, and those of `peft_lntune.analysis`.

What this module imports answers `--help`, so it does not import torch: commands import their work when they run.
"""

import click

from peft_lntune.cli.commands import COMMANDS
from peft_lntune.cli.group import Commands
from peft_lntune.version import __version__

__all__ = ["main"]


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 success; 1 an error, with one message; 2 wrong usage.",
)
@click.version_option(__version__, prog_name="peft-lntune")
@click.option("--traceback", is_flag=True, help="Show the traceback of an error.")
def main(traceback: bool) -> None:
    """Tune the norms of a model, and inspect what tuning did.

    Models and adapters are folders on this machine, or names on the Hugging Face Hub. An output appears whole or not at
    all.
    """


for _command in COMMANDS:
    main.add_command(_command)
