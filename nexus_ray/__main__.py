"""`python -m nexus_ray` is the same as `nexus-ray`."""

from nexus_ray.cli import main

main()
