"""``python -m persona_lora`` is the ``persona-lora`` command."""

from persona_lora.cli import main

if __name__ == "__main__":
    main()
