"""The text and the image encoder against transformers."""

import copy

import pytest
import torch
from torch import nn

from . import compare, oracles
from .compare import assert_parity

VOCAB = 600
IDS = compare.prompt_ids(VOCAB)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_text_encoder(family, projected):
    reference = oracles.text_encoder(family, VOCAB, projected=projected, num_attention_heads=4)
    pairs = compare.compare_text(reference, IDS)
    assert_parity(pairs)
    assert pairs["pooled"][0].shape == (len(IDS), 32 if projected else 64)


def test_activations_differ():
    """quick_gelu and gelu are so alike that a mix-up must be shown to lie above the tolerance."""
    (a, _), (b, _) = (
        compare.compare_text(oracles.text_encoder("sd1", VOCAB, hidden_act=act), IDS)["context"]
        for act in ("quick_gelu", "gelu")
    )
    assert compare.relative_error(a, b) > 1e-3


def test_short_prompts():
    """Fewer than 77 tokens are taken as they are, at the first positions."""
    assert_parity(compare.compare_text(oracles.text_encoder(), compare.prompt_ids(VOCAB, [3, 8])[:, :10]))


def test_end_token_of_published_configs():
    """Published configs give the id 2 for the end token, by which transformers means the largest id."""
    assert_parity(compare.compare_text(oracles.text_encoder("sd1", VOCAB, eos_token_id=2), IDS))


@pytest.mark.parametrize("projected", [False, True])
def test_learned_rows(projected):
    """Ids above the vocabulary read the learned rows, and do not draw the pooled output to themselves."""
    original = oracles.text_encoder("sd1", VOCAB, projected=projected)
    rows = torch.randn(3, 64)
    module = compare.ours(original)
    # A word of two vectors and a word of one.
    embedding = module.token_embedding
    embedding.words.extend([nn.Parameter(rows[:2]), nn.Parameter(rows[2:])])

    reference = copy.deepcopy(original)
    reference.resize_token_embeddings(VOCAB + len(rows), mean_resizing=False)
    reference.get_input_embeddings().weight.data[VOCAB:] = rows
    ids = IDS.clone()
    ids[:, 2] = torch.tensor([VOCAB, VOCAB + 1, VOCAB - 1, VOCAB + 2])  # the third prompt has no words
    ids[0, 40:43] = torch.arange(VOCAB, VOCAB + 3)

    output, theirs = module(ids), reference(ids, output_hidden_states=True)
    pairs = {
        "context": (output.context, theirs.last_hidden_state),
        "penultimate": (output.hidden_states[-2], theirs.hidden_states[-2]),
        "pooled": (output.pooled, theirs.text_embeds if projected else theirs.pooler_output),
    }
    assert_parity(pairs)
    assert torch.equal(torch.cat([embedding.weight, rows]), reference.get_input_embeddings().weight)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_image_encoder(act):
    assert_parity(compare.compare_image_encoder(oracles.image_encoder(hidden_act=act)))


@pytest.mark.parametrize("build", [oracles.text_encoder, oracles.image_encoder])
def test_norm_eps(build):
    reference = build(layer_norm_eps=3e-4)
    eps = compare.norm_eps(compare.ours(reference))
    assert eps == compare.norm_eps(reference)
    assert set(eps.values()) == {3e-4}


def test_heads_and_order_matter():
    """Were the output deaf to the number of heads or to later tokens, comparing it would prove nothing."""
    module = compare.ours(oracles.text_encoder("sd1", VOCAB, num_attention_heads=4))
    output = module(IDS).context
    changed = IDS.clone()
    changed[:, 40] = 7
    difference = (module(changed).context - output).abs().amax(dim=(0, 2))
    assert (difference[:40] == 0).all()  # causal
    assert (difference[40:] > 0).all()
    for layer in module.text_model.encoder.layers:
        layer.self_attn.heads = 1
    assert compare.relative_error(module(IDS).context, output) > 1e-3
