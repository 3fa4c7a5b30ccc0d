"""A short hash of a model's weights, by which runs and scores recognise the model they were made with."""

import hashlib

import torch
from torch import nn

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLES = 64


@torch.no_grad()
def model_hash(*modules: nn.Module) -> str:
    """Hash the weights of some modules, in the dtype they are held in: 12 hexadecimal digits.

    Of every parameter the hash covers its name, its shape, 64 numbers spread evenly over it, and the sum of
    the bits of all its numbers. Integers are added up exactly, so the sum does not depend on the device or on
    the number of threads. Words that were added to a text encoder do not count.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, weight in module.named_parameters():
            if ".words." in name:
                continue
            bits = weight.view(BITS[weight.element_size()])
            flat = bits.flatten()  # in the order of the indices, whatever the memory format
            samples = flat[:: max(1, flat.numel() // SAMPLES)]
            digest.update(f"{name} {tuple(weight.shape)} {bits.sum(dtype=torch.int64).item()}".encode())
            digest.update(samples.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
