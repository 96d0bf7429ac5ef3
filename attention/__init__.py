"""Paged attention over strided views of the pool. Knows nothing of requests, LoRA or the engine."""
