"""A model of a run on paper: time, GPU-hours, bytes and money of every stage, from shapes and per-unit figures.

`nexus-ray plan` and docs/scaling.md use the same functions.
"""
