"""The plan: sizes that everything in one ring agrees on, fixed before the workers start."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

Kind: TypeAlias = Literal["lowrank", "oracle", "router", "shadow", "all"]  # of predictor

# How compute cuts the products of a prompt: the planner reserves scratch for as much, and whole blocks of
# staging. They are the same in every ring, because the order of a sum, and with it the text, hangs on them.
TILE: Final = 512  # rows of a weight that a thread multiplies at once
PANEL: Final = 16  # tokens that a product takes together
BLOCK: Final = 256  # units of one product, at multiples of BLOCK
BLOCKS: Final = 8  # blocks whose activations are kept at once
QUERIES: Final = 128  # tokens of one head whose attention is computed at once
WIDENED: Final = 64 << 20  # bytes of weights in float32 that a torch device computes with at once
ROWS: Final = 512  # tokens of one expert that are computed at once
ROWS_APART: Final = 2 * ROWS  # of experts, for each thread, that are computed or wait to be summed

STEP_ROWS: Final = 8  # tokens of a step that is no prompt, at most: one, and its drafts

NEARLY_ALL: Final = 0.9  # of a layer's experts: a prompt that wants as many is taken to want all of the next
HOST: Final = ("cpu", "torch-cpu")  # devices whose memory is the host's
LARGE: Final = 1 << 20  # bytes of a slot from which each unit that a token misses is a part of its own


@dataclass(frozen=True, slots=True)
class Forecast:
    """How neurons are foreseen, with nothing left open. PROTOCOL.md says what is predicted when."""

    kind: Kind
    lookahead: int  # layers
    refine: bool  # predict again from the layer's own input: then early predictions are guesses
    early: bool = False  # hidden states are announced before their layer's attention
    pinned: frozenset[int] = frozenset()  # layers that are resident and computed whole
    cache_aware: bool = False  # some neurons are wanted only where they are resident
    guesses: int | None = None  # units that one guess may read; None: all that it lists
    prefer: float = 0.0  # `experts.prefer` of the configuration
    skip: float = 0.0  # `experts.skip`
    full_rows: float = 0.0  # of a shadow: the share of a layer's units whose full rows a token has
    thresholds: tuple[float, ...] = ()  # of each layer: what a score must exceed; empty: full_rows decides

    @property
    def every(self) -> bool:
        """Whether every neuron is computed: no set depends on an input."""
        return self.kind == "all"

    @property
    def routed(self) -> bool:
        """Whether units are experts, and their layers' routers choose them."""
        return self.kind == "router"

    @property
    def shadowed(self) -> bool:
        """Whether compute chooses a token's units by their low-bit copy, which serves the others."""
        return self.kind == "shadow"

    @property
    def low(self) -> bool:
        """Whether the low-bit copy serves everything, prompts as well: nothing is read."""
        return self.shadowed and self.full_rows == 0

    @property
    def settled_by_cache(self) -> bool:
        """Whether a token's set depends on what is resident: then whoever scores does not know it alone."""
        return self.prefer > 0 or self.skip > 0 or (self.shadowed and self.cache_aware)

    @property
    def refines(self) -> bool:
        """Whether sets wait for the layer's own input, and guesses come before them."""
        return self.refine and not self.every and self.lookahead > 0

    @property
    def from_own_input(self) -> bool:
        """Whether a layer's set is predicted from the layer's own input."""
        return self.refines or self.lookahead == 0


@dataclass(frozen=True, slots=True)
class Plan:
    """How the memory of one ring is divided, and how it foresees neurons.

    Slots are numbered over the whole ring: layer l owns `first_slot(l) .. + slots[l] - 1`; the two
    staging halves follow the last layer's, `staging` slots each.
    """

    d_model: int
    units: tuple[int, ...]  # of each layer; 0: the layer has nothing on flash
    stride: int  # bytes of a slot: of the largest unit
    slots: tuple[int, ...]  # of each layer
    staging: int  # slots of one staging half
    context: int  # tokens of KV cache
    hidden_rows: int  # rows of the hidden segment per layer: the window's tokens in prefill
    forecast: Forecast
    cache_dtype: str = "float32"  # of keys and values
    drafts: int = 0  # tokens behind a new one that a step may verify, at most
    mirrored: int = 0  # slots, those of the first layers, that lie in the device's memory too
    device_bytes: int | None = None  # what may be taken of a GPU's memory; None: no limit

    @property
    def layers(self) -> int:
        return len(self.units)

    @property
    def most_units(self) -> int:
        """Of any layer."""
        return max(self.units)

    @property
    def total_slots(self) -> int:
        """Slots of all layers, without staging."""
        return sum(self.slots)

    @property
    def whole(self) -> bool:
        """Whether every unit stays in its slot, and compute knows what it wants: then steps need not ask."""
        return (self.forecast.every or self.forecast.routed) and self.slots == self.units

    def wants_chosen(self, layer: int) -> bool:
        """Whether a prompt wants of this layer the experts that its rows chose, and no others."""
        return self.forecast.routed and not self.whole and layer not in self.forecast.pinned

    def asks_ahead(self, layer: int, chosen: int) -> bool:
        """Whether a prompt whose rows chose so many experts of `layer` asks for all of the next one's.

        They are then read during the next layer's attention: it will want nearly all of them.
        """
        if not chosen or layer + 1 == self.layers or not self.wants_chosen(layer + 1):
            return False
        return chosen >= NEARLY_ALL * self.units[layer]

    def first_slot(self, layer: int) -> int:
        return sum(self.slots[:layer])

    def first_staging_slot(self, half: int) -> int:
        return self.total_slots + half * self.staging

    def to_json(self) -> dict[str, Any]:
        forecast = {**asdict(self.forecast), "pinned": sorted(self.forecast.pinned)}
        return {**asdict(self), "forecast": forecast}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        said = data["forecast"]
        forecast = Forecast(
            **{**said, "pinned": frozenset(said["pinned"]), "thresholds": tuple(said["thresholds"])}
        )
        lists = {name: tuple(data[name]) for name in ("units", "slots")}
        return cls(**{**data, **lists, "forecast": forecast})
