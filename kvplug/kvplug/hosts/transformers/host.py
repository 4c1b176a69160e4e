"""Sequence and format policies on Hugging Face models: the same policy objects, no engine.

A `Host` wraps a causal language model. A `Text` is the KV cache of one prompt and its
continuation; `Host.feed` runs tokens through the model and evicts where `kvplug.hosts.pruning`
schedules an eviction. A prompt read once with no policy can be branched into many
texts, one a policy: the prompt is computed once for all of them.

Under a format each full-attention layer of a text has pages of its own, written and attended by
the format's own ``write`` and ``attend``, and a prompt is read in chunks: the tokens of a chunk see
each other as computed and earlier ones as stored, as in an engine that chunks its prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
import transformers
from torch import Tensor

from kvplug.contract import (
    EngineView,
    FormatPolicy,
    Kind,
    LayerView,
    Policy,
    Rope,
    ScoringPolicy,
    SequencePolicy,
    Window,
)
from kvplug.errors import KVPlugError
from kvplug.fingerprint import model_fingerprint
from kvplug.hosts.pruning import SETTLED_TOKENS, Eviction, EvictionPlan, Limits, choose
from kvplug.hosts.transformers.attention import Step, attached
from kvplug.hosts.transformers.cache import LayerCache, Watched
from kvplug.hosts.transformers.coded import LayerCoded

FULL, SLIDING = "full_attention", "sliding_attention"

CHUNK = 512
"""Default number of tokens of one pass of a text under a format."""


ONE_OF_BOTH = (
    "the transformers host runs a sequence policy or a format, not both on one text; the engine "
    "runs both together"
)


class UnsupportedModel(KVPlugError, ValueError):
    """A model this host cannot run policies on; the message names the reason."""


class Text:
    """The KV cache of one text, and the policy it is under.

    Made by `Host.open` and `Text.branch`.

    Attributes:
        num_tokens: Tokens computed.
        num_prompt_tokens: Tokens of the prompt.
        policy: The sequence or format policy, or None for the full cache.
        layers: The cache of each layer.
        evictions: Evictions so far: position and tokens kept after it, mean over the layers pruned.
    """

    def __init__(
        self,
        layers: list[LayerCache],
        num_prompt_tokens: int,
        policy: SequencePolicy | FormatPolicy | None,
        block_size: int,
        prunable: frozenset[int],
    ):
        self.layers = layers
        self.num_tokens = 0
        self._planned = 0
        self.num_prompt_tokens = num_prompt_tokens
        self.policy = policy
        self.evictions: list[tuple[int, float]] = []
        self._block_size = block_size
        self._prunable = prunable
        self._plans: dict[float, EvictionPlan] = {}
        self._made: dict[float, int] = {}
        self._shares: dict[int, float] = {}
        self._measured: dict[float, dict[int, list[float]]] = {}
        if isinstance(policy, ScoringPolicy):
            for index in sorted(prunable):
                self._plan(policy, layers[index].view)

    def _plan(self, policy: ScoringPolicy, layer: LayerView) -> None:
        share = policy.share(layer)
        self._shares[layer.index] = share
        if share in self._plans:
            return
        # Blocks are never shared with another text here, so none need be spared.
        limits = replace(Limits.of(policy, layer, self._block_size), protected=0)
        resize = self._resize(policy, limits) if policy.resizes else None
        self._plans[share] = EvictionPlan(limits, self.num_prompt_tokens, resize)
        self._made[share] = 0

    def _resize(self, policy: ScoringPolicy, limits: Limits) -> Callable[[int], int]:
        def blocks(before: int) -> int:
            measured, size = self._measured.get(limits.share, {}), limits.block_size
            settled = [at for at in measured if at + SETTLED_TOKENS <= self._planned]
            if not settled:
                return before
            budget = round(before * size / limits.share)
            tokens = policy.resize(measured[max(settled)], budget, self.num_tokens)
            return -(-round(tokens * limits.share) // size)

        return blocks

    @property
    def kept(self) -> float:
        """Tokens kept per KV head, mean over the layers a policy may prune."""
        return sum(self.layers[i].kept for i in self._prunable) / len(self._prunable)

    def can_branch(self, policy: SequencePolicy | FormatPolicy | None) -> bool:
        """True if the policy would have left the text as it is so far, all of it computed in one
        step."""
        if policy is None:
            return True
        if isinstance(policy, FormatPolicy):
            return bool(getattr(policy.options, "exact_chunk", True))
        if not isinstance(policy, ScoringPolicy):
            return False
        other = Text(self.layers, self.num_prompt_tokens, policy, self._block_size, self._prunable)
        return all(plan.first >= self.num_tokens for plan in other._plans.values())

    def branch(self, policy: SequencePolicy | FormatPolicy | None) -> Text:
        """Make a copy of the text under a policy, pruned now if an eviction is due.

        Args:
            policy: A policy that evicts no earlier than here; None for the full cache. Under a
                format everything so far is stored as if it had been computed in one step; a text
                under a format branches into that format only.

        Raises:
            KVPlugError: This text was pruned or is under another policy already, does not record
                what the policy needs, or the policy would have acted before.
        """
        if isinstance(self.policy, FormatPolicy) and policy is self.policy:
            return self._coded([_copied(layer) for layer in self.layers], policy)
        if self.policy is not None and policy is not None:
            kinds = {isinstance(p, FormatPolicy) for p in (self.policy, policy)}
            if len(kinds) == 2:
                raise KVPlugError(ONE_OF_BOTH)
        if self.policy is not None:
            raise KVPlugError("only a text without a policy can be branched")
        if isinstance(policy, FormatPolicy):
            if not self.can_branch(policy):
                raise KVPlugError(
                    f"{policy.name} reads its own tokens back: open a text with it, or set "
                    "exact_chunk: true"
                )
            return self._coded([self._encoded(layer, policy) for layer in self.layers], policy)
        needs = watched_by(policy)
        for index in self._prunable:
            if not self.layers[index].watched.covers(needs):
                raise KVPlugError(
                    f"the prompt was read recording {self.layers[index].watched}, "
                    f"{name_of(policy)} needs {needs}: open it with watched={needs}"
                )
        if not self.can_branch(policy):
            raise KVPlugError(
                f"{name_of(policy)} acts before token {self.num_tokens}: open a text with it"
            )
        layers = [
            layer.fork(needs if layer.view.index in self._prunable else Watched())
            for layer in self.layers
        ]
        other = Text(layers, self.num_prompt_tokens, policy, self._block_size, self._prunable)
        other.num_tokens = self.num_tokens
        other._stop(self.num_tokens)
        other._act()
        return other

    def _encoded(self, layer: LayerCache, policy: FormatPolicy) -> LayerCache:
        """A layer's tokens under a format."""
        if layer.view.index not in self._prunable:
            return layer.fork(Watched())
        keys, values = layer.keys, layer.values
        coded = LayerCoded(layer.view, layer.scale, policy, self._block_size, keys)
        coded.softcap = layer.softcap
        if layer.kept:
            coded.append(keys, values, layer.positions[0, 0])
            coded.keep_recent(keys, values)
        return coded

    def _coded(self, layers: list[LayerCache], policy: FormatPolicy) -> Text:
        other = Text(layers, self.num_prompt_tokens, policy, self._block_size, self._prunable)
        other.num_tokens = self.num_tokens
        return other

    def _stop(self, target: int) -> int:
        """Find the position of the next eviction up to ``target``, or ``target``."""
        for at in range(self.num_tokens, target + 1):
            for plan in self._plans.values():
                self._planned = at
                plan.until(at)
            if any(len(plan.evictions) > self._made[share] for share, plan in self._plans.items()):
                return at
        return target

    def _act(self) -> None:
        """Evict what is due to be evicted here."""
        if isinstance(self.policy, ScoringPolicy):
            self._evict(self.policy)
        elif isinstance(self.policy, SequencePolicy):
            self._evict_blocks()

    def _evict(self, policy: ScoringPolicy) -> None:
        due: dict[float, Eviction] = {}
        for share, plan in self._plans.items():
            if len(plan.evictions) > self._made[share]:
                due[share] = plan.evictions[-1]
                self._made[share] = len(plan.evictions)
        if not due:
            return
        needs = watched_by(policy)
        measured: dict[float, list[Tensor]] = {}
        left = []
        for index, share in self._shares.items():
            if share not in due:
                continue
            cut, layer = due[share], self.layers[index]
            view = layer.view_for(needs, self.num_tokens, self.num_prompt_tokens)
            candidates = layer.kept - (cut.at - cut.end * self._block_size)
            count = min(cut.blocks * self._block_size, candidates)
            keep, scores = choose(policy, view, candidates, count)
            result = policy.measure(view, scores) if policy.resizes else None
            if result is not None:
                measured.setdefault(share, []).append(result[0])
            rest = torch.arange(candidates, layer.kept, dtype=keep.dtype, device=keep.device)
            layer.keep(torch.cat([keep[0], rest.expand(keep.shape[1], -1)], 1))
            left.append(layer.kept)
        for share, results in measured.items():
            own = self._measured.setdefault(share, {})
            own[self.num_tokens] = torch.stack(results).float().mean(0).tolist()
        self.evictions.append((self.num_tokens, sum(left) / len(left)))

    def _evict_blocks(self) -> None:
        """Evict the blocks that the next query no longer sees, of a positional policy."""
        for index in self._prunable:
            layer = self.layers[index]
            if layer.window is None:
                continue
            rule, size = layer.window
            start, end = rule.gap(self.num_tokens // size)
            block = layer.positions[0] // size
            stays = (block < start) | (block >= end)
            if not bool(stays.all()):
                layer.keep(stays.nonzero()[:, 1].view(stays.shape[0], -1))


@dataclass(frozen=True)
class Generated:
    """What `generate` returns.

    Attributes:
        ids: The new tokens, the end token among them.
        kept: Tokens kept per KV head at the end, mean over the layers a policy may prune.
        evictions: Position of each eviction and the tokens kept after it.
    """

    ids: list[int]
    kept: float
    evictions: list[tuple[int, float]]


class Host:
    """Runs a Hugging Face causal language model under sequence policies and formats.

    Args:
        model: A ``...ForCausalLM`` whose attention goes through transformers' attention
            interface: Llama, Mistral, Qwen, Gemma and their like.
        block_size: Tokens per block; a text keeps whole blocks of survivors. 1 keeps budgets to
            the token.
        chunk: Most tokens of one pass of a text under a format.
        kv_dtype: Dtype in which formats are given keys and values, e.g. bfloat16 as in an engine
            while the model computes in float32; the model's own by default.

    Raises:
        UnsupportedModel: The model has no full-attention layer with keys and values per head.
    """

    def __init__(
        self,
        model: Any,
        block_size: int = 16,
        chunk: int = CHUNK,
        kv_dtype: torch.dtype | None = None,
    ):
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {chunk}")
        self.model = model
        self.block_size = block_size
        self.chunk = chunk
        config = model.config.get_text_config()
        self._kinds = kinds = _layer_kinds(model, config)
        self._sliding = int(getattr(config, "sliding_window", None) or 0)
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        dtype = str(kv_dtype or model.dtype).removeprefix("torch.")
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.layers = tuple(
            LayerView(i, len(kinds), kv_heads, heads, head_size, dtype, _rope(model, kind))
            for i, kind in enumerate(kinds)
        )
        self._model: str | None = None
        self.prunable = frozenset(i for i, kind in enumerate(self._kinds) if kind == FULL)
        self.engine = EngineView(
            block_size=block_size,
            max_model_len=int(getattr(config, "max_position_embeddings", 0) or 0),
            layers=tuple(self.layers[i] for i in sorted(self.prunable)),
            host="transformers",
            host_version=transformers.__version__,
        )

    @overload
    def policy(self, use: type[FormatPolicy], **options: Any) -> FormatPolicy: ...

    @overload
    def policy(self, use: type[SequencePolicy], **options: Any) -> SequencePolicy: ...

    @overload
    def policy(self, use: str | type[Policy], **options: Any) -> SequencePolicy | FormatPolicy: ...

    def policy(self, use: str | type[Policy], **options: Any) -> SequencePolicy | FormatPolicy:
        """A sequence or format policy for this model.

        Args:
            use: Name of an installed policy, or a class. A name that both kinds have is the
                sequence policy's.
            options: Its options.

        Raises:
            KVPlugError: No sequence or format policy of that name is installed.
            pydantic.ValidationError: An option is unknown or out of range.
            ValueError: The policy refuses the model.
        """
        found: type[Policy] | None
        if isinstance(use, str):
            from kvplug.registry import plugins

            registry = plugins().registry
            found = registry.get(Kind.SEQUENCE, use) or registry.get(Kind.FORMAT, use)
            if found is None:
                raise KVPlugError(
                    f"unknown sequence policy {use!r}; installed: "
                    f"{', '.join(registry.names(Kind.SEQUENCE))}; formats: "
                    f"{', '.join(registry.names(Kind.FORMAT)) or 'none'}"
                )
        else:
            found = use
        if not issubclass(found, SequencePolicy | FormatPolicy):
            raise KVPlugError(
                f"{found.name} is a {found.kind} policy, not a sequence policy or a format"
            )
        engine = self.engine
        if issubclass(found, FormatPolicy):
            engine = replace(engine, model=self._fingerprint())
        built = found(found.Options.model_validate(options), engine)
        assert isinstance(built, SequencePolicy | FormatPolicy)
        return built

    def _fingerprint(self) -> str:
        """The model's fingerprint, empty where it was loaded from no directory."""
        if self._model is None:
            where = Path(str(getattr(self.model.config, "_name_or_path", "") or "."))
            known = (where / "config.json").is_file() and where != Path()
            self._model = model_fingerprint(where) if known else ""
        return self._model

    def open(
        self,
        num_prompt_tokens: int,
        policy: SequencePolicy | FormatPolicy | None = None,
        watched: Watched | None = None,
    ) -> Text:
        """A text of which nothing is computed yet.

        Args:
            num_prompt_tokens: Tokens its prompt will have.
            policy: What prunes or stores it; None for the full cache.
            watched: What to note for policies it will be branched into; without it, what
                ``policy`` needs.

        Raises:
            ValueError: The prompt is empty, or the policy's budget cannot work.
        """
        if num_prompt_tokens < 1:
            raise ValueError("a prompt has at least one token")
        if watched is None:
            watched = watched_by(policy)
        like = next(self.model.parameters())
        layers: list[LayerCache] = []
        for view, kind in zip(self.layers, self._kinds, strict=True):
            window: tuple[Window, int] | None = None
            if kind == FULL and isinstance(policy, FormatPolicy):
                scale = view.head_size**-0.5
                layers.append(LayerCoded(view, scale, policy, self.block_size, like))
                continue
            if kind == FULL and isinstance(policy, SequencePolicy):
                rule = policy.window(view)
                window = None if rule is None else (rule, self.block_size)
            layers.append(
                LayerCache(
                    view,
                    view.head_size**-0.5,
                    watched if kind == FULL else Watched(),
                    like,
                    self._sliding if kind == SLIDING else 0,
                    window,
                )
            )
        return Text(layers, num_prompt_tokens, policy, self.block_size, self.prunable)

    @torch.inference_mode()
    def feed(
        self, text: Text, ids: Tensor, keep_logits: int = 0, chunk: int | None = None
    ) -> Tensor:
        """Compute tokens of a text, in pieces between the policy's evictions.

        Args:
            text: The text.
            ids: The tokens, ``[n]``.
            keep_logits: Return logits of this many of the last tokens only; 0 for all.
            chunk: Most tokens of one pass; the host's for a text under a format, else all.

        Returns:
            Logits, ``[n or keep_logits, vocabulary]``.
        """
        if ids.dim() != 1 or not len(ids):
            raise ValueError(f"feed takes at least one token as [n], got {tuple(ids.shape)}")
        first = len(ids) - keep_logits if keep_logits else 0
        if chunk is None:
            chunk = self.chunk if isinstance(text.policy, FormatPolicy) else len(ids)
        done, parts = 0, []
        while done < len(ids):
            stop = text._stop(text.num_tokens + min(chunk, len(ids) - done))
            if stop == text.num_tokens:
                raise KVPlugError(f"the eviction at token {stop} was not made")
            piece = ids[done : done + stop - text.num_tokens]
            wanted = max(done + len(piece) - max(first, done), 0)
            logits = self._forward([text], piece[None], max(wanted, 1))
            if wanted:
                parts.append(logits[0])
            done += len(piece)
            text.num_tokens = stop
            text._act()
        return torch.cat(parts)

    @torch.inference_mode()
    def step(self, texts: Sequence[Text], ids: Tensor) -> Tensor:
        """Compute one token of each text, all in one pass.

        Args:
            texts: The texts.
            ids: The tokens, ``[texts]``.

        Returns:
            Logits, ``[texts, vocabulary]``.
        """
        for text in texts:
            text._stop(text.num_tokens + 1)
        logits = self._forward(texts, ids[:, None], 1)
        for text in texts:
            text.num_tokens += 1
            text._act()
        return logits[:, 0]

    def _forward(self, texts: Sequence[Text], ids: Tensor, keep_logits: int) -> Tensor:
        device = ids.device
        starts = torch.tensor([text.num_tokens for text in texts], device=device)
        positions = starts[:, None] + torch.arange(ids.shape[1], device=device)
        with attached(self.model):
            result: Tensor = self.model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=keep_logits,
                kvplug=Step([text.layers for text in texts], positions),
            ).logits
        return result

    def read(
        self, ids: Tensor, policy: SequencePolicy | FormatPolicy | None = None, **open_with: Any
    ) -> tuple[Text, Tensor]:
        """Open a text and compute its prompt.

        Args:
            ids: The prompt, ``[n]``.
            policy: As for `open`.
            open_with: As for `open`.

        Returns:
            The text, and the logits of the prompt's last token, ``[vocabulary]``.
        """
        text = self.open(len(ids), policy, **open_with)
        return text, self.feed(text, ids, 1)[0]

    def generate(
        self,
        ids: Tensor,
        policy: SequencePolicy | FormatPolicy | None = None,
        max_new_tokens: int = 64,
        eos: Sequence[int] = (),
    ) -> Generated:
        """Greedy decoding of one prompt under a policy.

        Args:
            ids: The prompt, ``[n]`` or ``[1, n]``.
            policy: What prunes or stores it; None for the full cache.
            max_new_tokens: Most tokens to generate.
            eos: Tokens that end the text.
        """
        text, logits = self.read(ids.reshape(-1), policy)
        new = [int(logits.argmax())]
        while len(new) < max_new_tokens and new[-1] not in eos:
            logits = self.step([text], torch.tensor(new[-1:], device=logits.device))[0]
            new.append(int(logits.argmax()))
        return Generated(new, text.kept, text.evictions)


def generate(
    model: Any,
    ids: Tensor,
    policy: SequencePolicy | FormatPolicy | str | None = None,
    *,
    max_new_tokens: int = 64,
    eos: Sequence[int] = (),
    block_size: int = 16,
    **options: Any,
) -> Generated:
    """Greedy decoding of a Hugging Face model under a sequence policy or a format, in one call.

    Args:
        model: A ``...ForCausalLM``.
        ids: The prompt, ``[n]`` or ``[1, n]``.
        policy: A policy's name, with its options as further arguments; a policy built with
            `Host.policy`; or None for the full cache.
        max_new_tokens: Most tokens to generate.
        eos: Tokens that end the text.
        block_size: Tokens per block.
        options: The policy's options, e.g. ``budget=0.25``.

    Raises:
        UnsupportedModel: The model cannot be pruned.
        KVPlugError: No such policy.
        pydantic.ValidationError: An option is unknown or out of range.
    """
    host = Host(model, block_size)
    built = host.policy(policy, **options) if isinstance(policy, str) else policy
    return host.generate(ids, built, max_new_tokens, eos)


def _copied(layer: LayerCache) -> LayerCache:
    return layer.copy() if isinstance(layer, LayerCoded) else layer.fork(Watched())


def watched_by(policy: SequencePolicy | FormatPolicy | None) -> Watched:
    """Return the statistics that a policy needs recorded beside keys and values."""
    if isinstance(policy, ScoringPolicy):
        return Watched(policy.observation, policy.wants_cumulative_attention)
    return Watched()


def name_of(policy: Policy | None) -> str:
    """A policy's name for messages."""
    return "the full cache" if policy is None else policy.name


def _layer_kinds(model: Any, config: Any) -> list[str]:
    """Each layer's kind of attention.

    Raises:
        UnsupportedModel: A layer is of no kind this host knows, or none is full attention.
    """
    name = type(model).__name__

    def refuse(why: str) -> UnsupportedModel:
        return UnsupportedModel(f"{name}: {why}; sequence policies need full-attention layers")

    if getattr(config, "kv_lora_rank", None):
        raise refuse("its latent attention (MLA) keeps no keys and values per head")
    if getattr(model.config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder")
    if not getattr(model, "_supports_attention_backend", False):
        raise refuse("its attention does not go through transformers' attention interface")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        slides = getattr(config, "sliding_window", None)
        kinds = [SLIDING if slides else FULL] * config.num_hidden_layers
    strange = sorted(set(kinds) - {FULL, SLIDING})
    if strange:
        raise refuse(f"it has {', '.join(strange)} layers")
    if FULL not in kinds:
        raise refuse("every layer has a sliding window")
    return list(kinds)


def _rope(model: Any, kind: str) -> Rope | None:
    """The rotation of a kind of layer, None where it is not a plain one by position."""
    embedding = getattr(model.get_decoder(), "rotary_emb", None)
    if embedding is None:
        return None

    def of(name: str) -> Any:
        # A model with two kinds of layers has a rotation for each.
        own = getattr(embedding, f"{kind}_{name}", None)
        return getattr(embedding, name, None) if own is None else own

    frequencies, factor = of("inv_freq"), of("attention_scaling")
    if frequencies is None or factor not in (None, 1, 1.0):
        return None
    return Rope(tuple(frequencies.float().tolist()))
