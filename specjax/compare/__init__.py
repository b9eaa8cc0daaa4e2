"""Compares methods on the user's data, each at its own best rate and in a process of its own."""

from specjax.compare.job import compare

__all__ = ["compare"]
