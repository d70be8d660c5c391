"""Measure time, memory and error of windkern and its peers. See benchmarks/README.md."""
