"""minti: Textual Inversion with Stable Diffusion, from scratch, in a few readable files."""

from .concept import Concept
from .config import InputError
from .inversion import learn
from .pipeline import StableDiffusion, load

__version__ = "0.1.0"
__all__ = ["Concept", "InputError", "StableDiffusion", "__version__", "learn", "load"]
