"""The same questions on stock vLLM and on deployments of kvplug, in the same KV memory."""
