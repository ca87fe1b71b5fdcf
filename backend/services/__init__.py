"""The domain: the pool, the file, the sequence. It knows no framework."""
