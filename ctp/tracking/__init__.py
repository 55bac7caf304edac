"""MLflow, written from the store: one experiment per grid, one run per cell."""
