"""Benchmarks: the workload table (`cases`), the correctness gate (`gate`), the harness, the peers and the report."""
