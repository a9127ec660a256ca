"""Steps that choose the next step: GoTo, Conditional, Goal, Split."""

from __future__ import annotations

from hashlib import sha256

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from sequencerd.core.config import Config
from sequencerd.core.model import (
    ALT_NEXT,
    NEVER,
    NEXT,
    Action,
    Context,
    DefinitionError,
    Exit,
    Fault,
    Instant,
    Stay,
    StepAnswer,
)
from sequencerd.core.step_types.conditions import (
    ConditionConfig,
    compile_condition,
    describe_wait,
)
from sequencerd.core.step_types.record import StepType


class GoToConfig(Config):
    """Goes to its next step, or to the named step, of the named sequence; altNext if it refuses."""

    step: str | None = None
    """Where to go; its next step if nothing is said."""
    sequence: str | None = None
    """The sequence that has the step, where it is another one."""


def _go_to(config: GoToConfig) -> Instant:
    if config.sequence is not None and config.step is None:
        raise DefinitionError([Fault(("sequence",), "needs a step beside it: where to go in it")])
    if config.step is None:
        return Instant(lambda _: Action.NEXT)
    target = Exit("next", ("config", "step"), config.step, config.sequence)
    refused = ALT_NEXT._replace(is_optional=True)  # without altNext the enrollment fails
    exits = (target,) if config.sequence is None else (target, refused)
    return Instant(lambda _: target, exits)


class ConditionalConfig(ConditionConfig):
    """Goes to next if the condition holds, else to altNext."""


def _conditional(config: ConditionalConfig) -> Instant:
    holds = compile_condition(config)
    return Instant(
        lambda context: Action.NEXT if holds(context) else Action.ALT_NEXT,
        (NEXT._replace(condition=config), ALT_NEXT),
    )


class GoalConfig(ConditionConfig):
    """Pulls to its next from wherever somebody stands, as soon as the condition holds."""

    repeat: StrictBool = False
    """Pulls again each time that the condition holds after it did not; else once."""


def _goal(config: GoalConfig) -> Instant:
    is_met = compile_condition(config)
    return Instant(
        lambda context: Action.NEXT if is_met(context) else Stay(NEVER),
        (NEXT._replace(condition=config, at_once="sometimes", reason="where it holds"),),
        met=is_met,
        repeats=config.repeat,
    )


class SplitConfig(Config):
    """Sends a part of the subjects each way, always the same ones: the weights of the two ways."""

    next: StrictInt | StrictFloat = Field(ge=0, le=1e9)
    """The weight of next."""
    alt_next: StrictInt | StrictFloat = Field(ge=0, le=1e9)
    """The weight of altNext."""


def _split(config: SplitConfig) -> Instant:
    if not config.next + config.alt_next:
        raise DefinitionError("next and altNext are weights, of which one must be above 0")
    share = config.next / (config.next + config.alt_next)
    exits = [
        exit_ if weight else exit_._replace(at_once="never")
        for exit_, weight in ((NEXT, config.next), (ALT_NEXT, config.alt_next))
    ]

    def answer(context: Context) -> StepAnswer:
        # the same for a subject whenever it comes by, and independent of the other splits
        here = context.enrollment
        seed = context.seed or f"{here.sequence}/{here.step}"
        key = f"{seed}\0{here.subject}".encode("utf-8", "replace")
        point = int.from_bytes(sha256(key).digest()[:6]) / 2**48
        return Action.NEXT if point < share else Action.ALT_NEXT

    return Instant(answer, tuple(exits))


TYPES = (
    StepType(name="GoTo", config=GoToConfig, compile=_go_to, steps=(("step",),)),
    StepType(name="Conditional", config=ConditionalConfig, compile=_conditional, conditions=((),)),
    StepType(
        name="Goal",
        config=GoalConfig,
        compile=_goal,
        describe=describe_wait,
        conditions=((),),
        is_goal=True,
    ),
    StepType(name="Split", config=SplitConfig, compile=_split, is_seeded=True),
)
