"""Tests. A folder mirrors a room of the package (or `benchmarks`, `examples`, `processes`); what crosses rooms is here.

- `contract`: the contract table, a row for every kind of adapter, which `test_contract_table` holds on many models.
- `cases`: tiny models of many families, and norm classes; `few` keeps the quick run of a table to a family of a kind.
- `adapted`: adapters on those models: put them on, give them values, run them, look inside.
- `norm_kinds`: norms as libraries write them, and what only looks like one.
- `oracles`: slow and obviously right answers.
- `tolerance`: how far two right computations of one thing may lie apart, in roundings of a dtype.
- `other_kernels`: a plugin under which kernels round as on another machine (`pytest -p tests.other_kernels`).
- `servers/`: scripts that compare exports with other engines, each run by a target of its own in the Makefile.
- `peft_suite/`: PEFT's own generic tests, run on our configs.
"""
