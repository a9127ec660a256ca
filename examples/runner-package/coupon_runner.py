"""The step type Coupon: gives each enrollment a code of its own, as `data.coupon`.

steps:
  - name: gift
    type: Coupon
    config: {prefix: SPRING, plans: [trial, basic]}
"""

import hashlib
from typing import Any

from pydantic import BaseModel, Field

from sequencerd.runners import Refused, runner


class Config(BaseModel, extra="forbid"):
    """What a step of this type can say; checked when it is applied."""

    prefix: str = Field(min_length=1, max_length=10)
    plans: list[str] = []  # that get one; empty: all


@runner(config=Config, concurrency=5, timeout=10)
async def coupon(config: Config, runner: dict[str, Any]) -> dict[str, Any] | str:
    """Called for one enrollment; what it returns moves it on."""
    plan = runner["data"].get("plan")
    if plan is None:
        raise Refused("data.plan is missing")  # fails the enrollment, no second attempt
    if config.plans and plan not in config.plans:
        return "altNext"
    # The key is the same in every attempt, so a repeated call makes no second code.
    code = hashlib.sha256(runner["idempotencyKey"].encode()).hexdigest()[:8].upper()
    return {
        "action": "next",
        "message": f"gave {config.prefix}-{code}",
        "data": {"coupon": f"{config.prefix}-{code}"},
    }
