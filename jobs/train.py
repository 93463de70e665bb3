"""Ray job: distillation of the shared experts (`nexus-ray train`)."""

from _entry import run

if __name__ == "__main__":
    run("train")
