"""The suite runs on 8 fake CPU devices, without a network, and with warnings as errors (pyproject.toml)."""

import os
import sys

assert "jax" not in sys.modules, "the devices are counted when jax is imported: nothing may import it before this file"

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # [B] with [B,T] is a mistake more often than it is meant
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and a fork do not go together
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
