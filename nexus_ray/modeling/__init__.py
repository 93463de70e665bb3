"""The model: shared experts, MXFP4 weights, loading a base with or without an overlay."""
