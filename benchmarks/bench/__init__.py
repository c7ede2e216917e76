"""Benchmarks. Each op has one module with its workload table, references and peers (`interpolate`; `conv_transpose2d`,
`upsample_conv2d` and `conv2d`, over `layer`), in the terms of `workload`; `decoders` is the table of real models.
Whole models are in `models`: `nets` are decoders of torch's modules, `twins` makes a bundled model's equal in torch.

The correctness gate (`gate`), the clocks (`timing`), the ceilings (`machine`, `mover`), the harness, the report, the
comparison with an earlier run (`compare`), the page (`page`) and the command line serve them all.
"""
