"""Reads and writes the checkpoints of other programs: I-JEPA's release, timm and transformers."""
