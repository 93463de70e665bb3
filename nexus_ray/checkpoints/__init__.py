"""Model files: reading a base lazily, MXFP4, writing checkpoints and overlays."""
