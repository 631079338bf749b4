"""Programs around the ring that are no workers: they train, measure, compare and synthesise.

Each package is one command. `offline` is what several of them share: the whole model without a ring.
Nothing outside imports from here.
"""
