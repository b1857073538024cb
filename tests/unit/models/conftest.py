"""What the tests of all architectures look at."""

import pytest


@pytest.fixture
def before_head():
    """(model, layers, *inputs) -> what `predict` gives the head: the hidden state and the condition."""

    def look(model, layers, *inputs):
        seen = []
        handle = model.head.register_forward_pre_hook(lambda head, given: seen.append(given))
        model.predict(layers, *inputs)
        handle.remove()
        return seen[0]

    return look
