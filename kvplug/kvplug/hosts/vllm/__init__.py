"""The vLLM host: the only code of kvplug that imports vllm, and only once an engine starts."""
