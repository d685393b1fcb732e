"""Seeded schedules of everything that can die, in one process and in no time. A failing seed replays exactly.

    level 0, operations   random calls of the manager's core, all checked after each
    level 1, stores       manager's core and scripted executor over the same bytes, killed at every store
    level 2, messages     the product's managers, executors, frontends and clients over a network that fails

`campaign` plays many seeds on all cores, `command` is `scripts/simulate`.
"""
