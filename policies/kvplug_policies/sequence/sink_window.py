"""Attention sinks and a recent window: a request keeps its first tokens and its latest ones.

StreamingLLM (Xiao et al., arXiv 2309.17453): softmax needs somewhere to put its mass, models learn
to put it on the first tokens, and a window that keeps those and the recent past stays stable
without end.

Differences from the paper, forced by paging or by serving:

* Whole blocks are kept: the sink is rounded up to blocks, and a query sees between ``window`` and
  ``window + block_size - 1`` of the latest tokens, itself included.
* Tokens keep the positions of the text. The paper re-indexes positions inside its cache, which
  would need keys stored before rotation; so the model's own maximum length stays the limit.
* The rule holds during prefill too, for every query by its own position, so memory stays bounded
  while a long prompt is read and the answer does not depend on how the prompt is chunked.
"""

from __future__ import annotations

from pydantic import Field, field_validator

from kvplug.contract import (
    Feature,
    LayerView,
    PolicyOptions,
    SequencePolicy,
    Window,
    layer_range,
)


class SinkWindow(SequencePolicy):
    """StreamingLLM, block granular: ``sink`` first tokens and ``window`` latest ones."""

    name = "sink_window"
    changes = "tokens beyond sink + window see only the sink and the window; frees the rest"
    supports = frozenset(
        {
            Feature.PREFIX_CACHING,
            Feature.CHUNKED_PREFILL,
            Feature.PREEMPTION,
            Feature.ASYNC_SCHEDULING,
            Feature.SPECULATIVE_DECODING,
            Feature.CUDA_GRAPHS,
            Feature.TENSOR_PARALLEL,
            Feature.PIPELINE_PARALLEL,
            Feature.DATA_PARALLEL,
            Feature.LORA,
            Feature.QUANTIZED_KV_CACHE,
            Feature.SLIDING_WINDOW_LAYERS,
        }
    )
    paper = "Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453"

    class Options(PolicyOptions):
        """Options of `SinkWindow`."""

        sink: int = Field(64, ge=0, le=1 << 20, description="tokens kept from the start")
        window: int = Field(448, ge=1, le=1 << 24, description="latest tokens kept")
        layers: dict[str, int] = Field(
            default_factory=dict,
            description="window in tokens by layer or range of layers, e.g. {'0-1': 2048}; "
            "negative layers count from the end, written alone",
        )

        @field_validator("layers", mode="before")
        @classmethod
        def _layer_keys_are_text(cls, value: object) -> object:
            if isinstance(value, dict):
                return {str(k): v for k, v in value.items()}
            return value

        @field_validator("layers")
        @classmethod
        def _ranges_parse(cls, value: dict[str, int]) -> dict[str, int]:
            for layers, window in value.items():
                layer_range(layers, None)
                if window < 1:
                    raise ValueError(f"window of layers {layers} must be at least 1 token")
            return value

    options: Options

    def window(self, layer: LayerView) -> Window:
        block = self.engine.block_size
        tokens = self.options.window
        for layers, own in self.options.layers.items():
            first, last = layer_range(layers, layer.num_layers)
            if first <= layer.index <= last:
                tokens = own
        return Window(
            sink_blocks=-(-self.options.sink // block),
            window_blocks=-(-(tokens - 1) // block),
        )
