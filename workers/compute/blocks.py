"""What a layer is, for any family: the three blocks of `storage/families/architecture.py`.

Written once, over whatever computes a norm and an attention: for one token or for many. A layer is cut
where the FFN's bundles are needed: `before_ffn` makes the FFN's input and announces it as early as the
block allows; `after_ffn` adds the FFN's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from storage.families.architecture import Architecture, layer

Hidden = TypeVar("Hidden", bound=Any)


class Operations(Protocol[Hidden]):
    """The two operations that differ between one token and many."""

    def norm(self, name: str, x: Hidden) -> Hidden:
        """LayerNorm by the tensors `name`.weight and `name`.bias."""

    def attention(self, index: int, x: Hidden) -> Hidden:
        """Layer `index`'s attention with its projections, keeping keys and values."""


def before_ffn(
    architecture: Architecture,
    operations: Operations[Hidden],
    index: int,
    x: Hidden,
    announce: Callable[[Hidden], None],
    early: bool = False,
) -> tuple[Hidden, Hidden]:
    """The residual stream so far, and the FFN's input, which `announce` has been given.

    With `early` it is given what the FFN's input would be without this layer's attention, before
    attention is computed: reads have that time, too. In parallel blocks that is the FFN's input.
    """
    if architecture.block == "parallel":
        normed = operations.norm(layer(index, "norm"), x)
        shared = architecture.shared_norm
        ffn_input = normed if shared else operations.norm(layer(index, "ffn_norm"), x)
        announce(ffn_input)
        return x + operations.attention(index, normed), ffn_input
    last_norm = "ffn_norm" if architecture.block == "pre_norm" else "norm"
    if early:
        announce(operations.norm(layer(index, last_norm), x))
    if architecture.block == "pre_norm":
        x = x + operations.attention(index, operations.norm(layer(index, "norm"), x))
        ffn_input = operations.norm(layer(index, "ffn_norm"), x)
    else:
        x = operations.norm(layer(index, "norm"), x + operations.attention(index, x))
        ffn_input = x
    if not early:
        announce(ffn_input)
    return x, ffn_input


def after_ffn(
    architecture: Architecture, operations: Operations[Hidden], index: int, residual: Hidden, ffn: Hidden
) -> Hidden:
    """The layer's output from the residual stream and the FFN's output."""
    x: Hidden = residual + ffn
    return operations.norm(layer(index, "ffn_norm"), x) if architecture.block == "post_norm" else x
