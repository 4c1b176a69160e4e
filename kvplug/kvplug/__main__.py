"""``python -m kvplug``: the command line, without its console script."""

from kvplug.cli import app

app(prog_name="kvplug")
