"""Sizes a TPU slice without one: compiles the step for it and predicts what it costs."""
