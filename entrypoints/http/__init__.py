"""The server around the protocols: keys, limits, streaming, metrics, supervision."""
