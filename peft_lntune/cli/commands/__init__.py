"""The commands, one file each: options, help, and what is printed. No file here imports torch before a command runs."""

from peft_lntune.cli.commands import change, closeness, doctor, export, fisher, inspect, magnitude, merge, plan, recover

__all__ = ["COMMANDS"]

_FILES = (plan, fisher, change, closeness, magnitude, doctor, inspect, recover, merge, export)
COMMANDS = tuple(file.command for file in _FILES)
"""The commands, in the order of `peft-lntune --help`."""
