"""What runs on a model that takes images: prefix-cache orders, and tiers that tell them apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_failing_policy import environment
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
)
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from kvplug import configs
from kvplug.errors import DeploymentError
from kvplug.hosts.vllm.admission import deployment_of
from kvplug.hosts.vllm.flags import read_config
from kvplug.hosts.vllm.identity import chunk_identity
from kvplug.hosts.vllm.view import engine_view
from kvplug_lab.engine.trial import TrialRequest, TrialResult, connector_flags

SIDE, PATCH, SHRINK = 112, 14, 2
IMAGE_TOKENS = (SIDE // PATCH // SHRINK) ** 2
TEXT = "What is here? <image> " + "Say it again and again, at length. " * 4
GENERATED = 8
BLOCK = 32


@pytest.fixture(scope="module")
def idefics(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Idefics 3: images become 16 tokens of a small Llama."""
    directory = tmp_path_factory.mktemp("idefics")
    words = AutoTokenizer.from_pretrained(tiny)
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    words.add_special_tokens({"additional_special_tokens": special})
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    config = Idefics3Config(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        text_config=text.to_dict(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=SHRINK,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() >= 2:
                # Large enough to set images and tokens apart.
                scale = 2 if "lm_head" in name else 1
                weight.normal_(0, scale * weight[0].numel() ** -0.5)
    model.save_pretrained(directory)
    size = {"longest_edge": SIDE}
    images = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    Idefics3Processor(images, words, image_seq_len=IMAGE_TOKENS).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of images that differ."""
    folder = tmp_path_factory.mktemp("images")
    files = []
    for seed in range(7):
        noise = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        files.append(str(folder / f"{seed}.png"))
        Image.fromarray(noise).save(files[-1])
    return files


def computed(directory: Path, image: str) -> list[int]:
    """What transformers answers, over the whole text for every token."""
    processor = Idefics3Processor.from_pretrained(directory)
    model = Idefics3ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    inputs = processor(text=TEXT, images=[Image.open(image)], return_tensors="pt")
    answer = model.generate(
        **inputs, max_new_tokens=GENERATED, do_sample=False, eos_token_id=None, use_cache=False
    )
    return [int(token) for token in answer[0, inputs["input_ids"].shape[1] :]]


def test_the_preset_loads_what_belongs_to_the_image(
    run: Callable[..., TrialResult], idefics: Path, images: list[str]
) -> None:
    """The pool holds two prompts: that of an image comes back from host memory, and never that of
    another image under the same words."""
    section: dict[str, Any] = dict(
        read_config(configs.shipped("presets/multimodal")).deployment.section
    )
    section |= {"tiers": [{"host": {"size": "64MiB"}}], "lifecycle": "loads"}
    asked = [TrialRequest(TEXT, GENERATED, wave, image=one) for wave, one in enumerate(images)]
    again = [replace(asked[i], wave=len(images) + i) for i in range(2)]
    result = run(
        idefics,
        [*asked, *again],
        section,
        dtype="float32",
        block_size=BLOCK,
        max_model_len=352,
        num_gpu_blocks_override=12,
        limit_mm_per_prompt={"image": 1},
        env=environment(),
    )
    answers = [answer.token_ids for answer in result.answers]
    assert len({tuple(answer) for answer in answers}) == len(images), "images matter"
    assert answers[:2] == [computed(idefics, image) for image in images[:2]]
    assert answers[len(images) :] == answers[:2]
    whole = result.answers[0].prompt_tokens // BLOCK * BLOCK
    for answer in result.answers[len(images) :]:
        assert answer.kvplug is not None
        assert (answer.kvplug["loaded"], answer.kvplug["exact"]) == (whole, True)
    assert all(answer.kvplug is None for answer in result.answers[: len(images)])
    by_kind = {report["kind"]: report for report in result.reports}
    assert by_kind["prefix_cache"]["acted"] > 0
    assert by_kind["tiers"]["counters"]["loads"] == 2
    assert not any(report["errors"] for report in result.reports)


@pytest.mark.parametrize(
    "section",
    [
        {"sequence": {"use": "sink_window", "sink": 32, "window": 64}},
        {"format": "int8"},
        {"reuse": {"use": ["structure", "position"]}},
    ],
    ids=lambda section: next(iter(section)),
)
def test_what_the_preset_leaves_out_is_refused(idefics: Path, section: dict[str, Any]) -> None:
    config = EngineArgs(
        model=str(idefics),
        max_model_len=352,
        block_size=BLOCK,
        enforce_eager=True,
        dtype="float32",
        kv_transfer_config=KVTransferConfig(**connector_flags(section)),
    ).create_engine_config()
    with pytest.raises(DeploymentError) as refused:
        deployment_of(config)
    assert {one.problem.partition(" cannot ")[2] for one in refused.value.refusals} == {
        "run on a model with multimodal inputs."
    }


def test_how_images_are_prepared_is_a_part_of_what_chunks_are(
    idefics: Path, tmp_path: Path
) -> None:
    """vLLM's own name of an image says nothing of its processor's files."""

    def identity(model: Path, **flags: Any) -> str:
        config = EngineArgs(
            model=str(model),
            max_model_len=352,
            block_size=BLOCK,
            enforce_eager=True,
            dtype="float32",
            kv_transfer_config=KVTransferConfig(
                **connector_flags({"tiers": [{"host": {"size": "1MiB"}}]})
            ),
            **flags,
        ).create_engine_config()
        return chunk_identity(config, engine_view(config), None)

    copy = Path(shutil.copytree(idefics, tmp_path / "copy"))
    assert identity(copy) == identity(idefics)
    assert identity(copy, mm_processor_kwargs={"do_rescale": False}) != identity(idefics)
    (named,) = (
        file for file in copy.glob("*.json") if '"image_mean"' in file.read_text(encoding="utf-8")
    )
    changed = json.loads(named.read_text(encoding="utf-8"))
    changed.get("image_processor", changed)["image_mean"] = [0.25, 0.25, 0.25]
    named.write_text(json.dumps(changed), encoding="utf-8")
    assert identity(copy) != identity(idefics)
