"""The step cache: config, policy (pure decisions), signal, hook, adapter, registry of extractors."""
