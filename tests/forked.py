"""Processes that begin with torch and torchtitan imported: forked from a server that does nothing but import."""

import multiprocessing
from multiprocessing.process import BaseProcess

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["zoo.train.titan"])


def start(function, *args) -> BaseProcess:
    """Run a function of an importable module in a process of its own."""
    process = _context.Process(target=function, args=args, daemon=True)
    process.start()
    return process
