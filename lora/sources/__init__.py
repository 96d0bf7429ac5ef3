"""Where adapters come from: a reference in, a local directory and its version out.

Knows nothing of requests, pages or images, and imports no torch before it is needed.
"""
