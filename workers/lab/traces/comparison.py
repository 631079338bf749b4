"""Everything that a trace is replayed with, by name: policies, and of experts ways to divide the slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.planner.need import by_need
from workers.cache.policy import Policy
from workers.lab.offline import pool, replay
from workers.lab.offline.replay import Make, Outcome
from workers.lab.offline.trace import Trace

Run = Callable[[int], Outcome]  # with so many slots a layer


def runs(
    trace: Trace, earlier: Trace, windows: Sequence[int], half_lives: Sequence[float], warm_up: int
) -> dict[str, Run]:
    """`earlier`: another text's trace, which tells the hot neurons, and what each layer needs."""

    def alike(make: Make) -> Run:
        return lambda slots: replay.replay(trace, [slots] * trace.layers, make, warm_up)

    def divided(make: Make) -> Run:
        def run(slots: int) -> Outcome:
            floors = [trace.top_k] * trace.layers
            needs = pool.needs(earlier, [trace.d_ff] * trace.layers)
            some = by_need(needs.hits, floors, slots * trace.layers)
            return replay.replay(trace, some, make, warm_up)

        return run

    def pooled(make: Callable[[], Policy]) -> Run:
        return lambda slots: pool.replay(trace, slots * trace.layers, make(), warm_up)

    made = replay.policies(trace, earlier, windows, half_lives)
    found = {name: alike(make) for name, make in made.items()}
    if trace.top_k:
        names = [f"LRFU {half_life:g}" for half_life in half_lives]
        found |= {f"{name}, slots by need": divided(made[name]) for name in names}
        found |= {name: pooled(make) for name, make in pool.pooled(trace, half_lives).items()}
    return found
