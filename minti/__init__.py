"""minti: Textual Inversion with Stable Diffusion, from scratch, in a few readable files."""

from .errors import InputError
from .formats.checkpoint import load
from .formats.concept import Concept
from .inversion.from_photos import learn
from .model.stable_diffusion import StableDiffusion
from .version import __version__

__all__ = ["Concept", "InputError", "StableDiffusion", "__version__", "learn", "load"]
