"""Ray job: the whole pipeline; finished stages are skipped (`nexus-ray run`)."""

from _entry import run

if __name__ == "__main__":
    run("run")
