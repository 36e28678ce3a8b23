"""The reference-image KV cache: config, hook, attention, memory."""
