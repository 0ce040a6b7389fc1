"""The PEFT tuner and its verbs."""
