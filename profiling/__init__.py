"""Where the time and the bytes went. ``profiling.mark`` and ``profiling.phase`` put a job's own words on the axis."""

from workbench.marks import mark, phase

__all__ = ["mark", "phase"]
