import pytest
import torch

from dbtrain.errors import ConfigError
from dbtrain.method.codebook import make_codebook


@pytest.mark.parametrize("source", ["random", "orthogonal"])
def test_codes_have_norm_1_and_follow_from_the_arguments(source):
    codes = make_codebook(source, 10, 24, seed=3)
    assert codes.shape == (10, 24) and codes.dtype == torch.float32 and codes.is_contiguous()
    assert torch.allclose(codes.norm(dim=1), torch.ones(10), atol=1e-6)
    torch.rand(5)  # the global generator has no say
    assert torch.equal(codes, make_codebook(source, 10, 24, seed=3))
    assert not torch.allclose(codes, make_codebook(source, 10, 24, seed=4))


@pytest.mark.parametrize("dim", [10, 64])
def test_orthogonal_codes_are_equally_far_apart(dim):
    codes = make_codebook("orthogonal", 10, dim, seed=0)
    assert torch.allclose(codes @ codes.T, torch.eye(10), atol=1e-6)


def test_orthogonal_codes_need_room_and_random_ones_do_not():
    with pytest.raises(ConfigError, match=r"codebook.dim=9 .* 10 orthogonal codes.*codebook.dim=10"):
        make_codebook("orthogonal", 10, 9, seed=0)
    codes = make_codebook("random", 100, 9, seed=0)
    assert len(codes.unique(dim=0)) == 100
