"""Checks and measures kvplug on a machine with a GPU: ``python -m kvplug_lab.gpu_check``.

Five parts, each bounded in time, none stopped by another's failure: ``kernels`` runs the kernel
tests natively, ``exact`` compares engines with oracles and with stock, ``policies`` serves under
every policy with CUDA graphs, ``speed`` measures deployments against stock in the same KV memory,
and ``bench`` times kernels. It needs a checkout, whose tests it runs, and vLLM; nothing is
downloaded. Modules here import neither torch nor vllm, which only the processes that they start do.
"""

# The program loads the command as it is imported; see `kvplug_lab.cli`.
import kvplug.cli  # noqa: F401
