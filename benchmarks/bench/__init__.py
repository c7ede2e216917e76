"""Benchmarks. Each op has one module with its workload table, references and peers (`interpolate`, `conv_transpose2d`),
in the terms of `workload`; the correctness gate (`gate`), the clocks (`timing`), the ceilings (`machine`, `mover`), the
harness, the report and the command line serve them all."""
