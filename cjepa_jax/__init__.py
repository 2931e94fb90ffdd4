"""C-JEPA (I-JEPA + VICReg) pre-training of Vision Transformers in JAX."""
