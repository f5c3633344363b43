"""`python -m sdpipe`: the command line, where its script is not on PATH."""

from sdpipe.cli import main

if __name__ == "__main__":
    main(prog_name="python -m sdpipe")
