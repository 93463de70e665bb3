"""The sections of `report.md`, one file a subject; each gives Markdown blocks."""
