"""Request options that a deployment cannot apply; each is reported in the answer."""

from __future__ import annotations

from kvplug.contract import Kind
from kvplug.deployment import Deployment
from kvplug.request_options import Cause, RefusedOption, RequestOptions

__all__ = ["unmet_options"]


def unmet_options(options: RequestOptions, deployment: Deployment) -> dict[str, RefusedOption]:
    """Find the valid options of a request that the deployment has nothing for.

    Returns:
        Why each of them cannot be applied, by option.
    """
    found: dict[str, str] = {}
    reuses = bool(deployment.choices.get(Kind.REUSE))
    if options.reuse == "approximate" and not reuses:
        found["reuse"] = "reuse is 'approximate', but the deployment reuses nothing"
    elif options.reuse == "approximate" and not deployment.reuse.approximate:
        found["reuse"] = "reuse is 'approximate', which the deployment does not allow"
    if options.attention == "approximate" and not deployment.choices.get(Kind.ATTENTION):
        found["attention"] = "attention is 'approximate', but the deployment has no such policy"
    if options.segments is not None and not reuses:
        found["segments"] = "segments are given, but the deployment reuses nothing"
    if options.missed and not deployment.observe.misses:
        found["missed"] = "missed is true, but the deployment has observe.misses off"
    return {key: RefusedOption(Cause.NOT_MET, sentence) for key, sentence in found.items()}
