"""The engine: requests, the page pool, the scheduler, the step loop, the model runner and the APIs.

Start reading at `core.py: EngineCore.step`. The host half (config, request, page_pool, kv_manager,
adapter_manager, scheduler, step) imports no torch.
"""
