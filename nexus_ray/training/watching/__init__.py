"""What a training says about itself: metrics, progress, warnings, trackers."""
