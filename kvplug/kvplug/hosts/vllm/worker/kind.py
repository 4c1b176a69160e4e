"""Protocol of a kind on a worker."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, NoReturn, Protocol

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport

from kvplug.containment import PolicyFailure
from kvplug.contract import Kind
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm.messages import StepDirectives, StepReport
from kvplug.hosts.vllm.worker.held import HeldMemory
from kvplug.hosts.vllm.worker.steps import AttentionStep, MetadataStep

logger = init_logger("vllm.kvplug")

Origin = tuple[str, str]
"""Source and key of a policy in its deployment, for messages."""


class Errors(Protocol):
    """A report that counts exceptions and says the first of them."""

    errors: int
    error: str


class KindWorker:
    """One kind of a deployment on one worker: its layers, and its part of every step.

    Every method does nothing by default. The first group shapes attention layers and is called
    while vLLM builds them; the second follows the engine's steps.

    Args:
        origin: Source and key of the policy in its deployment, for messages.

    Attributes:
        kind: The kind.
        held: Memory that it holds for the life of the engine.
        supports_update_block_table: Whether vLLM may take the metadata of one KV-cache group for
            another group with the block table swapped, where the backend can.
    """

    kind: ClassVar[Kind]
    supports_update_block_table: ClassVar[bool] = True

    def __init__(self, origin: Origin):
        self.origin = origin
        self.held = HeldMemory()
        self._logged: set[str] = set()

    # -- layers --------------------------------------------------------------------------------

    def rule(self, index: int) -> Hashable:
        """Return what sets a layer apart; layers of equal rules share a backend class."""
        return None

    def customize_spec(self, spec: Any, rule: Any, stock: type[Any]) -> Any:
        """Return the KV-cache spec of a full-attention layer.

        Args:
            spec: The spec so far.
            rule: The layer's rule.
            stock: The stock backend.

        Raises:
            DeploymentError: The backend cannot store such a layer.
        """
        return spec

    def layouts(self, inner: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        """Return the KV-cache layouts a backend takes, most preferred first; None for any.

        Args:
            inner: What the backend takes by itself.
        """
        return inner

    def check_impl(self, impl: Any) -> None:
        """Check that an attention implementation is one the kind supports.

        Raises:
            DeploymentError: It is not.
        """

    def loaded(self, name: str, layer: Any, dtype: torch.dtype, vllm_config: Any) -> None:
        """Take a layer whose weights were loaded. Memory taken here counts in vLLM's profile.

        Args:
            name: Its name.
            layer: vLLM's attention layer.
            dtype: Type of the model's activations.
            vllm_config: The engine's config.
        """

    def metadata_steps(
        self, spec: Any, vllm_config: Any, device: torch.device
    ) -> Sequence[MetadataStep]:
        """Make the steps of a metadata builder.

        Args:
            spec: KV-cache spec of its layers.
            vllm_config: The engine's config.
            device: Device of the tensors.
        """
        return ()

    def cudagraph_support(self, spec: Any, inner: AttentionCGSupport) -> AttentionCGSupport:
        """Return the CUDA graphs a builder supports, given what the rest of the chain does."""
        return inner

    def attention_step(self) -> AttentionStep | None:
        """Return the step of the kind in attention layers, or None."""
        return None

    def refuse(self, problem: str, fix: str) -> NoReturn:
        """Raise a DeploymentError that names the kind's policy."""
        raise DeploymentError(self.origin[0], [Refusal(self.origin[1], problem, fix)])

    def check_distances(self, impl: Any, policy: str) -> None:
        """Refuse ALiBi under a policy that evicts tokens."""
        if getattr(impl, "alibi_slopes", None) is not None:
            self.refuse(
                f"{policy} does not support models with ALiBi: distances would be counted over "
                "the tokens that are kept.",
                f"remove the {self.kind!s} section for this model.",
            )

    def check_block_size(self, spec: Any, stock: type[Any], policy: str) -> None:
        """Refuse a block size the backend splits: rules and directives count the pool's blocks."""
        from vllm.v1.worker.utils import select_common_block_size

        try:
            size = select_common_block_size(spec.block_size, [stock], [spec])
        except ValueError:
            return
        if size != spec.block_size:
            self.refuse(
                f"{policy} counts in blocks of {spec.block_size} tokens, but "
                f"{stock.get_name()} splits them into blocks of {size}.",
                f"set --block-size {size}.",
            )

    def _caught(self, report: Errors, what: str, error: Exception) -> None:
        """Report what a part of the kind raised; the log has the first of each part."""
        report.errors += 1
        if not report.error:
            named = f"{type(error).__name__}: {error}"
            cause = error.cause if isinstance(error, PolicyFailure) else named
            report.error = f"{what}: {cause}"
        if what not in self._logged:
            self._logged.add(what)
            logger.error(
                "%s failed to %s; the engine computes instead", self.kind, what, exc_info=error
            )

    # -- steps ---------------------------------------------------------------------------------

    def start(self, num_groups: int) -> None:
        """Start: the connector exists, and the engine has ``num_groups`` KV-cache groups."""

    def register(self, caches: dict[str, Tensor]) -> None:
        """Take the KV caches, by layer name.

        Raises:
            KVPlugError: The worker lacks something the deployment needs.
        """

    def begin(self, directives: StepDirectives) -> None:
        """Begin a step, before attention metadata is built and anything is written."""

    def load(self, directives: StepDirectives) -> None:
        """Fill pages before the forward; where the directives do not say that something must come
        before it, maybe after it. The step's rows have names from here on."""

    def end(self, directives: StepDirectives) -> None:
        """End a step, after the forward."""

    def report(self, into: StepReport) -> None:
        """Add the kind's part to a report, if it has one."""

    def unfilled(self) -> set[int]:
        """Return ids of blocks whose tokens are not there."""
        return set()

    def received(self) -> tuple[set[str], set[str]]:
        """Return requests that vLLM keeps waiting and whose run was dealt with since last asked,
        and those of them whose run is not there."""
        return set(), set()

    def stop(self) -> None:
        """Stop, at the engine's shutdown."""
