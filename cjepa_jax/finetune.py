"""Fine-tune the encoder of a checkpoint on labelled images: another name of cjepa_jax.main.

    python -m cjepa_jax.finetune --config=configs/finetune_vitb16.py --checkpoint=runs/vitb16

is the same as

    python -m cjepa_jax.main --config=configs/finetune_vitb16.py --init=runs/vitb16

whose --help explains all flags.
"""

from cjepa_jax.main import main

if __name__ == "__main__":
    main()
