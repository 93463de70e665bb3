"""Model files: reading a base lazily, writing and reading overlays, exporting."""
