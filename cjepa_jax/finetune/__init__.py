"""Fine-tuning: a pre-trained encoder and a linear classifier, trained together on labelled images."""
