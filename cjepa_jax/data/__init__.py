"""Images from where they are stored to uint8 batches."""
