"""Measures speed on the machine at hand."""
