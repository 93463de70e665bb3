"""The report of an expert selection: what to do, the evidence beside chance, and which experts serve which text."""
