"""`report.html`: the results of `specjax compare` in one file that needs no network, in English or French."""

from specjax.report.page import write

__all__ = ["write"]
