"""Contrastive LoRA training: ``accelerate launch train_lora.py --config train_configs/….yaml``."""

import logging
import sys

from persona_lora.cli.program import call_to_end, export_hub_token
from persona_lora.training.contrastive import main

if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("persona_lora").setLevel(logging.INFO)
    arguments = [word for word in sys.argv[1:] if word != "--verbose"]

    def train() -> None:
        export_hub_token()
        main(arguments)

    call_to_end(train, verbose="--verbose" in sys.argv)
