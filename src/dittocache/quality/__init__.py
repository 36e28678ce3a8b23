"""What a cache costs in picture quality: metrics and reports."""
