"""Ray job: which experts matter in each layer (`nexus-ray select`)."""

from _entry import run

if __name__ == "__main__":
    run("select")
