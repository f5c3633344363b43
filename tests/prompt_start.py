"""Imported first: nothing is looked through for garbage until `done()`, as in a stage (pipeline/__init__.py).

A process of the tests then starts in three quarters of the time.
"""

import gc

gc.disable()


def done() -> None:
    """All is imported."""
    gc.freeze()
    gc.enable()
