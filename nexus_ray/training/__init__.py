"""Training on Ray Train: distilling shared experts, and pretraining the embedded model."""
