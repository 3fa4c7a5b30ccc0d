"""The text encoder of the first latent diffusion model against diffusers' LDMBertModel."""

import json

import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

from minti.model.bert import BertConfig, BertTextModel

from . import compare, oracles

SMALL = {"vocab_size": 200, "d_model": 48, "encoder_ffn_dim": 80, "encoder_layers": 3}
SMALL |= {"encoder_attention_heads": 2, "head_dim": 16}  # 32 wide together, unlike the model


def models() -> tuple[BertTextModel, LDMBertModel]:
    torch.manual_seed(0)
    theirs = oracles.randomise(LDMBertModel(LDMBertConfig(**SMALL, init_std=0.2)), 0)
    sizes = {"vocab_size": 200, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    ours = BertTextModel(BertConfig(**sizes, num_attention_heads=2, head_dim=16))
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("to_logits")}
    ours.load_state_dict(state, strict=True)
    return ours.requires_grad_(False), theirs


def prompts() -> torch.Tensor:
    """Two prompts of 5 and 75 words with [CLS] 101, [SEP] 102 and padding 0."""
    ids = torch.zeros(2, 77, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for row, length in zip(ids, (5, 75), strict=True):
        row[: length + 2] = torch.randint(103, 200, (length + 2,), generator=generator)
        row[0], row[length + 1] = 101, 102
    return ids


def test_forward():
    ours, theirs = models()
    ids = prompts()
    output, reference = ours(ids).context, theirs(ids).last_hidden_state
    compare.assert_parity({"context": (output, reference)})
    assert compare.norm_eps(ours) == compare.norm_eps(theirs)


def test_every_position_matters_also_padding_and_later_ones():
    ours, _ = models()
    ids = prompts()
    for position in (3, 76):
        other = ids.clone()
        other[0, position] = 150
        assert compare.relative_error(ours(other).context[0, 0], ours(ids).context[0, 0]) > 1e-3


def test_gradient_of_an_embedding_row():
    ours, theirs = models()
    ids = prompts()
    row, weight = int(ids[0, 2]), torch.randn(2, 77, 48, generator=torch.Generator().manual_seed(1))
    gradients = []
    for model, table in ((ours, ours.model.embed_tokens), (theirs, theirs.model.embed_tokens)):
        table.weight.requires_grad_(True)
        output = model(ids).context if model is ours else model(ids).last_hidden_state
        (output * weight).sum().backward()
        gradients.append(table.weight.grad[row])
    assert gradients[1].abs().max() > 0
    compare.assert_parity({"gradient": tuple(gradients)})


def test_published_size_has_the_keys_of_the_original_file():
    """As many weights as the file has for the encoder, but for the unused logits; names are tested with the
    key map."""
    manifest = json.loads(oracles.shared("manifests/ldm-text2img-large-compvis.json").read_text())
    prefix = "cond_stage_model.transformer."
    shapes = [tuple(s) for key, s in manifest.items() if key.startswith(prefix) and "to_logits" not in key]
    with torch.device("meta"):
        ours = BertTextModel(BertConfig())
    assert sorted(tuple(t.shape) for t in ours.state_dict().values()) == sorted(shapes)
