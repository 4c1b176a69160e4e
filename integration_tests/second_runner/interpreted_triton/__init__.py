"""A Triton backend in name only.

With ``TRITON_INTERPRET=1``, vLLM's CPU build then finds that Triton can run, and so its second
model runner and its Triton attention backend run on a CPU, kernels interpreted.
"""
