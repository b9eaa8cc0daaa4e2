"""Which method, and which settings, for somebody's data, model and hardware: by published rules, without training."""
