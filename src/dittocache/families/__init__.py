"""Everything model-specific, one file a model family; nothing outside this room names a model."""
