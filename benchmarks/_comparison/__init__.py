"""The parts of comparison.py: methods of adaptation, their text and training, what the runs came to."""
