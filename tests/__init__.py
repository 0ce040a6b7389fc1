"""Tests. A folder mirrors one of the package (or `benchmarks`, `examples`, `processes`); what needs several is here.

- `contract`: the contract table, one row per kind of adapter, which `test_contract_table` checks on many models.
- `cases`: tiny models of many families, and norm classes; `few` limits the quick run to one family of each kind.
- `adapted`: adapters on those models: add them, set their values, run them, look inside.
- `figures`: the figures of the documentation, computed from the rows in `benchmarks/results`.
- `norm_kinds`: norms as libraries write them, and modules that only look like norms.
- `oracles`: slow and obviously right answers.
- `tolerance`: how far two correct computations of the same result may differ, in roundings of a dtype.
- `other_kernels`: a plugin under which kernels round as on another machine (`pytest -p tests.other_kernels`).
- `servers/`: scripts that compare exports with other engines, each run by a target of its own in the Makefile.
- `peft_suite/`: PEFT's own generic tests, run on our configs.
"""
