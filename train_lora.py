"""Contrastive LoRA training: ``accelerate launch train_lora.py --config train_configs/….yaml``."""

import logging
import sys

from persona_lora.core.errors import UserError
from persona_lora.training.contrastive import main

if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("persona_lora").setLevel(logging.INFO)
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
