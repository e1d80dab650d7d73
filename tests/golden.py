"""Records of the authors' own code, and how to compare with them.

A record is `<family>/<model>.json` (what ran: source, commit, arguments, input shape, the names and shapes of the
state_dict, notes on quirks) and `.npz` (its logits and samples of its features). No weights are kept: `fill` makes
every value from the tensor's name, so that a model whose names are mapped gets the numbers that the authors' code had.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch

RECORDS = Path(__file__).parent / "records"


class Record:
    """One record: `meta`, `arrays`, and what to feed a model to be compared with it."""

    def __init__(self, name: str):
        self.meta = json.loads((RECORDS / f"{name}.json").read_text())
        with np.load(RECORDS / f"{name}.npz") as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}

    def state_dict(self, stress: bool = False) -> dict[str, torch.Tensor]:
        """Fill every tensor by its name, but for those that the record holds, as `state:<name>`.

        Constants (index tables, masks) are the model's own business.
        """
        values = {name: fill(name, shape) for name, shape, kind in self.meta["state"] if kind != "const"}
        values |= {key.removeprefix("state:"): value for key, value in self.arrays.items() if key.startswith("state:")}
        for name, _, kind in self.meta["state"] if stress else ():
            factor = next((f for suffix, f in self.meta["stress"]["factors"] if name.endswith(suffix)), None)
            if kind == "param" and factor is not None:
                values[name] = values[name] * np.float32(factor)
        return {name: torch.from_numpy(value) for name, value in values.items()}

    def image(self) -> torch.Tensor:
        """Draw the input batch, float64."""
        shape = tuple(self.meta["input_shape"])
        return torch.from_numpy(np.random.RandomState(0).standard_normal(shape).astype(np.float32)).double()

    def tolerance(self, rounded: bool = False) -> float:
        """Largest relative error of a faithful model in float64; `rounded` if the array is float32."""
        if self.meta.get("dtype", "float32") == "float64" and not rounded:
            return 1e-9
        own = [self.meta.get(key) or 0 for key in ("float32_error", "float64_error", "float64_relative_error")]
        return max(1.5e-6, *(2 * max(e.values() if isinstance(e, dict) else [e]) for e in own))


def fill(name: str, shape: list[int]) -> np.ndarray:
    """Value of the tensor `name`: float32 (int64 for counters), drawn from a seed that is the name's checksum."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if name.endswith("running_var"):
        value = 1 + 0.1 * np.abs(z)
    elif name.endswith("running_mean"):
        value = 0.1 * z
    elif len(shape) >= 2:
        value = z / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        value = 1 + 0.1 * z
    else:
        value = 0.1 * z
    return np.asarray(value, np.float32)


def sample(feature: torch.Tensor, count: int = 512) -> np.ndarray:
    """Take the values of a map at the places where the records took theirs."""
    flat = feature.contiguous().reshape(-1).numpy()
    return flat[np.random.RandomState(flat.size % (2**31)).randint(0, flat.size, count)]


def relative_error(out, expected) -> float:
    """‖out − expected‖ / ‖expected‖ in float64."""
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
