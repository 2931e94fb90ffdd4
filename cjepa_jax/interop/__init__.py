"""Checkpoints of others: I-JEPA's release, timm, transformers."""
