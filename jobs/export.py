"""Ray job: a standalone Hugging Face directory (`nexus-ray export`)."""

from _entry import run

if __name__ == "__main__":
    run("export")
