import torch

from dbtrain.method.draws import Draws


def test_the_largest_and_smallest_uniform_have_a_finite_quantile(monkeypatch) -> None:
    """Of 2^24 values one rounded to 1, whose normal is infinite; it cost two blocks their run."""
    for bits in (0, -1):
        monkeypatch.setattr("dbtrain.method.draws._mix", lambda x, bits=bits: torch.full_like(x, bits))
        draws = Draws(torch.tensor(1), torch.arange(2))
        uniform = draws.uniform((3,), 0)
        assert ((uniform > 0) & (uniform < 1)).all()
        assert draws.normal((3,), 0).isfinite().all()


def test_every_uniform_is_exact() -> None:
    uniform = Draws(torch.tensor(3), torch.arange(64)).uniform((1024,), 0).double()
    assert torch.equal((uniform * 2**23) % 1, torch.full_like(uniform, 0.5))


def test_any_stream_can_be_drawn() -> None:
    draws = Draws(torch.tensor(3), torch.arange(4))
    rows = [draws.uniform((8,), stream) for stream in (0, 1, 2, 3, 10**6)]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
