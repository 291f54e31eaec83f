"""What finetuning did to character, predicted and prevented."""
