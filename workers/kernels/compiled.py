"""Whether kernels are compiled: numba tells when it has found none in its cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from numba.core.event import Event, Listener, install_listener


class NotCompiled(Exception):
    """A kernel is not in the cache."""


class _Refusing(Listener):
    def on_start(self, event: Event) -> None:
        raise NotCompiled

    def on_end(self, event: Event) -> None:
        """Nothing was begun."""


@contextmanager
def only_loaded() -> Iterator[None]:
    """Kernels are loaded, and none is compiled. Raises NotCompiled where one would have to be."""
    with install_listener("numba:compile", _Refusing()):
        yield
