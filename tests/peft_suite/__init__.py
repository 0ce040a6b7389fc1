"""PEFT's own generic tests, run against this package's configs.

`fetch` gets the tests that belong to the installed PEFT, `tiny_models` stands in for the Hub, `plugin` and `rows` hand
our config to each generic test in place of PEFT's, and `run` does one suite in a process of its own.
"""
