"""Ray job: teacher targets for offline distillation (`nexus-ray precompute`)."""

from _entry import run

if __name__ == "__main__":
    run("precompute")
