"""Reads images from where they are stored and makes uint8 batches of them."""
