"""The engine: requests, the page pool, the scheduler, the step loop, the model runner and the APIs.

Start reading at `core.py: EngineCore.step`. The host half (what lies here, and all of memory,
scheduling and adapters) imports no torch.
"""
