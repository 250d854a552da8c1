"""Many processes, each with its share of one model, on torch's own engine (FSDP2)."""
