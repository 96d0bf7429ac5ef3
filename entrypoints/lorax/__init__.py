"""LoRAX's routes: their requests, their answers."""
