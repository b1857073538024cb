"""Evaluation at the speed of training: in the precision that the run was trained in, and compiled.

Nothing here touches the check of a merge, which stays exact (`evaluation/verify.py`).
"""

import time
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dbtrain.config import Config
from dbtrain.method.interface import BlockModel
from dbtrain.method.objective import Precision
from dbtrain.training.compilation import keep_compiled_code

WORTH_COMPILING = 1000
"""Least number of samples drawn from noise for which compiling, which takes seconds, is worth its time."""


class Speed:
    """How blocks predict while they are evaluated.

    Args:
        precision: `bf16` runs them under autocast.
        compiled: compile each layer. Layers of all blocks are alike, so that this happens once.
        device: device of the blocks.
    """

    def __init__(self, precision: Precision, compiled: bool, device: torch.device) -> None:
        self.precision: Precision = precision
        self.compiled = compiled
        self.device = device
        self.compiling_s = 0.0
        """Seconds spent on compiling: preparing it, and the first prediction of each kind."""
        self._size = 0
        self._met: set[Any] = set()

    @staticmethod
    def of(config: Config, device: torch.device, drawn: int) -> "Speed":
        """Speed as the section `evaluation` sets it. For keys that are not set, it is that of training on
        a GPU, and on a CPU fp32 without compilation.

        Args:
            config: configuration of the run.
            device: device of the blocks.
            drawn: samples that are drawn from noise; for few or none, compiling takes longer than it saves.
        """
        section, training, gpu = config.evaluation, config.training, device.type == "cuda"
        precision = section.precision or (training.precision if gpu else "fp32")
        worth = gpu and training.compile and drawn >= WORTH_COMPILING
        return Speed(precision, worth if section.compile is None else section.compile, device)

    def expect(self, largest: int) -> None:
        """Batches of up to so many samples come: all are filled up to that size where layers are compiled."""
        self._size = max(self._size, largest)

    def apply(self, model: BlockModel) -> BlockModel:
        """The same model, whose `predict` is fast from now on; once is enough."""
        if "predict" not in vars(model):
            if self.compiled:
                keep_compiled_code()
                started = time.monotonic()  # the first call imports the compiler
                for layer in model.layers.values():
                    layer.compile()
                self.compiling_s += time.monotonic() - started
            # weak, because a model that refers to itself is freed late, and two may not fit into memory
            vars(model)["predict"] = partial(self._predict, weakref.ref(model))
        return model

    def _predict(
        self, held: Any, layers: Any, noisy: Tensor, level: Tensor, context: Tensor, cache: Any = None
    ) -> Tensor:
        model = held()
        predict = partial(type(model).predict, model, layers)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            if cache is not None:
                # the cache grows with every token, so that each call would be compiled anew
                with torch.compiler.set_stance("force_eager" if self.compiled else "default"):
                    return predict(noisy, level, context, cache)
            if self.compiled:
                return self._timed(predict, noisy, level, context)
            return predict(noisy, level, context)

    def _timed(self, predict: Any, *inputs: Tensor) -> Tensor:
        """Predict for inputs filled up to the largest batch so far; any other size would be compiled anew."""
        count = len(inputs[0])
        self._size = max(self._size, count)
        padded = [_filled(tensor, self._size) for tensor in inputs]
        kind = (predict.args[1:], *(tensor.shape for tensor in padded))
        if kind in self._met:
            return predict(*padded)[:count]
        self._met.add(kind)
        self._wait()
        started = time.monotonic()
        output: Tensor = predict(*padded)[:count]
        self._wait()
        self.compiling_s += time.monotonic() - started
        return output

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _filled(tensor: Tensor, size: int) -> Tensor:
    """The tensor (n, ...) with its last row repeated up to `size` rows."""
    missing = size - len(tensor)
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor


class Stopwatch:
    """Seconds of the parts of an evaluation, as a line for people."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self.parts: dict[str, float] = {}

    def lap(self, what: str) -> None:
        """Note the seconds since the last call for a part."""
        now = time.monotonic()
        self.parts[what], self._since = now - self._since, now

    def line(self, last: str, speed: Speed) -> str:
        """End the last part, and tell all: `3.1 s reading, 9.4 s compiling, 21.0 s drawing (bf16)`."""
        self.lap(last)
        if speed.compiled:
            rest = self.parts.pop(last) - speed.compiling_s
            self.parts |= {"compiling": speed.compiling_s, last: rest}
        parts = ", ".join(f"{seconds:.1f} s {what}" for what, seconds in self.parts.items())
        return f"{parts} ({speed.precision})"
