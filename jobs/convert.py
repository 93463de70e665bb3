"""Ray job: the shared experts' initial overlay (`nexus-ray convert`)."""

from _entry import run

if __name__ == "__main__":
    run("convert")
