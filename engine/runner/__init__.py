"""From a step on the host to tokens: devices, batches, model runners, sampling."""
