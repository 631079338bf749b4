"""One token's operations on the CPU: numba kernels over weights as they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.ring.plan import STEP_ROWS
from storage.architecture import EMBED, POSITIONS, Ffn, NormPlace
from storage.codecs import F32
from workers import kernels
from workers.compute.bound import BoundLayer, BoundModel, Linear, Source
from workers.compute.cpu.experts import TokenExperts, of_shared, resettled, routed
from workers.compute.cpu.norms import normed
from workers.compute.cpu.units import UnitRows
from workers.compute.device import I32, Bytes, Mask
from workers.compute.kv_cache import KeyValueCache
from workers.compute.logits import finished
from workers.compute.positions import Positions
from workers.routing import Ids, Routing


class TokenOperations:
    """The part of `device.Device` that is one token's; x is [1, d_model]."""

    def __init__(
        self, source: Source, model: BoundModel, positions: Positions, cache: KeyValueCache, threads: int
    ) -> None:
        self.architecture = source.architecture
        self.source = source
        self.model = model
        self.cache = cache
        self.threads = threads
        self.first = 0  # position of the token
        self.positions = positions
        rows = {unit: UnitRows(unit) for unit in {layer.unit for layer in source.layout.layers}}
        self._rows = [rows[layer.unit] for layer in source.layout.layers]
        layers = self.architecture.layers
        self._plain = [
            TokenUnits(bound, own, layer.ffn, threads)
            for bound, own, layer in zip(model.layers, self._rows, layers, strict=True)
        ]
        neurons = max((layer.ffn.neurons for layer in layers if not layer.ffn.router), default=0)
        self._activations = np.empty((STEP_ROWS, neurons), np.float32)  # of one layer, by row of the step
        self._routing: Routing | None = None  # of the layer at hand
        context = cache.keys[0].shape[1]
        heads = max(layer.attention.heads for layer in layers)
        self.scores = np.empty((heads, context), np.float32)  # of one layer
        self._routed = kernels.NO_BIAS, kernels.NO_BIAS  # the last FFN's input, and its router's logits
        self._attending = [self._bound_attention(index) for index in range(len(layers))]

    def _bound_attention(self, index: int) -> kernels.Attending:
        described, bound = self.architecture.layers[index].attention, self.model.layers[index]
        none = kernels.NO_BIAS
        norms = (none, none, none, none)
        if bound.q_norm is not None and bound.k_norm is not None:
            q, k = bound.q_norm, bound.k_norm
            norms = (q.weight, q.bias, k.weight, k.bias)
        return kernels.Attending(
            described,
            bound.qkv.weight,
            bound.qkv.bias,
            bound.out.weight,
            bound.out.bias,
            norms,
            self.positions.rotary[index],
            self.positions.bias[index],
            (self.cache.keys[index], self.cache.values[index]),
            self.cache.codec,
            self.scores[: described.heads],
            self.threads,
            bound.sinks,
            self._around(index),
        )

    def _around(self, index: int) -> kernels.Around | None:
        """What the launch does beside attention; None: nothing."""
        described, bound = self.architecture.layers[index], self.model.layers[index]
        if not described.plain:
            return None
        before, after = (
            (placed.norm, placed.weight, placed.bias) if placed else (None, kernels.NO_BIAS, kernels.NO_BIAS)
            for placed in (bound.norms.get("attention_input"), bound.norms.get("ffn_input"))
        )
        router, reads = bound.router, described.ffn.router
        if router is None or reads is None or reads.reads == "layer_input":
            return kernels.Around(before, after, described.branch_scale)
        return kernels.Around(before, after, described.branch_scale, router.weight, router.bias)

    def embed(self, tokens: npt.NDArray[np.integer[Any]]) -> F32:
        x: F32 = self.source.lines(EMBED, tokens)[0]
        if self.architecture.embedding_scale != 1:
            x *= np.float32(self.architecture.embedding_scale)
        if self.model.project_in is not None:
            x = self._product(self.model.project_in, x)
        if self.architecture.learned_positions is not None:
            x = x + self.source.lines(POSITIONS, self.first + self.architecture.learned_positions)
        return x[None]

    def norm(self, index: int, place: NormPlace, x: F32) -> F32:
        return normed(self.model.layers[index].norms[place], x)

    def attention(self, index: int, x: F32) -> F32:
        return self._attending[index](x[0], self.first)[None]

    def onward(self, index: int, x: F32) -> tuple[F32, F32]:
        x, fed, logits = self._attending[index].onward(x[0], self.first)
        self._routed = fed, logits
        return x[None], fed[None]

    def route(self, index: int, x: F32) -> Ids:
        ffn, bound = self.architecture.layers[index].ffn, self.model.layers[index]
        fed, logits = self._routed
        if x.base is not fed or not logits.size:  # else the launch that made x has multiplied it, too
            assert bound.router is not None
            logits = self._product(bound.router, x[0])
        self._routing = routed(ffn, logits[None])
        return self._routing.ids

    def settle(self, index: int, ids: Ids) -> None:
        self._routing = resettled(self.architecture.layers[index].ffn, self._routing, ids)

    def ffn(self, index: int, x: F32, mask: Mask | None = None) -> TokenFfn | TokenExperts:
        assert mask is None, "a token's set is given, not masked"
        ffn, bound, rows = self.architecture.layers[index].ffn, self.model.layers[index], self._rows[index]
        if ffn.mixed:
            routing, self._routing = self._routing, None
            shared = None if bound.shared is None else of_shared(ffn, bound.shared, x[0], self._product)
            return TokenExperts(bound, rows, ffn, x[0], routing, shared, self.threads)
        return self.plain_ffn(index, x[0], 0)

    def plain_ffn(self, index: int, x: F32, row: int) -> TokenFfn:
        """That of a layer without experts, for x [d_model], which is the step's row of this number."""
        return TokenFfn(self._plain[index], x, self._activations[row])

    def logits(self, x: F32) -> F32:
        if self.model.final_norm is not None:
            x = normed(self.model.final_norm, x)
        (row,) = x
        if self.model.project_out is not None:
            row = self._product(self.model.project_out, row)
        return finished(self.architecture, self._product(self.model.head, row)[None])

    def _product(self, linear: Linear, x: F32) -> F32:
        return kernels.matvec(linear.weight, x, self.threads, linear.bias)


class TokenUnits:
    """One layer's units without experts, as a token's kernels take them."""

    def __init__(self, bound: BoundLayer, rows: UnitRows, ffn: Ffn, threads: int) -> None:
        self.bound, self.ffn = bound, ffn
        self.width = rows.unit.width  # neurons; a shadow's units may have others than the layer's
        self._rows, self._threads = rows, threads
        self._memory: Bytes | None = None  # that of `_feeding`
        self._feeding: kernels.Feeding | None = None

    def activate(self, ids: I32, slots: I32, memory: Bytes, x: F32, out: F32) -> None:
        """Activations of the units `ids`, whose rows lie in `slots`, for x [d_model]: into `out`."""
        rows, ffn, bound, threads = self._rows.of(memory), self.ffn, self.bound, self._threads
        if ffn.kind == "gated":
            biases = bound.gate_bias, bound.up_bias
            kernels.activate_gated(rows["gate"], rows["up"], ids, slots, x, biases, ffn, threads, out)
            return
        function, threshold = ffn.activation, ffn.threshold
        kernels.activate(rows["up"], ids, slots, x, bound.up_bias, function, threads, out, threshold)

    def accumulate(self, ids: I32, slots: I32, memory: Bytes, activations: F32, output: F32) -> int:
        """Add what these units contribute; returns the number of activations that are not zero."""
        return kernels.accumulate(
            self._rows.of(memory)["down"], ids, slots, activations, output, self._threads
        )

    def feed(self, ids: I32, slots: I32, memory: Bytes, x: F32, activations: F32, output: F32) -> int:
        """Both, in one launch."""
        if self._feeding is None or memory is not self._memory:
            biases = self.bound.gate_bias, self.bound.up_bias
            self._feeding = kernels.Feeding(self._rows.of(memory), biases, self.ffn, self._threads)
            self._memory = memory
        return self._feeding(ids, slots, x, activations, output)


class TokenFfn:
    """One layer's FFN of one token, over groups of parts that may arrive one by one.

    The sum runs over ascending neuron ids, whatever the parts were.
    """

    def __init__(self, units: TokenUnits, x: F32, activations: F32) -> None:
        """x [d_model]; `activations` [neurons] is scratch, this FFN's own until it is finished."""
        self._units, self._input, self._activations = units, x, activations
        bias = units.bound.down_bias
        self._output = bias.copy() if bias.size else np.zeros(x.shape, np.float32)
        self._parts: list[tuple[I32, I32]] = []  # ids and slots of the group's parts
        self._memory: Bytes | None = None
        self._summed = self._activated = 0  # of `activations`
        self.active = 0

    def add(self, ids: I32, slots: I32, memory: Bytes) -> None:
        if not ids.size:
            return
        part = slice(self._activated, self._activated + ids.size * self._units.width)
        out = self._activations[part]
        if out.size == self._units.ffn.neurons:  # nothing else will come
            self.active += self._units.feed(ids, slots, memory, self._input, out, self._output)
            return
        self._activated = part.stop
        self._parts.append((ids, slots))
        self._memory = memory
        self._units.activate(ids, slots, memory, self._input, out)

    def close(self) -> None:
        if not self._parts:
            return
        assert self._memory is not None
        if len(self._parts) == 1:
            ids, slots = self._parts[0]
        else:
            ids, slots = (np.concatenate(several) for several in zip(*self._parts, strict=True))
        group = slice(self._summed, self._activated)
        self._summed = self._activated
        self._parts.clear()
        some = self._activations[group]
        self.active += self._units.accumulate(ids, slots, self._memory, some, self._output)

    def finish(self) -> F32:
        return self._output[None]
