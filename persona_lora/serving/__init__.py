"""An OpenAI-compatible server whose personas are mixes of directions."""
