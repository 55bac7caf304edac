"""How and where work is done: nothing of it is in a key."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from ctp.cells.inputs import Pinned, PositiveInt, Spec


def location(locations: Mapping[str, str], thing: Pinned) -> str:
    """Where a pinned thing is stored. Raises KeyError with its name where the runtime does not have it."""
    return locations[thing.pinned_name]


class Runtime(Spec):
    """How and where work is done: nothing here changes a result, and no cell can hold it.

    device: "auto", "cpu" or "cuda". batch: windows per forward pass in evaluation and calibration.
    checkpoint_seconds: least time between two checkpoints of a prompt that is being learned. recompute: learn with less
    memory and more time: activations are computed again in the backward pass. packed: learn prompts through weights
    that stay packed on the device and are unpacked at every use. halved: how often the number of windows at once
    (batch, and that of a recovery) is halved from the start: workers were ended for their machine's memory.
    locations: where a pinned model, text or adapter is stored ("name@revision" -> path, `package:…` or hub id).
    datasets: descriptions of the grid file's texts, by name. plugins: sources of its Python files, by name.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch: PositiveInt = 4
    checkpoint_seconds: Annotated[float, Field(strict=True, ge=0)] = 60.0
    recompute: bool = False
    packed: bool = False
    halved: Annotated[int, Field(strict=True, ge=0)] = 0
    locations: dict[str, str] = Field(default_factory=dict)
    datasets: dict[str, dict[str, object]] = Field(default_factory=dict)
    plugins: dict[str, str] = Field(default_factory=dict)
