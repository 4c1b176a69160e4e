"""How much memory a model's weights take, from its files or from its config."""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.planning.model import ELEMENT, Model, UnknownModel

FILES = ("*.safetensors", "*.bin", "*.gguf")
"""Names of files of weights; the first kind that is there counts."""


@dataclass(frozen=True)
class Weights:
    """Memory of the weights.

    Attributes:
        bytes: Bytes on all ranks together.
        source: Where the number is from, a phrase.
    """

    bytes: int
    source: str


def weights_of(model: Model) -> Weights:
    """Find or estimate the bytes of a model's weights.

    Raises:
        UnknownModel: Neither its files nor its config tell.
    """
    if model.folder is not None:
        for pattern in FILES:
            sizes = [file.stat().st_size for file in model.folder.glob(pattern)]
            if sum(sizes):
                return Weights(sum(sizes), "size of its files")
    fix = "Fix: pass --weights, e.g. --weights 16GB."
    if model.raw.get("quantization_config"):
        raise UnknownModel(f"{model.name}: its weights are quantized and are not here. {fix}")
    try:
        count = parameters(model)
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnknownModel(
            f"{model.name}: its weights cannot be counted ({cause}). {fix}"
        ) from error
    size = count * ELEMENT[model.dtype]
    return Weights(size, f"{count:,} parameters of its config, in {model.dtype}")


def parameters(model: Model) -> int:
    """Count the parameters of the model that a config describes, without making them.

    Raises:
        Exception: transformers is not installed, or cannot build the model.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    raw = {k: v for k, v in model.raw.items() if k not in ("auto_map", "quantization_config")}
    config = CONFIG_MAPPING[raw["model_type"]](**raw)
    with torch.device("meta"):
        try:
            made = AutoModelForCausalLM.from_config(config)
        except ValueError:
            made = AutoModelForImageTextToText.from_config(config)
    made.tie_weights()
    return sum(p.numel() for p in made.parameters())
