"""What decoders are given: sound bytes and JSON, changed in a few places.

Random bytes are refused at the first of them. A sound file with a changed length, a removed field or a number
of another kind goes further.
"""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, math.inf, -math.inf, math.nan, 1e308)
LENGTHS = (0, 1, 7, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def changed(sound: bytes) -> st.SearchStrategy[bytes]:
    """Sound bytes with up to four changes: bits flipped, lengths put in, pieces cut, doubled or added."""
    place = st.integers(0, max(0, len(sound)))
    length = st.sampled_from(LENGTHS)
    change = st.one_of(
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("put"), place, length),
        st.tuples(st.just("cut"), place, st.integers(1, 64)),
        st.tuples(st.just("double"), place, st.integers(1, 64)),
        st.tuples(st.just("add"), place, st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("end"), place, st.just(0)),
    )
    return st.lists(change, min_size=1, max_size=4).map(lambda changes: _applied(sound, changes))


def _applied(data: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    for what, at, more in changes:
        match what:
            case "flip" if at < len(data):
                data = data[:at] + bytes([data[at] ^ 1 << more]) + data[at + 1 :]
            case "put":
                data = data[:at] + more.to_bytes(8, "little") + data[at + 8 :]
            case "cut":
                data = data[:at] + data[at + more :]
            case "double":
                data = data[: at + more] + data[at:]
            case "add":
                data = data[:at] + more + data[at:]
            case "end":
                data = data[:at]
    return data


def anything() -> st.SearchStrategy[Any]:
    """A value of JSON, also of the kinds that only Python's reader takes."""
    leaf = st.one_of(
        st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(-3, 300), st.text(max_size=12)
    )
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=8,
    )


def changed_tree(sound: Any) -> st.SearchStrategy[Any]:
    """A sound tree of JSON with up to three of its values replaced, or removed."""
    places = _places(sound)
    change = st.tuples(st.sampled_from(places), st.one_of(st.just(_GONE), anything()))
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: _replaced(sound, changes))


_GONE = object()


def _places(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [above] if above else []
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        found += _places(value, (*above, key))
    return found


def _replaced(sound: Any, changes: list[tuple[tuple[Any, ...], Any]]) -> Any:
    tree = json.loads(json.dumps(sound))
    for place, value in changes:
        at = tree
        try:
            for key in place[:-1]:
                at = at[key]
            if value is _GONE:
                del at[place[-1]]
            else:
                at[place[-1]] = value
        except (KeyError, IndexError, TypeError):  # an earlier change has removed it
            continue
    return tree


def as_json(tree: Any) -> bytes:
    """With NaN and infinities, which Python's reader takes."""
    return json.dumps(tree).encode(errors="surrogatepass")


def nested() -> st.SearchStrategy[bytes]:
    """Brackets without end."""
    opening = st.sampled_from([b"[", b'{"a":', b"\x91", b"\x81\xa1a", b"("])
    return st.tuples(opening, st.integers(1, 200_000)).map(lambda pair: pair[0] * pair[1])
