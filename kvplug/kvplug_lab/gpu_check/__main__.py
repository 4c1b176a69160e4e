"""``python -m kvplug_lab.gpu_check``: the command where kvplug is not installed."""

import typer

from kvplug_lab.gpu_check.command import gpu_check

if __name__ == "__main__":
    typer.run(gpu_check)
