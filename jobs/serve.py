"""Ray job: the HTTP service, until the job is stopped (`nexus-ray serve`)."""

from _entry import run

if __name__ == "__main__":
    run("serve")
