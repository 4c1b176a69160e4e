"""Policies inside vLLM's own offloading framework: its ``OffloadingConnector``, without kvplug's.

* `spec`: ``KVPlugOffloadingSpec`` and ``KVPlugTieringSpec``, which also run on a CPU.
* `orders`: any ``prefix_cache`` policy as the order in which chunks leave host memory.
* `tier`: any tier below host memory.
"""
