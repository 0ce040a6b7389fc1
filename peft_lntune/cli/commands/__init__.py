"""The commands, one file each: options, help, and what is printed. No file here imports torch before a command runs."""

from peft_lntune.cli.commands import change, closeness, doctor, export, fisher, inspect, magnitude, merge, plan

__all__ = ["COMMANDS"]

COMMANDS = tuple(file.command for file in (plan, fisher, change, closeness, magnitude, doctor, inspect, merge, export))
"""The commands, in the order of `peft-lntune --help`."""
