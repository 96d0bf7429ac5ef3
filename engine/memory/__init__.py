"""The page pool, the KV blocks in it, and who must leave it when it is full. No torch."""
