"""The Learner and what trains it."""
