import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Many small operations on a machine that others use too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
