"""What SDXL has and other models have not (Podell et al. 2023, arXiv 2307.01952, sections 2.1 and 2.2).

Most models have one text encoder, whose output is all that the UNet attends to. SDXL has two, side by side:
the UNet attends to both outputs, one beside the other, and is also told, by way of the time embedding, a
summary of the prompt and six numbers: the size of the photo, where it was cropped, and the size of the
result. Either kind turns token ids into a `TextOutput`, and the rest of minti does not tell them apart.
"""

import torch
from torch import Tensor, nn

from ..errors import InputError
from .blocks import TimeEmbedding, timestep_embedding
from .clip import CLIPTextModel, TextOutput, first_end


class AddedEmbedding(TimeEmbedding):
    """What SDXL adds to the embedding of the time step."""

    def forward(self, added: tuple[Tensor, ...] | None) -> Tensor:
        """Pooled text (N, P), and sizes and crops in pixels (N, 6), to (N, time_dim).

        Raises:
            InputError: they are not given.
        """
        if added is None:
            raise InputError(
                "this UNet has SDXL's add_embedding: it also needs pooled text, sizes and crops (`added`)"
            )
        pooled, sizes = added
        width = (self.linear_1.in_features - pooled.shape[1]) // sizes.shape[1]  # 256 in SDXL
        sizes = timestep_embedding(sizes.flatten(), width)  # (N, 6) -> (6N, width)
        sizes = sizes.view(len(pooled), -1).to(self.linear_1.weight.dtype)  # (6N, width) -> (N, 6*width)
        return super().forward(torch.cat([pooled, sizes], dim=-1))


class TwoTextEncoders(nn.Module):
    """SDXL's text side: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14 read the same prompt.

    Both have the same vocabulary, but fill up short prompts with different tokens, which the UNet sees. The
    rows of a learned word have one part for each encoder, (num_vectors, D1 + D2), as the context has.

    Args:
        text_encoder, text_encoder_2: the second has a text projection.
        pad_2: the id that fills up prompts of the second encoder; the first takes them as they come.

    Attributes:
        context_layer: the layer of both that becomes the context, counted from the end.
    """

    def __init__(self, text_encoder: CLIPTextModel, text_encoder_2: CLIPTextModel, pad_2: int) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.pad_2 = text_encoder, text_encoder_2, pad_2
        self.context_layer = 2
        first, second = text_encoder.token_embedding, text_encoder_2.token_embedding
        first.key, second.key, width = "clip_l", "clip_g", text_encoder.config.hidden_size
        second.columns = slice(width, width + text_encoder_2.config.hidden_size)

    def forward(self, ids: Tensor) -> TextOutput:
        """Encode token ids, (B, 77) int64, as the first encoder's tokenizer gives them.

        Returns:
            context (B, 77, D1 + D2): the last layer but one of either encoder, or another `context_layer`,
                without final normalisation;
            pooled (B, P): the projected output of the second encoder at the end token.
        """
        end = first_end(ids, self.text_encoder.config.eos_token_id)  # (B,)
        behind = torch.arange(ids.shape[1], device=ids.device) > end[:, None]  # (B, 77)
        first, second = self.text_encoder(ids), self.text_encoder_2(ids.masked_fill(behind, self.pad_2))
        context = torch.cat([text.hidden_states[-self.context_layer] for text in (first, second)], dim=-1)
        return TextOutput(context, pooled=second.pooled)
