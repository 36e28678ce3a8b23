"""The embedding cache: recipe -> key, store, manifest, plan, encode."""
