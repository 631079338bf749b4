"""A bounded queue that is fair between clients: they take turns, each one's items in order."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

from pipeline.errors import QueueFull

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Not thread-safe: its owner holds a lock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._turns: OrderedDict[Hashable, deque[Item]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, client: Hashable, item: Item) -> None:
        """Raises QueueFull when `limit` items wait already."""
        if self._length >= self.limit:
            raise QueueFull(f"{self._length} requests are waiting already; try again later")
        self._turns.setdefault(client, deque()).append(item)
        self._length += 1

    def pop(self) -> Item | None:
        """The next item, of the client whose turn it is; None when nothing waits."""
        if not self._turns:
            return None
        client, items = self._turns.popitem(last=False)
        item = items.popleft()
        if items:
            self._turns[client] = items  # behind all others
        self._length -= 1
        return item

    def remove(self, client: Hashable, item: Item) -> bool:
        """Take an item out of the queue; False when it is not in it."""
        items = self._turns.get(client)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._turns[client]
        self._length -= 1
        return True

    def order(self) -> list[Item]:
        """All items in the order in which `pop` would give them."""
        rounds = max((len(items) for items in self._turns.values()), default=0)
        return [items[turn] for turn in range(rounds) for items in self._turns.values() if turn < len(items)]
