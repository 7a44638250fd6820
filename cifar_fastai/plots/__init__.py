"""Pictures of a run: arrays in, a matplotlib Figure out."""
