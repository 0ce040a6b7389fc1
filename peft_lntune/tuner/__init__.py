"""The PEFT tuner, and its operations: inject, merge, combine, save, load."""
