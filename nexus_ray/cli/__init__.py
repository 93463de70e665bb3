"""The command line: verbs only. Each parses, calls one function and prints.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted (the same command continues).
"""

from nexus_ray.cli.main import main, run_command

__all__ = ["main", "run_command"]
