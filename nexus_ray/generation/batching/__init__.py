"""The default engine: transformers' continuous batching, with base and overlays in the same batches."""
