"""In which number format every matrix is stored, and how wide a unit is."""

from __future__ import annotations

from dataclasses import dataclass

from storage.architecture import Ffn
from storage.codecs import CODECS, Codec
from storage.errors import UsageError

ATTENTION = (".qkv.weight", ".out.weight")  # how its matrices' names end
_WIDEST = 256  # neurons of a unit: its down rows are products long enough, and a layer has many units
_FEWEST = 4  # units of a layer: what a cache can choose among


@dataclass(frozen=True, slots=True)
class Recipe:
    """The formats that a number of bits stands for. None: as the source has it."""

    bits: int | None = None  # None: the source's own
    ffn: str | None = None
    matrices: str | None = None  # attention, embedding and head
    attention: str | None = None  # where it has another than `matrices`

    @classmethod
    def of(cls, bits: int | None, small: bool = False) -> Recipe:
        """Norms and biases keep their floats; attention and head have eight bits at least, unless `small`.

        Raises UsageError for a number that is not offered.
        """
        if small:
            if bits != 4:
                raise UsageError("--small is for --bits 4")
            return cls.small()
        match bits:
            case None | 16:
                return cls(bits)
            case 8:
                return cls(8, "q8", "q8")
            case 4:
                return cls(4, "q4", "q8")
        raise UsageError(f"bits must be 16, 8 or 4, not {bits}")

    @classmethod
    def small(cls) -> Recipe:
        """Four bits without minima in attention, too, as GGUF's Q4_0: where eight would fill the memory."""
        return cls(4, "q4s", "q8", attention="q4s")

    def matrix(self, name: str) -> str | None:
        """The format of a resident matrix."""
        return (self.attention if name.endswith(ATTENTION) else None) or self.matrices


AS_IT_IS = Recipe()


def chosen(source: str, wanted: str | None, width: int) -> str:
    """The format of rows of `width` values: what is wanted, unless the source has no more bits than that.

    Rows that are no whole groups stay as they are.
    """
    if wanted is None or not CODECS[wanted].fits(width):
        return source
    return source if _bits(CODECS[source]) <= _bits(CODECS[wanted]) else wanted


def _bits(codec: Codec) -> int:
    return codec.grouped.bits if codec.grouped else 8 * codec.bytes


def unit_width(ffn: Ffn, low: bool) -> int:
    """Neurons of a unit. A neuron that may be left out is a unit of its own, and so is one in 16 bits.

    In few bits a neuron is too small for a read of its own, and the down rows of several can lie by output,
    in groups along the neurons, as published files have them.
    """
    if ffn.sparse or not low:
        return 1
    most = min(_WIDEST, ffn.neurons // _FEWEST)
    fitting = (width for width in range(most, 0, -1) if ffn.neurons % width == 0)
    return next((width for width in fitting if CODECS["q4"].fits(width)), 1)
