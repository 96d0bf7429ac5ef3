"""Who runs next: queues, fairness, admission, whom a failed step is blamed on. No torch."""
