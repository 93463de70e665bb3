"""Which sequences a worker reads at a step, and reading them ahead."""
