"""Ray job: router statistics of the base model (`nexus-ray collect`)."""

from _entry import run

if __name__ == "__main__":
    run("collect")
