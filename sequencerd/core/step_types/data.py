"""Steps that change the data of an enrollment: UpdateData."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from sequencerd.core.config import Config, Faults
from sequencerd.core.model import Instant, Update
from sequencerd.core.step_types.record import StepType
from sequencerd.core.step_types.templates import compile_value


class UpdateDataConfig(Config):
    """Merges into the enrollment's data."""

    data: dict[str, Any] = Field(min_length=1)
    """What is merged; texts are templates."""


def _update_data(config: UpdateDataConfig) -> Instant:
    faults = Faults()
    render = compile_value(("data",), config.data, faults)
    faults.check()
    return Instant(lambda context: Update(render(context)))


TYPES = (
    StepType(
        name="UpdateData",
        config=UpdateDataConfig,
        compile=_update_data,
        templates=("data",),
        writes="data",
    ),
)
