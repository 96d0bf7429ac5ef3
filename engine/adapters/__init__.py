"""Adapters as the scheduler sees them: fetched, loaded, pinned, swapped. No torch."""
