"""What a page shows of runs, from their event streams and living processes: one run as it goes, all runs as a list."""
