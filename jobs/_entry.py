"""What every job does: make the repository importable and hand over to the command line.

The files here are entry points for `ray job submit --working-dir . -- python jobs/pipeline.py CONFIG`. Their
arguments, messages and exit codes are those of `nexus-ray VERB`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from _requirements import require_fitting_cluster


def run(verb: str) -> None:
    """Run `nexus-ray VERB` with this process's arguments and exit with its code.

    Python put this directory first on the search path. The repository takes its place: then `nexus_ray` need
    not be installed, and `jobs/select.py` does not shadow the standard library's `select`, here or in Ray's
    workers. These find it by Ray's copy of the working directory, which comes before what is installed.
    """
    repository = Path(__file__).resolve().parents[1]
    sys.path[0] = str(repository)
    require_fitting_cluster(repository)
    from nexus_ray.cli import main

    main([verb, *sys.argv[1:]])
