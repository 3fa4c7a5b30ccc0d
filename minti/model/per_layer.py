"""Words with vectors of their own for each cross-attention layer of the UNet.

This is the extended textual inversion, XTI, of P+ (Voynov et al. 2023, arXiv 2303.09522). The text encoder
reads every prompt once for each layer, with the vectors of that layer in the place of the word, and each
layer attends to its own output. A word that has the same vectors for all layers is an ordinary word.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from .clip import TextOutput
from .embedding import TokenEmbedding
from .unet import UNet


def tables_of(text_encoder: nn.Module) -> list[TokenEmbedding]:
    """All tables in a text encoder, of which a word has columns in every one."""
    return [module for module in text_encoder.modules() if isinstance(module, TokenEmbedding)]


def layer_names(unet: UNet) -> list[str]:
    """The cross-attention layers in the order of the forward pass, named as in kohya's files.

    In Stable Diffusion 1 and 2 these are IN01, IN02, IN04, IN05, IN07, IN08, MID, OUT03, ..., OUT11: the
    numbers count the `input_blocks` and `output_blocks` of the original code, where `conv_in` is input block
    0, and a reduction of the resolution is a block of its own.
    """
    names, index = [], 1
    for block in unet.down_blocks:
        names += [f"IN{index + i:02}" for i in range(len(block.attentions))]
        index += len(block.resnets) + len(block.downsamplers)
    if unet.mid_block is not None:
        names += ["MID" for _ in unet.mid_block.attentions]
    index = 0
    for block in unet.up_blocks:
        names += [f"OUT{index + i:02}" for i in range(len(block.attentions))]
        index += len(block.resnets)
    return names


class LayerTables(nn.ModuleList):
    """The table of word vectors once for each layer: the vocabulary is shared, rows of words are not."""

    def __init__(self, table: TokenEmbedding, names: Sequence[str]) -> None:
        super().__init__()
        vocab_size, width = table.weight.shape
        words = [nn.Parameter(p.repeat(1, len(names)), requires_grad=False) for p in table.words]
        for i, name in enumerate(names):
            with torch.device("meta"):
                own = TokenEmbedding(vocab_size, width)
            own.weight, own.key, own.columns = table.weight, name, slice(i * width, (i + 1) * width)
            own.words.extend(words)
            self.append(own)

    def forward(self, ids: Tensor) -> Tensor:
        """(layers*B, L) ids, those of one layer behind those of another, to (layers*B, L, D)."""
        return torch.cat([table(part) for table, part in zip(self, ids.chunk(len(self)), strict=True)])


class TextEncoderPerLayer(nn.Module):
    """A text encoder that reads prompts for each cross-attention layer by itself.

    Args:
        text_encoder: of CLIP or BERT; its table of word vectors is replaced.
        unet: that the context is for.

    Raises:
        InputError: the model has several text encoders, or several cross-attentions in a layer.
    """

    def __init__(self, text_encoder: nn.Module, unet: UNet) -> None:
        super().__init__()
        places = [
            (parent, name)
            for parent in text_encoder.modules()
            for name, child in parent.named_children()
            if isinstance(child, TokenEmbedding)
        ]
        if len(places) != 1 or unet.add_embedding is not None:
            raise InputError("words per layer are for models with one text encoder, which SDXL is not")
        ((parent, name),) = places
        self.layers = layer_names(unet)
        self.text_encoder = text_encoder
        self.tables = LayerTables(getattr(parent, name), self.layers)
        setattr(parent, name, self.tables)

    def forward(self, ids: Tensor) -> TextOutput:
        """Encode token ids, (B, L) int64; the context is (B, L, layers*D), one layer beside the other."""
        n = len(self.layers)
        context = self.text_encoder(ids.repeat(n, 1)).context  # (layers*B, L, D)
        return TextOutput(torch.cat(context.chunk(n), dim=-1))
