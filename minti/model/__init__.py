"""The frozen model: tokenizer, text encoders, UNet, autoencoder, noise schedule, and the sampler around them.

This room knows no file and no training: `formats` fills the modules with weights, and `inversion` learns rows
for the text encoder's table. `stable_diffusion.py` puts the parts together. Beside the
reading path lie checks, options such as long prompts, tiles and kernels, and parts that few models have.
"""
