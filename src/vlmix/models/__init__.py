"""The transformers surface: configuration, model, processor, plan."""
