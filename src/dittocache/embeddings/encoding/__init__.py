"""Computing the missing records: batches, memory, stopping, many workers."""
