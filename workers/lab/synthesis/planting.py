"""What is planted in a synthetic checkpoint's weights, so that activity comes out of real computation.

Random weights are neither sparse nor local. Five things are planted:

- *A low-rank projection that decides* which neurons are active, up or in gated FFNs the gate:
  W = A Uᵀ + N, rows of A of length 1, rows of N of length `noise`. A truncated SVD finds A Uᵀ, never N,
  so a predictor over-predicts about as much as the paper's.
- *Hot and cold neurons*: neuron i is to be active with probability p_i ∝ (i + d_ff/64)^−α, which sets
  its threshold; neurons are shuffled. α is searched for each layer, so that the layer's *predicted* set
  renews itself at the wanted rate.
- *Thresholds*: that projection's biases. A family without biases gets them along its norm's bias b:
  the FFN input is g·z + b, nothing written to the residual stream has a component along b, and so rows
  of −θ b/|b|² contribute the constant −θ. Root-mean-square norms have no bias: there b is a part of every
  embedding, and what the norm leaves of it varies with the length of the rest, by some per cent.
- *Drift*, so that consecutive tokens share neurons: learned positions are a smooth random walk. With
  rotary positions queries and keys have a constant part along b, in low frequencies, whose product
  depends on distance alone and falls with it: attention is a running mean over the last tokens. With
  ALiBi the slopes do the same.
- *Change from layer to layer*: each block writes a fixed share of the stream's energy anew, so that the
  stream turns, and grows by a constant factor that float16 holds over any published depth.

`Planting.at_rate` is the one preset; aims are the paper's OPT figures (arXiv 2312.11514, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from storage.architecture import Architecture
from storage.errors import UsageError

RATES = (0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Planting:
    """The preset's numbers. Energies are shares of the residual stream's mean square."""

    rate: float
    active: float = 0.04  # of the FFN per token; paper: 3 % (OPT-6.7B), 5 % (relufied Falcon-7B)
    new: float = 0.025  # of the FFN newly predicted per token at a window of 5; paper: 2.4 %, 3.1 %
    misses: float = 0.05  # of the active, by the training-free predictor that `new` is aimed with
    window: int = 5  # tokens
    noise: float = 0.45  # of the up-projection's low-rank part, in length
    hottest: float = 0.9  # no neuron is to be active more often
    attention_energy: float = 0.05  # a block's attention writes this much
    ffn_energy: float = 0.08  # and its FFN this much: the stream turns by acos(1/√1.13) a layer
    early_attention: tuple[float, ...] = ()  # instead, of the first layers: brings the drift in
    stream_scale: float = 0.3  # root mean square of the first layer's input
    position_energy: float = 0.6  # share of the drift in the first layer's input; learned positions
    position_memory: float = 30.0  # tokens over which the walk forgets a direction
    attention_reach: float = 24.0  # tokens of the running mean; rotary positions
    reach_strength: float = 5.0  # logit at distance 0; rotary positions
    norm_bias: float = 0.25  # per coordinate, where thresholds live in the norm's bias
    constant_energy: float = 0.5  # share of b in the first layer's input, where norms have no bias

    @classmethod
    def at_rate(cls, rate: float, model: Architecture) -> Planting:
        """The preset with `rate` times the new neurons per token. Raises UsageError."""
        if rate not in RATES:
            raise UsageError(f"the rate must be one of 0.5, 1 and 2, not {rate:g}")
        attention = model.layers[0].attention
        early: dict[float, tuple[float, ...]] = {}
        if attention.rope is not None:
            early = {0.5: (0.7, 0.7, 0.7), 1.0: (0.6, 0.6)}
        elif attention.alibi:
            early = {0.5: (0.7, 0.7), 1.0: (0.4,)}
        return cls(
            rate=rate,
            new=0.025 * rate,
            position_energy={0.5: 0.85, 1.0: 0.6, 2.0: 0.05}[rate],
            attention_energy={0.5: 0.07, 1.0: 0.05, 2.0: 0.03}[rate],
            ffn_energy={0.5: 0.06, 1.0: 0.08, 2.0: 0.08}[rate],
            early_attention=early.get(rate, ()),
            attention_reach={0.5: 64.0, 1.0: 24.0, 2.0: 6.0}[rate],
        )

    def attention_share(self, layer: int) -> float:
        """What a layer's attention writes, as a share of the stream's energy."""
        return self.early_attention[layer] if layer < len(self.early_attention) else self.attention_energy

    @staticmethod
    def rank(d_model: int) -> int:
        """Rank of the planted part: 85 at OPT-6.7B's width, within the paper's predictors' 128."""
        return max(8, d_model // 48)
