"""The hash by which runs and scores recognise a model."""

import pytest
import torch
from torch import nn

from minti.model.embedding import TokenEmbedding
from minti.model.model_hash import model_hash


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(TokenEmbedding(50, 8), nn.Linear(8, 300), nn.LayerNorm(300), nn.Conv2d(3, 16, 3))


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "1.bias", "2.weight", "3.weight"])
@pytest.mark.parametrize("place", [0.0, 0.37, 1.0])
def test_every_number_counts(name: str, place: float) -> None:
    """One unit in the last place of one number, wherever it is."""
    changed = model()
    flat = changed.get_parameter(name).data.view(-1)
    i = int(place * (len(flat) - 1))
    flat[i] = torch.nextafter(flat[i], torch.tensor(9.0))
    assert model_hash(changed) != model_hash(model())


def test_what_does_not_count() -> None:
    """The memory format, the number of threads, and learned words."""
    expected, other = model_hash(model()), model().to(memory_format=torch.channels_last)
    other[0].words.append(nn.Parameter(torch.randn(2, 8)))
    assert model_hash(other) == expected
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert model_hash(model()) == expected
    finally:
        torch.set_num_threads(threads)


def test_dtypes_and_names_count() -> None:
    assert (
        len({model_hash(model().to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)}) == 3
    )
    assert model_hash(model()[1]) != model_hash(model()[1:2])
