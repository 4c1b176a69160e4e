"""The compiler that Triton's discovery of backends asks for; nothing is ever compiled."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import BaseBackend


class InterpretedBackend(BaseBackend):
    """Compiles nothing."""

    binary_ext = "none"

    @staticmethod
    def supports_target(target: Any) -> bool:
        return getattr(target, "backend", "") == "cpu"

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: Any) -> Any:
        raise NotImplementedError

    def add_stages(self, stages: Any, options: Any, *args: Any) -> None:
        raise NotImplementedError

    def load_dialects(self, context: Any) -> None:
        return None

    def get_module_map(self) -> dict[str, Any]:
        return {}

    def get_codegen_implementation(self, *args: Any) -> dict[str, Any]:
        return {}

    def pack_metadata(self, metadata: Any) -> Any:
        return metadata
