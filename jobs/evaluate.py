"""Ray job: base against student on held-out text (`nexus-ray evaluate`)."""

from _entry import run

if __name__ == "__main__":
    run("evaluate")
