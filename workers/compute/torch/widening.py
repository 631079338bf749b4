"""Every codec's values as float32, by torch's own operations: rows are widened where they lie.

A value is the one that `storage.codecs` widens to, bit for bit.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from storage.codecs import F32, FLOATS, Codec
from storage.layout import Role, Rows, Unit
from storage.lowbits import CENTRE, RUN, Grouped
from storage.microscaled import TWICE, halved


def stored(rows: Rows, where: torch.device) -> Tensor:
    """A matrix as it is stored, on a device: floats [lines, width], others [lines, bytes]."""
    values = torch.from_numpy(rows.values)
    if rows.codec.name in FLOATS:
        values = values.view(getattr(torch, rows.codec.name))
    return values.to(where)


def rows_of(units: Tensor, unit: Unit, role: Role) -> Tensor:
    """A role's rows of units [n, stride] bytes, as float32: [n, rows, width]."""
    (start, stop), (count, width), codec = unit.span(role), unit.shape(role), unit.codec(role)
    values = units[:, start:stop]
    if codec.name in FLOATS:
        return values.view(getattr(torch, codec.name)).float().view(len(units), count, width)
    return widened(values.reshape(len(units) * count, -1), codec).view(len(units), count, width)


def widened(values: Tensor, codec: Codec) -> Tensor:
    """[lines, width] float32 of a `stored` matrix's lines."""
    if codec.name in FLOATS:
        return values.float()
    match codec.grouped:
        case None:  # a format from outside, which torch does not know
            return torch.from_numpy(codec.widen(values.cpu().numpy().view(codec.carrier))).to(values.device)
        case Grouped() as grouped:
            return _grouped(values, grouped)
        case micro:
            return _micro(values, micro.bytes)


def _grouped(values: Tensor, grouped: Grouped) -> Tensor:
    lines, groups = values.shape[0], values.shape[1] // grouped.bytes
    end = groups * grouped.group * grouped.bits // 8
    if grouped.bits == 8:
        codes = values[:, :end].contiguous().view(torch.int8).float()
    else:
        codes = _halves(values[:, :end]).float()
        if not grouped.minima:
            codes -= CENTRE
    tables = values[:, end:].contiguous().view(torch.float16).view(lines, grouped.tables, groups, 1).float()
    found = codes.view(lines, groups, grouped.group) * tables[:, 0]
    if grouped.minima:
        found += tables[:, 1]
    return found.view(lines, -1)


def _micro(values: Tensor, size: int) -> Tensor:
    lines, groups = values.shape[0], values.shape[1] // size
    end = values.shape[1] - groups
    twice, scales = _tables(values.device)
    codes = twice[_halves(values[:, :end]).int()].view(lines, groups, -1)
    return (codes * scales[values[:, end:].int()][..., None]).view(lines, -1)


def _halves(packed: Tensor) -> Tensor:
    """Codes of four bits, [lines, values], from [lines, bytes]."""
    runs = packed.reshape(packed.shape[0], -1, RUN // 2)
    return torch.cat((runs & 15, runs >> 4), dim=2).view(packed.shape[0], -1)


@cache
def _tables(where: torch.device) -> tuple[Tensor, Tensor]:
    """Of MXFP4: a code's value, doubled, and what doubled codes are multiplied with, by their bytes."""
    scales: F32 = halved(np.arange(256, dtype=np.uint8))
    return torch.from_numpy(TWICE).float().to(where), torch.from_numpy(scales).to(where)
