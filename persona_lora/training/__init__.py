"""Contrastive finetuning; the only place that knows TRL."""
