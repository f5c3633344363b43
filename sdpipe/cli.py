"""The command line. Everything heavy is imported inside the command that needs it.

Exit 0: all went well. 1: something failed, and the rest was still done. 2: called wrong.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from sdpipe.commands.benchmarking import benchmark
from sdpipe.commands.evaluating import evaluate
from sdpipe.commands.model import doctor, inspect, predict
from sdpipe.commands.pruning import prune
from sdpipe.commands.runs import ensemble, recipe, report_command, track
from sdpipe.commands.serve import triton
from sdpipe.errors import errors_on_one_line
from sdpipe.version import __version__


@contextmanager
def _ending_with_the_reader() -> Iterator[None]:
    """`| head` closes the pipe when it has had enough, which is no error to talk about."""
    try:
        yield
    except BrokenPipeError:
        # What is still buffered would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


class _Commands(click.Group):
    """Errors are one line wherever they arise: in what a command reads of its options, does or prints."""

    def make_context(self, *arguments: Any, **keywords: Any) -> click.Context:
        with errors_on_one_line(), _ending_with_the_reader():
            return super().make_context(*arguments, **keywords)

    def invoke(self, ctx: click.Context) -> Any:
        with errors_on_one_line(), _ending_with_the_reader():
            return super().invoke(ctx)


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="sdpipe")
def main() -> None:
    """Classify pictures with a deployed stochastic-depth network."""


_OF_A_FILE = (predict, evaluate, inspect, benchmark, triton)
_OF_THE_PROJECT = (prune, doctor, track, recipe, report_command, ensemble)
for command in (*_OF_A_FILE, *_OF_THE_PROJECT):
    main.add_command(command)
