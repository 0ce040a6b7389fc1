"""Quick tests of the benchmarks: what they would write, on a tiny model."""
