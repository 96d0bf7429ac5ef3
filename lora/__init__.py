"""Adapters: PEFT loading, page images, host store, batched LoRA ops and layers.

Knows nothing of requests, attention or the engine; what it needs of them is a Protocol it declares.
"""
