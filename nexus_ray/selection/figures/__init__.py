"""Figures of an expert selection, drawn from its record and the router statistics."""
