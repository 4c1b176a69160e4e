"""PyramidKV: SnapKV with budgets that fall with depth.

Cai et al., arXiv 2406.02069: low layers spread their attention over the whole text, high layers
gather it on few tokens. Budgets fall linearly from the first layer to the last, their mean staying
the requested one; within a layer tokens are chosen as SnapKV chooses them. With a budget of B
tokens beyond those always kept, the last layer has B / ``beta`` and the first 2 B - B / ``beta``.

Differences from the paper, forced by paging or by serving:

* Layers of one budget form a KV-cache group, and an engine wants few of them: the line is divided
  into ``groups`` steps of about as many layers each, every step the mean of its layers, so the mean
  over all layers is unchanged.
* The paper limits the line to the length of the prompt. Here shares are fixed before a prompt is
  known: that holds for a budget that is a part of the prompt; with a budget in tokens, low layers
  of a short prompt may have room for more than it has, which they leave unused.
* What differs in `snapkv` differs here too.
"""

from __future__ import annotations

from pydantic import Field

from kvplug.contract import LayerView
from kvplug_policies.sequence.snapkv import SnapKV


class PyramidKV(SnapKV):
    """SnapKV with more tokens in low layers and fewer in high ones."""

    name = "pyramidkv"
    changes = "drops the tokens the latest queries attend to least, more of them in higher layers"
    paper = (
        "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, "
        "arXiv 2406.02069"
    )

    class Options(SnapKV.Options):
        """Options of `PyramidKV`."""

        beta: int = Field(
            20, ge=1, le=1000, description="the last layer gets 1/beta of the mean budget"
        )
        groups: int = Field(
            3, ge=1, le=64, description="steps of the pyramid; each is a KV-cache group"
        )

    options: Options

    def share(self, layer: LayerView) -> float:
        options, depth = self.options, layer.num_layers
        steps = min(options.groups, depth)
        step = layer.index * steps // depth
        members = [i for i in range(depth) if i * steps // depth == step]
        middle = sum(members) / len(members) / max(1, depth - 1)
        most = 2.0 - 1.0 / options.beta
        always = 0.0
        if isinstance(options.budget, int):
            always = min(1.0, (options.sink + max(options.recent, options.window)) / options.budget)
        else:
            most = min(most, 1.0 / options.budget)
        of_line = 1.0 if depth == 1 else most - middle * (2.0 * most - 2.0)
        # Rounded so that layers of a step agree to the last bit, whatever their weights below.
        return round(super().share(layer) * (always + (1.0 - always) * of_line), 6)
