"""What a layer is, for any family and on any device, and the loop over the layers.

A layer is cut where the FFN's units are needed: `before_ffn` makes the FFN's input and announces it as
early as the block allows; `after_ffn` adds the FFN's output. Decode, prefill, the naive baseline, the dense
reference and the tests run this one loop; they differ in where the units come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from storage.architecture import Architecture, Layer, NormPlace
from workers.compute.device import Device
from workers.routing import Ids

Hidden = TypeVar("Hidden", bound=Any)


class Units(Protocol[Hidden]):
    """Where the units of every layer's FFN come from."""

    def announce(self, index: int, hidden: Hidden) -> None:
        """Layer `index`'s FFN will read `hidden`, or with `early` about that."""

    def routed(self, index: int, ids: Ids) -> None:
        """Each row has these experts [rows, top_k]; after `announce`, of a layer with a router."""

    def ffn(self, index: int, ffn_input: Hidden) -> Hidden:
        """Give layer `index`'s FFN its units (`Device.ffn`); returns its output."""


class Operations(Protocol[Hidden]):
    """What of a device `onward` needs."""

    def norm(self, index: int, place: NormPlace, x: Hidden) -> Hidden: ...
    def attention(self, index: int, x: Hidden) -> Hidden: ...


def run(
    architecture: Architecture, device: Device[Hidden], x: Hidden, units: Units[Hidden], early: bool = False
) -> Hidden:
    """The last layer's output, from the residual stream x before layer 0; both [rows, d_model]."""
    for index, layer in enumerate(architecture.layers):
        x = run_layer(layer, device, index, x, units, early)
    return x


def run_layer(
    layer: Layer, device: Device[Hidden], index: int, x: Hidden, units: Units[Hidden], early: bool = False
) -> Hidden:
    """One layer's output."""
    residual, ffn_input = before_ffn(
        layer,
        device,
        index,
        x,
        lambda hidden: units.announce(index, hidden),
        early,
        lambda ids: units.routed(index, ids),
    )
    return after_ffn(layer, device, index, residual, units.ffn(index, ffn_input))


def before_ffn(
    layer: Layer,
    device: Device[Hidden],
    index: int,
    x: Hidden,
    announce: Callable[[Hidden], None],
    early: bool = False,
    routed: Callable[[Ids], None] = lambda _: None,
) -> tuple[Hidden, Hidden]:
    """The residual stream so far, and the FFN's input, which `announce` has been given.

    Of a layer with experts what the router reads is announced, and then `routed` is given the rows' experts.

    With `early` it is given what the FFN's input would be without this layer's attention, before
    attention is computed: reads have that time, too. In parallel blocks that is the FFN's input.
    """

    def norm(place: NormPlace, x: Hidden) -> Hidden:
        return _normed(layer, device, index, place, x)

    def tell(hidden: Hidden) -> None:
        announce(hidden)
        if router is not None:
            routed(device.route(index, hidden))

    router = layer.ffn.router
    from_layer_input = router is not None and router.reads == "layer_input"
    if from_layer_input:
        tell(x)
    if layer.parallel:
        attention_input = norm("attention_input", x)
        ffn_input = norm("ffn_input", x) if "ffn_input" in layer.norms else attention_input
        if not from_layer_input:
            tell(ffn_input)
        return x + device.attention(index, attention_input), ffn_input
    if early:
        announce(norm("ffn_input", norm("attention_sum", x)))
    x, ffn_input = device.onward(index, x) if layer.plain else onward(layer, device, index, x)
    if not early and not from_layer_input:
        tell(ffn_input)
    return x, ffn_input


def onward(layer: Layer, device: Operations[Hidden], index: int, x: Hidden) -> tuple[Hidden, Hidden]:
    """The residual stream behind attention, and the FFN's input, of a layer whose sub-layers are in sequence.

    `Device.onward`, step by step.
    """
    branch = device.attention(index, _normed(layer, device, index, "attention_input", x))
    branch = _normed(layer, device, index, "attention_output", branch)
    x = _normed(layer, device, index, "attention_sum", x + _scaled(layer, branch))
    return x, _normed(layer, device, index, "ffn_input", x)


def after_ffn(layer: Layer, device: Device[Hidden], index: int, residual: Hidden, ffn: Hidden) -> Hidden:
    """The layer's output from the residual stream and the FFN's output."""
    if "ffn_output" in layer.norms:
        ffn = device.norm(index, "ffn_output", ffn)
    x: Hidden = residual + _scaled(layer, ffn)
    return device.norm(index, "ffn_sum", x) if "ffn_sum" in layer.norms else x


def _scaled(layer: Layer, branch: Hidden) -> Hidden:
    scaled: Hidden = branch if layer.branch_scale == 1 else branch * layer.branch_scale
    return scaled


def _normed(layer: Layer, device: Operations[Hidden], index: int, place: NormPlace, x: Hidden) -> Hidden:
    """The norm that a layer may have at `place`."""
    return device.norm(index, place, x) if place in layer.norms else x
