"""Commands of the laboratory, one file each."""

# The program loads these commands as it is imported. Where a command is imported first, the
# program must come before it, or it would find the command half made and leave it out.
import kvplug.cli  # noqa: F401
