"""The registered operators, one file each: schema, checks, fake, autograd, kernels by backend, reference in torch."""
