"""The parts of `benchmarks/gpu.py`: models of real shapes, checks, measurements, the process they run in, the page."""
