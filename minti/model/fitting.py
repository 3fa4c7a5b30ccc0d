"""Bringing together learned words and text encoders, of which there are some for words of special kinds."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .checks import OUTPUT, LearnedWord, check_fit, check_vectors, has_outputs, is_per_layer
from .output_embedding import TextEncoderWithOutputs
from .per_layer import TextEncoderPerLayer, layer_names, tables_of
from .unet import UNet

SPECIAL = (TextEncoderPerLayer, TextEncoderWithOutputs)


def prepare(
    text_encoder: nn.Module, unet: UNet, *, per_layer: bool = False, output_embedding: bool = False
) -> nn.Module:
    """A text encoder with which words of a kind can be learned, by default plain ones.

    Raises:
        InputError: the model cannot have such words, or knows words of another special kind already.
    """
    if per_layer and output_embedding:
        raise InputError("words per layer and output embeddings do not go together; choose one of the two")
    kind = TextEncoderPerLayer if per_layer else TextEncoderWithOutputs if output_embedding else None
    if isinstance(text_encoder, SPECIAL):
        if type(text_encoder) is not kind:
            known = "words per layer" if isinstance(text_encoder, SPECIAL[0]) else "output embeddings"
            raise InputError(
                f"the model knows {known}, which exclude words of this kind; load it without those"
            )
        return text_encoder
    if output_embedding:
        return TextEncoderWithOutputs(text_encoder)
    return TextEncoderPerLayer(text_encoder, unet) if per_layer else text_encoder


def fit_word(word: LearnedWord, text_encoder: nn.Module, unet: UNet) -> tuple[nn.Module, Tensor]:
    """Bring together a word and a text encoder, either of which may be of a special kind.

    Returns:
        The text encoder, which is made ready for the word; and the vectors of the word with columns for each
        of its tables: (num_vectors, D), or (num_vectors, layers*D) where it reads per layer, or
        (num_vectors, 2*D) where its output is replaced.

    Raises:
        InputError: the word was learned for another kind of model.
    """
    check_vectors(word)
    vectors, own = word.vectors, plain_widths(text_encoder)
    layers, outputs = is_per_layer(word.widths), has_outputs(word.widths)
    if isinstance(text_encoder, SPECIAL) and not word.widths and vectors.shape[1] != sum(own.values()):
        own = {table.key: table.weight.shape[1] for table in tables_of(text_encoder)}  # a word to be learned
    elif layers and len(own) == 1:
        own = dict.fromkeys(layer_names(unet), *own.values())
    elif outputs:
        there = {key + OUTPUT: width for key, width in own.items()}
        own = there if len(word.widths) == len(there) else own | there
    check_fit(word, own)
    if layers or outputs:
        text_encoder = prepare(text_encoder, unet, per_layer=layers, output_embedding=outputs)
    missing = sum(table.weight.shape[1] for table in tables_of(text_encoder)) - vectors.shape[1]
    if isinstance(text_encoder, TextEncoderWithOutputs):
        return text_encoder, F.pad(vectors, (missing, 0) if outputs else (0, missing))
    return text_encoder, vectors.repeat(1, 1 + missing // vectors.shape[1])


def plain_widths(text_encoder: nn.Module) -> dict[str, int]:
    """The parts of a plain word's vectors and their widths: one for each of SDXL's text encoders, or one."""
    tables = [table for table in tables_of(text_encoder) if not table.key.endswith(OUTPUT)]
    if isinstance(text_encoder, TextEncoderPerLayer):
        return {"": tables[0].weight.shape[1]}
    return {table.key: table.weight.shape[1] for table in tables}
