"""Training with TRL: recipes, what trains, adapters, checkpoints, and the memory that a run needs."""
