"""LoRA fine-tuning on cached or live embeddings."""
