"""Compile kernels for a GPU of compute capability 9.0 on a machine that has none.

As a program it reads one request a line, ``[import path, module, kernel, arguments, options]`` in
JSON, and answers ``[error, PTX]``.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Mapping
from typing import Any


def compile_kernel(
    kernel: Any, arguments: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> Any:
    """What Triton compiles a kernel to.

    Args:
        kernel: A function that ``triton.jit`` made, not interpreted.
        arguments: Kind of each argument, as `record_launches.Kind` describes them.
        options: Compiler options of the launch.

    Returns:
        Triton's compiled kernel: ``asm`` holds ``ttgir``, ``ptx`` and ``cubin``.

    Raises:
        AssertionError: Kernel and arguments differ in their names.
    """
    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    missing = set(kernel.arg_names) ^ set(arguments)
    assert not missing, f"{kernel.__name__} and its launch differ in {missing}"
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        kind, *of = arguments[parameter.name]
        if kind == "integer" and of[1] == "1" and not parameter.do_not_specialize:
            kind, of = "constant", [1]
        if kind == "constant":
            signature[parameter.name] = "constexpr"
            constants[(i,)] = of[0]
            continue
        star = "*" if kind == "pointer" else ""
        signature[parameter.name] = star + of[0] if of else "fp32"
        if of and of[1] in (True, "16") and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = compile_source(source, target=GPUTarget("cuda", 90, 32), options=dict(options or {}))
    assert len(made.asm["cubin"]) > 0, "empty cubin"
    return made


def main() -> None:
    for line in sys.stdin:
        path, module, name, arguments, options = json.loads(line)
        error = ptx = ""
        try:
            sys.path[:] = path
            kernel = getattr(importlib.import_module(module), name)
            ptx = compile_kernel(kernel, arguments, options).asm["ptx"]
        except Exception:
            error = traceback.format_exc()
        print(json.dumps([error, ptx]), flush=True)


if __name__ == "__main__":
    main()
