"""Our own attention for the GPU, and the choice between it and PyTorch's. Works without Triton installed."""

from .choice import METHODS, chosen, flash_attention, timings, use

__all__ = ["METHODS", "chosen", "flash_attention", "timings", "use"]
