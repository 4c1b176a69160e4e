"""Engines for one test session: a small random model, made once, and trials that are not repeated.

`kvplug.testing` finds it by entry point and hands it to tests as the fixture ``engine_trial``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvplug_lab.engine.trial import TrialRequest, TrialResult, TrialSpec, run_fresh
from kvplug_lab.models import tiny_llama

ENGINE = {"dtype": "float32", "block_size": 32, "max_model_len": 1024}
"""Arguments of ``vllm.LLM`` unless a test gives others."""


class EngineSession:
    """Runs requests on engines, each in a process of its own.

    Args:
        folder: For the model and the engines' logs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._model: Path | None = None
        self._known: dict[str, TrialResult] = {}

    @property
    def model(self) -> Path:
        """A random Llama of two layers, written at first use."""
        if self._model is None:
            self._model = tiny_llama(self.folder / "model", dtype="float32")
        return self._model

    def __call__(
        self,
        section: Mapping[str, Any] | None,
        requests: Sequence[Sequence[int] | TrialRequest],
        *,
        max_tokens: int = 8,
        one_by_one: bool = False,
        model: Path | None = None,
        **engine: Any,
    ) -> TrialResult:
        """Serve requests, or return what the same call gave before.

        Args:
            section: The ``kvplug`` section, or None for stock vLLM.
            requests: Prompts of token ids below 300, or requests with more to say.
            max_tokens: Tokens to generate, for prompts.
            one_by_one: Whether each prompt waits for the one before it to be answered.
            model: Directory of another model.
            **engine: Arguments of ``vllm.LLM``.

        Raises:
            TrialFailed: The engine failed, or refused the deployment; the message has its log.
        """
        asked = [
            request
            if isinstance(request, TrialRequest)
            else TrialRequest(list(request), max_tokens, wave=i if one_by_one else 0)
            for i, request in enumerate(requests)
        ]
        plain = None if section is None else dict(section)
        spec = TrialSpec(str(model or self.model), asked, ENGINE | engine, plain)
        key = spec.to_json()
        if key not in self._known:
            log = self.folder / f"engine-{len(self._known)}.log"
            self._known[key] = run_fresh(spec, log=log)
        return self._known[key]
