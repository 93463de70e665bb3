"""Figures: what a training did, several side by side, its schedules, an evaluation, and a run's timeline."""

from nexus_ray.plots.evaluation import plot_drift, plot_perplexity
from nexus_ray.plots.runs import compare_runs
from nexus_ray.plots.schedules import plot_schedules
from nexus_ray.plots.timeline import plot_story
from nexus_ray.plots.training import plot_training

__all__ = ["compare_runs", "plot_drift", "plot_perplexity", "plot_schedules", "plot_story", "plot_training"]
