"""Triton kernels. Importing this package imports neither Triton nor touches a GPU; the first call does."""

from .interpolate import interpolate, refuses

__all__ = ["interpolate", "refuses"]
