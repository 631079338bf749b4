"""Rows in eight and four bits by their description alone: the reference for tests, value by value.

A row is the codes of all its groups, then a float16 scale of each group, then, where the format has them, a
float16 minimum of each. Nothing here calls the code that is tested.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Format:
    """What the name of a codec stands for."""

    bits: int
    group: int  # values that share a scale
    minima: bool = False

    def row_bytes(self, width: int) -> int:
        return width * self.bits // 8 + width // self.group * (4 if self.minima else 2)


FORMATS = {
    "q8": Format(8, 32),
    "q8g64": Format(8, 64),
    "q8g128": Format(8, 128),
    "q4": Format(4, 32, minima=True),
    "q4g64": Format(4, 64, minima=True),
    "q4g128": Format(4, 128, minima=True),
    "q4s": Format(4, 32),
    "q4sg64": Format(4, 64),
    "q4sg128": Format(4, 128),
}


def code(row: bytes, place: int, form: Format) -> int:
    """The whole number of the value at this place."""
    if form.bits == 8:
        return row[place] - 256 * (row[place] > 127)
    byte = row[place // 32 * 16 + place % 16]  # holds the values i and 16 + i of 32
    whole = byte >> 4 if place % 32 >= 16 else byte & 15
    return whole if form.minima else whole - 8


def values(rows: np.ndarray, form: Format) -> np.ndarray:
    """float64 [rows, width] of bytes [rows, bytes]; exact."""
    found = []
    for row in map(bytes, rows):
        groups = len(row) // form.row_bytes(form.group)
        width = groups * form.group
        tables = np.array(struct.unpack_from(f"<{(1 + form.minima) * groups}e", row, width * form.bits // 8))
        scales, minima = tables[:groups], tables[groups:] if form.minima else np.zeros(groups)
        codes = np.array([code(row, place, form) for place in range(width)], np.float64)
        found.append(codes * scales.repeat(form.group) + minima.repeat(form.group))
    return np.array(found)


def sizes(rows: np.ndarray, form: Format) -> np.ndarray:
    """What kernels add up for each value, all of one sign: four bits' codes count from 0, and zero apart."""
    if form.bits == 8:
        return np.abs(values(rows, form))
    found = []
    for row, exact in zip(map(bytes, rows), values(rows, form), strict=True):
        groups = exact.size // form.group
        tables = np.array(struct.unpack_from(f"<{(1 + form.minima) * groups}e", row, exact.size // 2))
        zero = np.abs(tables[groups:] if form.minima else 8 * tables).repeat(form.group)
        codes = np.array([code(row, place, form) for place in range(exact.size)]) + 8 * (not form.minima)
        found.append(np.abs(codes * tables[:groups].repeat(form.group)) + zero)
    return np.array(found)


def random_rows(seed: int, count: int, width: int, form: Format) -> np.ndarray:
    """Bytes [count, bytes]: any codes, and scales and minima of both signs about 0.01."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (count, form.row_bytes(width)), np.uint8)
    behind = width * form.bits // 8
    tables = rng.uniform(-0.02, 0.02, (count, (rows.shape[1] - behind) // 2)).astype("<f2")
    rows[:, behind:] = tables.view(np.uint8)
    return rows
