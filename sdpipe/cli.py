"""The command line. Everything heavy is imported inside the command that needs it.

Exit 0: all went well. 1: something failed, and the rest was still done. 2: called wrong.
"""

import click

from sdpipe.commands.benchmarking import benchmark
from sdpipe.commands.model import doctor, inspect, predict
from sdpipe.commands.pruning import prune
from sdpipe.commands.runs import ensemble, recipe, report_command, track
from sdpipe.commands.serve import triton
from sdpipe.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="sdpipe")
def main() -> None:
    """Classify pictures with a deployed stochastic-depth network."""


for command in (predict, inspect, benchmark, prune, triton, doctor, track, recipe, report_command, ensemble):
    main.add_command(command)
