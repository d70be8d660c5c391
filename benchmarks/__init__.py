"""Time, memory and error of windkern beside its peers. See benchmarks/README.md."""
