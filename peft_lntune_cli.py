"""Starts `peft-lntune`, the command line of `peft_lntune`.

`import peft_lntune` registers with PEFT, so it imports torch, transformers and PEFT, which takes seconds. Importing any
module of the package does this first. The command line therefore starts here, outside the package: `--help` and wrong
options are answered before `peft_lntune/__init__.py` runs. `peft_lntune.cli.start.load_package` runs it later, when a
command begins its work.
"""

import importlib.util
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command that the arguments of this process name."""
    spec = importlib.util.find_spec("peft_lntune")
    if "peft_lntune" not in sys.modules and spec is not None:
        sys.modules["peft_lntune"] = importlib.util.module_from_spec(spec)
    from peft_lntune.cli import main as command_line

    command_line(prog_name="peft-lntune")


if __name__ == "__main__":
    main()
