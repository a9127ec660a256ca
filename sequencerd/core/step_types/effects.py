"""The keys that every step with a side effect takes, and the built-in messages: Email, SMS."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, model_validator
from pydantic.alias_generators import to_camel

from sequencerd.core.config import Config, Faults
from sequencerd.core.languages import LanguageText
from sequencerd.core.model import (
    ALT_NEXT,
    NEXT,
    Context,
    Exit,
    Limit,
    RetryPolicy,
    Skip,
)
from sequencerd.core.step_types.durations import (
    Duration,
    DurationConfig,
    compile_duration,
    elapsed,
    in_words,
)
from sequencerd.core.step_types.record import StepType
from sequencerd.core.step_types.template_config import compile_date, compile_text
from sequencerd.core.window_config import WindowConfig


class RetryConfig(Config):
    """How often a side effect that failed is tried again; what is left out, its runner says."""

    attempts: StrictInt | None = Field(default=None, ge=1, le=1000)
    """How often it is tried, with the first time."""
    first_delay: StrictInt | StrictFloat | None = Field(default=None, ge=0, le=86400)
    """Seconds before the second attempt; the delay doubles with each attempt."""
    longest_delay: StrictInt | StrictFloat | None = Field(default=None, ge=0, le=30 * 86400)
    """Seconds that the delay grows to."""
    give_up_after: StrictInt | StrictFloat | None = Field(default=None, ge=1, le=365 * 86400)
    """Seconds of waiting after which it is not tried again, instead of a number of attempts."""

    def applied(self, policy: RetryPolicy) -> RetryPolicy:
        """Return a runner's policy with these keys; either limit replaces the runner's own."""
        written = self.model_dump(exclude_none=True)
        if written.keys() & {"attempts", "give_up_after"}:
            policy = replace(policy, attempts=None, give_up_after=None)
        return replace(policy, **written)


Topic = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}$")]
"""The name of a topic, as in sequencer.topics."""


SUBJECT = "{{subject}}"
"""The usual key of a limit, which needs no JavaScript."""


class TopicLimitConfig(Config):
    """How often side effects of a topic may begin: at most so many in any period."""

    key: str = SUBJECT
    """What is counted together with others of the topic: a template."""
    at_most: StrictInt = Field(ge=1, le=1000, alias="at_most")
    """How many."""
    per: Duration
    """The period, such as {days: 7}: weeks to seconds, of elapsed time."""
    then: Literal["wait", "skip", "altNext"] = "wait"
    """What follows when there have been so many: wait until there is room, or go on without it."""

    def compile(self, topic: str | None = None) -> Limit:
        """Compile it. Raises DefinitionError."""
        faults = Faults()
        per = timedelta()
        key: Callable[[Context], str] = lambda _: ""  # noqa: E731
        with faults.at("limit", "per"):
            per = elapsed(self.per)
        with faults.at("limit", "key"):
            key = _subject if self.key == SUBJECT else compile_text(("limit", "key"), self.key)
        faults.check()
        words = f"{self.at_most} in {in_words(self.per.amount, self.per.unit)}"
        return Limit(key, topic, self.at_most, per, self.then, words)


def _subject(context: Context) -> str:
    return context.enrollment.subject


class LimitConfig(TopicLimitConfig):
    """How often side effects may begin: at most so many in any period, in all sequences."""

    topic: Topic | None = None
    """Whose side effects are counted (default: the topic of the step; without one, the step's)."""


class EffectConfig(Config):
    """The keys that every step with a side effect takes, beside those of its runner."""

    retry: RetryConfig = Field(default_factory=RetryConfig)
    """How often it is tried again."""
    on_error: Literal["fail", "altNext"] = "fail"
    """What follows on the last failure: the enrollment fails, or goes on to altNext."""
    delivery: Literal["at_least_once", "at_most_once"] = "at_least_once"
    """at_most_once: never started again where it may have taken place; a person decides."""
    expires: str | DurationConfig | None = None
    """When it is too late: a date, a template that gives one, or a duration from the arrival."""
    on_expired: Skip = "next"
    """Where it goes when it is too late."""
    on_suppressed: Skip = "next"
    """Where it goes if nothing is sent because the recipients are suppressed."""
    topic: Topic | None = None
    """What it is about, such as marketing, instead of the topic of the sequence; null: none."""
    limit: LimitConfig | None = None
    """How often it and others of its topic may begin, for each subject or another key."""
    window: WindowConfig | None = None
    """When it may begin, instead of in the window of the sequence; null: at any time."""


EFFECT_KEYS = frozenset(to_camel(name) for name in EffectConfig.model_fields)


def compile_expiry(expires: str | DurationConfig) -> Callable[[Context], datetime]:
    """Compile the time when a side effect is too late. Raises DefinitionError."""
    if isinstance(expires, str):
        return compile_date("expires", expires)
    return compile_duration(expires, ("expires",))


def effect_exits(config: EffectConfig, *, is_message: bool) -> tuple[Exit, ...]:
    """Return the exits of a step with a side effect. Messages only answer next; a custom runner may
    also answer altNext, and noop, which is a wait.
    """
    skips = {config.on_suppressed, config.on_expired if config.expires is not None else "next"}
    if config.limit is not None and config.limit.then == "altNext":
        skips.add("altNext")
    exits = [NEXT]
    if not is_message:
        exits = [NEXT._replace(at_once="sometimes"), ALT_NEXT._replace(at_once="sometimes")]
        exits[1] = exits[1]._replace(is_optional="altNext" not in {config.on_error, *skips})
    elif "altNext" in {config.on_error, *skips}:
        exits.append(ALT_NEXT)
    if "end" in skips:
        exits.append(Exit("end", ("config",)))
    return tuple(exits)


# --- messages

HEADERS = ("In-Reply-To", "References", "Precedence", "Auto-Submitted", "Feedback-ID")
"""The headers that a config may set, next to X-... and List-..."""

_HEADER_NAME = re.compile(rf"(?:X-|List-)[A-Za-z0-9-]+|{'|'.join(HEADERS)}", re.IGNORECASE)


class AttachmentConfig(Config):
    """A file of a message, from data or from a URL; everything is a template."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["url"]}, {"required": ["base64"]}]}
    )

    url: str | None = None
    """Where it is, at a host that the settings allow; nothing is attached if it is empty."""
    base64: str | None = None
    """Its content, such as {{data.pdf}}, instead of a URL; nothing is attached if it is empty."""
    filename: str | None = None
    """Its name. Default: the end of the URL."""
    content_type: str | None = None
    """Such as application/pdf. Default: by the name."""
    content_id: str | None = None
    """Of an image in html, which refers to it as cid:..."""
    inline: StrictBool = False
    """Whether html refers to it, by its name if it has no contentId."""

    @model_validator(mode="after")
    def _check(self) -> AttachmentConfig:
        if (self.url is None) == (self.base64 is None):
            raise ValueError("write url or base64, one of them")
        return self


MAX_ATTACHMENTS = 10


class EmailConfig(Config):
    """Sends an e-mail; everything is a template."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["text"]}, {"required": ["html"]}]}
    )

    from_: str = Field(alias="from")
    """The sender, such as Shop <hi@example.com>."""
    to: str | list[str]
    """Addresses, such as {{data.email}}."""
    cc: str | list[str] | None = None
    """More addresses; what renders to nothing is left out."""
    bcc: str | list[str] | None = None
    """Addresses that other recipients do not see."""
    reply_to: str | list[str] | None = None
    """Where answers go."""
    subject: LanguageText
    """The subject, in one line; or one for each language, such as {en: Hello, de: Hallo}."""
    text: LanguageText | None = None
    """The message in plain text; text, html or both."""
    html: LanguageText | None = None
    """The message in HTML, in which {{x}} is escaped."""
    attachments: list[AttachmentConfig] = Field(default_factory=list, max_length=MAX_ATTACHMENTS)
    """Files, and images in html."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Further headers: X-..., List-... and a few more."""
    list_unsubscribe: str | None = None
    """A URL to unsubscribe at with one click."""
    strict: StrictBool = False
    """Whether a missing value is an error, instead of nothing."""
    many: bool = False
    """Whether a value may hold several addresses, with commas; otherwise it is one."""

    @model_validator(mode="after")
    def _check(self) -> EmailConfig:
        if self.text is None and self.html is None:
            raise ValueError("text or html is missing: write one of them, or both")
        for name in self.headers:
            if not _HEADER_NAME.fullmatch(name):
                raise ValueError(
                    f"headers: {name!r} can't be set here: write X-..., List-..., "
                    f"{', '.join(HEADERS)}"
                )
        return self


class SmsConfig(Config):
    """Sends an SMS; everything is a template."""

    from_: str | None = Field(None, alias="from")
    """The sender's number."""
    to: str
    """The number, with its country, such as {{data.phone}}."""
    message: LanguageText
    """The text; or one for each language, such as {en: Hello, de: Hallo}."""
    messaging_service_sid: str | None = None
    """Twilio's messaging service, instead of a sender."""
    strict: StrictBool = False
    """Whether a missing value is an error."""
    status_callback: str | None = None
    """A URL that Twilio tells what became of the message."""


def _message(name: str, config: type[Config], *localised: str) -> StepType:
    own = (field.alias or key for key, field in config.model_fields.items())
    return StepType(
        name=name,
        config=config,
        never_alt=(
            'never taken: write "onError: altNext" (or onSuppressed, or onExpired with expires) '
            "into the config, or leave altNext out"
        ),
        templates=(*own, "expires"),
        localised=localised,
    )


EMAIL = _message("Email", EmailConfig, "subject", "text", "html")
SMS = _message("SMS", SmsConfig, "message")
TYPES = (EMAIL, SMS)
