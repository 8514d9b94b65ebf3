"""Both training stages, on transformers.Trainer."""
