"""Words whose vectors stand in the output of the text encoder instead of in its table of word vectors.

These are the output embeddings of OneTrainer (Nerogar/OneTrainer, `BaseModel._apply_output_embeddings`). The
text encoder reads a row of zeros where the word stands in a prompt. What it gives out at that position is
replaced by the vector of the word: the context as the UNet attends to it, after the final normalisation if
the model has one there. The other positions and SDXL's pooled text stay what the encoder made of the zeros.
No gradient passes through the text encoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import OUTPUT
from .clip import TextOutput
from .embedding import TokenEmbedding
from .per_layer import tables_of


class TextEncoderWithOutputs(nn.Module):
    """A text encoder whose output is replaced where words stand that have vectors for that.

    The rows of a word have columns for each table of the text encoder and then as many for its output,
    (num_vectors, 2*D). One of the halves is zero: the first in an output embedding, the second in a plain
    word, whose output is left alone. In a word that has both, both are used.

    Args:
        text_encoder: of CLIP or BERT, or SDXL's two.

    Attributes:
        outputs: for each table of word vectors one with the other half of the rows, and zeros for the words
            of the vocabulary, which take no memory.
    """

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        tables = tables_of(text_encoder)
        tables[0].key = tables[0].key or "emp_params"  # as OneTrainer calls it in a file
        width = sum(table.weight.shape[1] for table in tables)
        words = [nn.Parameter(F.pad(p, (0, width)), requires_grad=False) for p in tables[0].words]
        self.text_encoder, self.outputs = text_encoder, nn.ModuleList()
        for table in tables:
            with torch.device("meta"):
                own = TokenEmbedding(*table.weight.shape)
            own.weight = nn.Parameter(torch.zeros_like(table.weight[:1]).expand_as(table.weight), False)
            own.key = table.key + OUTPUT
            own.columns = slice(width + table.columns.start, width + table.columns.stop)
            table.words = nn.ParameterList(words)
            own.words.extend(words)
            self.outputs.append(own)

    def forward(self, ids: Tensor) -> TextOutput:
        """Encode token ids, (B, L) int64; the context is (B, L, D)."""
        with torch.no_grad():
            text = self.text_encoder(ids)
        vectors = torch.cat([table(ids) for table in self.outputs], dim=-1)  # (B, L, D)
        replaced = vectors.any(dim=-1, keepdim=True)  # (B, L, 1)
        return text._replace(context=torch.where(replaced, vectors, text.context))
