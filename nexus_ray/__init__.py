"""nexus-ray: specialise a Mixture-of-Experts language model with trainable shared experts, on Ray."""

__version__ = "0.1.0"
