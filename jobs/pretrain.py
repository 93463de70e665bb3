"""Ray job: a small MoE trained from scratch (`nexus-ray pretrain`)."""

from _entry import run

if __name__ == "__main__":
    run("pretrain")
