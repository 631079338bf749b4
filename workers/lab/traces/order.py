"""Where neurons should lie: a one-to-one linear order by co-activation (Ripple, arXiv 2410.19274).

Neurons that are used together become neighbours, so that their reads join. Pairs are linked from
the most to the least co-active, each neuron with at most two, never into a circle; the paths that
result follow each other, the hottest first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.lab.offline.trace import Trace

PARTNERS = 32  # of each neuron that may become its neighbours
I32 = npt.NDArray[np.int32]


def co_activation(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """`[d_ff, d_ff]`: tokens of `masks` `[tokens, d_ff]` that use both; zero with itself."""
    used = masks.astype(np.float32)
    counts = used.T @ used
    np.fill_diagonal(counts, 0)
    return counts


def friends(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """Each neuron's closest friend: the one that is used together with it most often."""
    return np.asarray(co_activation(masks).argmax(axis=1))


def linear_order(trace: Trace) -> I32:
    """`[layers, d_ff]`: the neuron at each position."""
    return np.stack([_place(trace.masks(trace.used, layer)) for layer in range(trace.layers)])


def _place(masks: npt.NDArray[np.bool_]) -> I32:
    counts = co_activation(masks)
    links = _links(counts)
    uses = masks.sum(axis=0)
    placed: list[list[int]] = []
    seen = np.zeros(len(counts), np.bool_)
    for start in np.argsort([len(some) for some in links], kind="stable").tolist():
        if not seen[start]:
            placed.append(_walk(start, links, seen))
    placed.sort(key=lambda path: -float(uses[path].mean()))
    return np.array([neuron for path in placed for neuron in path], np.int32)


def _links(counts: npt.NDArray[np.float32]) -> list[list[int]]:
    """Each neuron's neighbours, at most two, chosen greedily."""
    size = len(counts)
    some = min(PARTNERS, size - 1)
    partners = np.argpartition(-counts, some - 1, axis=1)[:, :some]
    first = np.repeat(np.arange(size), some)
    second = partners.ravel()
    weights = counts[first, second]
    links: list[list[int]] = [[] for _ in range(size)]
    root = list(range(size))

    def find(node: int) -> int:
        while root[node] != node:
            root[node] = root[root[node]]
            node = root[node]
        return node

    for edge in np.argsort(-weights, kind="stable").tolist():
        a, b = int(first[edge]), int(second[edge])
        if weights[edge] == 0:
            break
        if len(links[a]) < 2 and len(links[b]) < 2 and find(a) != find(b):
            links[a].append(b)
            links[b].append(a)
            root[find(a)] = find(b)
    return links


def _walk(start: int, links: list[list[int]], seen: npt.NDArray[np.bool_]) -> list[int]:
    """The path from one of its ends."""
    path, here = [start], start
    seen[start] = True
    while following := [one for one in links[here] if not seen[one]]:
        here = following[0]
        seen[here] = True
        path.append(here)
    return path
