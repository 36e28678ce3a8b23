"""What the encoders computed, on disk: records, loose or packed, that prove themselves when read."""
