"""Model architectures and weight loading. Models know neither LoRA nor the attention backend."""
