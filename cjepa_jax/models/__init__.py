"""The networks: pure Flax modules."""
