"""What is planted so that a mixture's routing comes out of real computation, with published statistics.

All tensors are random codes but for these parts, on coordinates of their own in the residual stream:

- *Constant*: 32 coordinates in which every token's embedding is the same, and no block writes. There queries
  and keys read what makes attention see distance alone (`attention.py`), and routers read their biases: an
  exponential distribution over the experts, so that some are hot and half of them cold in every text.
- *Routed*: 64 coordinates, louder than others, which routers read. An embedding has a random vector there.
  The second layer's attention adds means over the last tokens, long ones and short ones: a text's own hot
  experts, for a text's words repeat, and experts that consecutive tokens share. The first layer's router sees
  the token alone, and so no locality but that of the text's words.
- *Turn*: each block writes a share of the routed part's energy anew, experts what belongs to the token,
  attention what belongs to its neighbours. So the next layer's router, given this input, errs a little.

All scales are computed, none is measured: every tensor depends on the shape, the preset and the seed alone,
and can be drawn in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

from storage.errors import UsageError

RATES = (0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class MixturePlanting:
    """The preset's numbers. Energies are shares of the first layer's input, or of what they are said of."""

    rate: float | None  # of new experts; None: no locality
    bias: float  # of routers, times their logits' deviation: the exponential's scale
    slow: float  # of the routed energy behind the second layer: the mean over `reach` tokens
    short: float  # and over `near` tokens; the rest is the token's own
    first_bias: float = 0.7  # the first layer's
    reach: float = 96.0  # tokens
    near: float = 5.0  # tokens
    reach_strength: float = 5.0  # attention's logit at distance 0
    logits: float = 1.2  # standard deviation of a router's logits, without their biases
    noise: float = 0.01  # of the logits' energy: what routers read of all other coordinates
    constant_energy: float = 0.3
    routed_energy: float = 0.05  # of the token alone; grows in the second layer
    turn: float = 0.03  # of the routed energy, written anew by each block
    ffn_energy: float = 0.04  # of all other coordinates' energy, likewise by a layer's experts
    attention_energy: float = 0.01  # and by its attention
    embedding: float = 1.0  # root mean square of the first layer's input

    @classmethod
    def at_rate(cls, rate: float, locality: bool = True) -> MixturePlanting:
        """The preset with `rate` times the new experts per token. Raises UsageError.

        New are those that none of the eight tokens before had: a fifth of a token's at rate 1.
        """
        if not locality:
            return cls(None, bias=0.0, slow=0.0, short=0.0, first_bias=0.0)
        if rate not in RATES:
            raise UsageError(f"the rate must be one of 0.5, 1 and 2, not {rate:g}")
        bias, slow, short = {0.5: (5.0, 0.6, 0.1), 1.0: (3.0, 0.3, 0.2), 2.0: (0.6, 0.15, 0.1)}[rate]
        return cls(rate, bias, slow, short)

    @property
    def own(self) -> float:
        """The token's own share of the routed energy behind the second layer."""
        return 1 - self.slow - self.short
