"""What a mail server's refusal means: whose fault it is, and whether it passes.

A reply's code says whether the refusal is for good (RFC 5321, 4.2.1), its enhanced code what it is
about (RFC 3463 and the registry of RFC 5248). Neither says whose fault it is: servers answer 4.7.x,
5.7.x or no enhanced code for a quota, a login and an unwanted message alike. So the text is
compared with classes of phrases. The first class that fits decides, in this order:

1. an address, by its enhanced code; never a quota
2. greylisting
3. too many recipients in a transaction
4. the size of the message, a mailbox that is full
5. a rate or a quota of the sender
6. what the operator has to correct: login, TLS, EHLO, network; sender, relaying
7. a server that is busy
8. commands that the server does not know or expect: a fault of the dialogue, not of the message
9. otherwise the code alone

The phrases come from what providers publish: Gmail (support.google.com/a/answer/3726730),
Microsoft 365 (learn.microsoft.com: "Email non-delivery reports in Exchange Online"), Amazon SES
(docs.aws.amazon.com: "SMTP response codes"), Yahoo (postmaster.yahooinc.com/error-codes), IONOS
(postmaster.1and1.com), Zoho, SendGrid, Mailgun, Postmark, GoDaddy, Orange, NetEase, QQ, Apple; from
Exim with cPanel, Plesk, Postfix, Sendmail and policyd; and from their users' reports. They name a
class ("too many" of something, a limit within a period), not the sentence of one server.
"""

from __future__ import annotations

import re
from datetime import timedelta
from enum import StrEnum
from typing import Literal, NamedTuple

Stage = Literal["connection", "sender", "recipient", "message"]
"""What was refused: the connection (until the login is complete), MAIL, RCPT, or DATA."""


class RefusalMeaning(StrEnum):
    """The meaning of a refusal: whose fault it is."""

    QUOTA = "quota"  # a rate limit or a quota of the sender: it passes
    OPERATOR = "operator"  # until an operator corrects it: login, TLS, EHLO, network
    SENDER = "sender"  # perhaps the same for all messages: of this sender, or at all
    UNAVAILABLE = "unavailable"  # the server itself
    RECIPIENTS = "recipients"  # too many in this transaction: the others go in another one
    PASSING = "passing"  # this message or address, temporarily
    REFUSED = "refused"  # this message or address, permanently


class Refusal(NamedTuple):
    """The meaning of a refusal, with the minimum wait if it is a quota over time."""

    meaning: RefusalMeaning
    wait: timedelta | None = None


SHORT_WAIT = timedelta(minutes=1)
"""The wait for a rate limit if the text contains no time."""

LONG_WAIT = timedelta(minutes=15)
"""The wait for a limit per hour, day or month: most servers release it gradually."""

MAX_WAIT = timedelta(days=1)


def _any(*phrases: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{phrase})" for phrase in phrases))


def _near(one: str, other: str) -> str:
    """Return a pattern that matches both, in either order, within a sentence."""
    return rf"(?:{one}).{{0,60}}?(?:{other})|(?:{other}).{{0,60}}?(?:{one})"


# --- how a text is read

MAX_READ = 1000  # characters

_ENHANCED = re.compile(r"[\s#(\[]*([245])\.(\d{1,3}\.\d{1,3})\b(?!\.)")
_ENHANCED_BEHIND = re.compile(r"\(#([245])\.(\d{1,3}\.\d{1,3})\b")  # as qmail writes it
_REPEATED_CODE = re.compile(r"\n\s*[245]\.\d{1,3}\.\d{1,3}\b")
_QUOTED = re.compile(r"<[^<>\s]*>|https?://\S+|\S+@\S+")  # not the server's own words

_OF_LIST = re.compile(r"https?://\S*(?:dnsbl|spamhaus|[?&]ip=)", re.IGNORECASE)
LIST = "urloflist"
"""The word for a URL that tells why a host is listed."""

_LISTS = (
    rf"{LIST}|spamhaus|spamcop|dnsbl|\brbl\b|\b(?:black|block)[ -]?list"
    r"|(?<!not )\blisted (?:at|by|in|on)\b|reputation"
)
"""Lists of hosts, and of domains, from which servers accept no mail."""

# --- 1. enhanced codes

_ADDRESS = frozenset({"1.1", "1.2", "1.3", "1.4", "1.6", "1.10", "2.1", "2.2", "2.3", "2.4"})
_RATE_OF_RECIPIENT = frozenset({"2.121", "2.122"})  # Microsoft: too much for a mailbox in an hour
_RULE_OF_RECIPIENT = frozenset(  # Microsoft: who may write to a group or mailbox
    {"7.12", "7.124", *(f"7.{n}" for n in range(129, 137))}
)
_RULE_BY_TEXT = _any(
    r"resolver\.rst|distribution|mailing list|members.only|\bgroup\b",
    _near(r"\b(?:recipient's|user|customer)\b", _LISTS),
)
_RECIPIENTS = "5.3"
_SIZE_CODES = frozenset({"2.3", "3.4"})
_QUOTA_CODES = frozenset({"1.90", "1.91", "7.28", "7.508", "7.650", "7.651"})  # Microsoft, Gmail
_OPERATOR_CODES = frozenset({"7.8", "7.57", "7.139", "7.606", "7.708"})  # RFC 4954, Microsoft
_SENDER_CODES = frozenset(  # RFC 3463, Gmail, Microsoft
    {"1.7", "1.8", "7.26", "7.60", "7.501", "7.502", "7.503", "7.515", "7.750"}
)
_SYSTEM_CODES = frozenset({"3.1", "3.2", "3.5"})  # full, not accepting, misconfigured (RFC 3463)

_DIALOGUE_REPLIES = frozenset({500, 502, 503, 504})  # RFC 5321, 4.2.2
_LOGIN_REPLIES = frozenset({525, 530, 534, 535, 538})  # RFC 4954 and RFC 5248
_PASSING_LOGIN = 454

# --- 2. to 4.

_GREYLISTED = re.compile(r"gr[ea]y.?list|\btriplet\b")
_SOON = re.compile(r"will be (?:allowed|accepted)")

_TOO_MANY_RECIPIENTS = _any(
    r"too many (?:\w+ )?(?:recipients|rcpts?\b|destinations)",
    _near(r"\b(?:recipients?|rcpts?|destination domains)\b", r"\blimit\b|maximum|\bmax\b"),
    r"(?:separate|same|per) transaction",
    r"one at a time",
    _near(r"\b(?:one|single|multiple) (?:recipients?|rcpts?)\b", r"at a time|\bonly\b|not allowed"),
)

_SIZE = _any(
    r"\bsizes?\b|\btaille\b|\btama[nñ]h?o\b|\bdimension[ei]\b",
    r"too (?:large|big|long)\b|zu gro(?:ß|ss)",
    _near(
        r"\b(?:length|lines?|bytes|[km]i?b|attachments?|headers?|hops?|hop count)\b",
        r"exceed|(?<!rate )limit|maximum",
    ),
)

_FULL_MAILBOX = _any(
    _near(
        r"\b(?:mail ?box|inbox|mail ?dir|mail ?folder|bo[iî]te|disk|disc|diskspace|storage)\b",
        r"\bfull\b|quota|exceed|\bover\b|limit|space|allocation|left|pleine",
    ),
    r"over[ -]?(?:the )?quota|overquota|no space|(?:enough|insufficient) space",
    r"\b(?:user|recipient|extended)(?:'s)? (?:\w+ ){0,3}quota",
    r"quota (?:exceeded )?for (?:user|recipient|mailbox)",
    r"too many messages (?:on|in)\b|mail data",
    r"\b(?:user|recipient|customer)\b.{0,40}(?:receiv|message rate)",
    r"邮箱.{0,10}(?:满|容量|空间)",
)
_MAILBOX_OF_RECIPIENT = re.compile(
    r"\b(?:recipient|user)(?:'s)? (?:mail ?box|inbox)|(?:mail ?box|inbox) of (?:the )?recipient"
)

# --- 5. rates and quotas

_WITHIN = r"(?:\b(?:per|an?|each|every|this|last|past|within|in|for)|/) ?(?:the )?(?:\d+ ?)?"
_ADVERBS = (
    r"hourly|daily|weekly|monthly|\b24.?h"
    r"|\bpar (?:heure|jour)|\bpro (?:stunde|tag)|\bpor (?:hora|d[ií]a)|\ba day\b"
    r"|\b(?:tages|di[aá]ri[oa]|giornalier[oi]|journali[eè]re?|quotidien|mensual|mensal|mensile)"
)
_LONG = rf"{_WITHIN}(?:h(?:our|\b)|day|24|week|month)|{_ADVERBS}"
_PERIOD = rf"{_WITHIN}(?:second|sec\b|minute|min\b)|{_LONG}"
_BOUND = (
    r"\blimits?\b|\blimited\b|\bquotas?\b|\bcredits?\b|threshold|allowance|\bmax(?:imum)?\b"
    r"|\bl[ií]mite\b|\bcuota\b|\bcota\b|kontingent|лимит|限制|上限"
)
_REACHED = (
    r"exceed|reach|\bover\b|overlimit|beyond|\bhit\b|exhaust|deplet|used up|\bfull\b|no more|out of"
    r"|insufficient|atteint|d[eé]pass|erreicht|[uü]berschritten|ersch[oö]pft|superad|superat"
    r"|excedid|alcanzad|raggiunt|atingid|ultrapassad|consumed|превышен|超过|超出"
)
_COUNTED = (
    r"\b(?:send(?:ing|er)?s?|sent|out(?:going|bound)|submissions?|relay|deliver(?:y|ies)|smtp"
    r"|messages?|e?-?mails?|connections?|concurrent|sessions?|threads?|requests?|traffic|volume"
    r"|tenant|organi[sz]ation|credits?|plan|subscription|permitted|your|nachrichten|envoi|env[ií]os?"
    r"|mensajes|mensagens|invio|messaggi|отправки|пис[еь]м\w*)\b|发信|发送|邮件|连接"
)
_RATE = _any(
    r"throttl|submissionquota|submission quota|refusequota",
    r"\brate[- ]?limit|\bratelimit",
    _near(r"\brate\b", rf"exceed|over ?limit|unusual|excessive|\bhigh\b|\blimit|{_PERIOD}"),
    r"too (?:fast|quick|frequent|often)|slow(?:er| down)\b|frequency (?:is )?limit|高频|频繁",
    r"too (?:many|much) (?:[\w-]+ ){0,2}?(?:connections?|sessions?|messages?|e?-?mails?|requests?"
    r"|log-?ins?|attempts?|submissions?|transactions?|concurrent|volume|traffic)\b",
    rf"too many .{{0,40}}(?:{_PERIOD})",
    r"trop de (?:connexions?|messages?|requ[eê]tes?|e?-?mails?|courriels?)",
    r"numerous attempts",
    r"unusual (?:\w+ )?(?:amount|volume|activity|traffic|number)",
    r"(?:unexpected|excessive|high) (?:volume|traffic)|user complaints",
    r"max(?:imum)? (?:\w+ )?(?:messages?|e?-?mails?|connections?|sessions?)\b",
    r"(?:messages?|mails?|connections?) per (?:session|connection)",
    _near(_PERIOD, rf"{_BOUND}|{_REACHED}|\bonly\b|allowed"),
)
CONNECTIONS = re.compile(r"\b(?:connections?|concurrent|sessions?|threads?)\b", re.IGNORECASE)
"""Words of a limit that passes when a connection ends."""

_LONG_PERIOD = _any(_LONG, r"quota|\bcredits?\b")
_WAIT = re.compile(r"\b(?:in|after|for|wait) (\d{1,6}) ?(s|m|h)")
_SECONDS = {"s": 1, "m": 60, "h": 3600}

_OUTGOING = _any(
    r"\b(?:send|sending|sender|sent|outgoing|outbound|submission|relay|e-?mails)\b", _PERIOD
)
_CONTENT = re.compile(
    r"\b(?:spam|score|virus\w*|malware|phish\w*|content|keywords?|hops?|attachments?|archives?"
    r"|urls?|links?)\b"
)

# --- 6. what an operator has to correct

_NOT = (
    r"\b(?:reject\w*|not|no|\w+n't|denied|deny|block\w*|invalid\w*|un\w+ed|forbidden|fail\w*|refus\w*"
    r"|disallow\w*|prohibit\w*|black ?list\w*|suspend\w*|banned|disabled|must|need\w*|requir\w*"
    r"|expired|incorrect|wrong|bad|listed|unable|cannot|unknown|unresolvable|mismatch\w*|first"
    r"|turn on|erforderlich|requ?is\w*|requiere\w*|richiest\w*)\b"
)
_OPERATOR = _any(
    # login
    _near(
        r"\b(?:smtp ?)?aut(?:h|henti[cf]\w+|entica\w+)\b|credentials"
        r"|\blog(?:ged)? ?in\b(?! (?:for|since|in|within)\b)|\bpassword\b|user ?name|api.?key",
        _NOT,
    ),
    r"unauthenticated sender",
    # TLS
    _near(r"start ?tls|\btls\b|\bssl\b|encryption|secure (?:connection|channel)", _NOT),
    # EHLO
    r"\b(?:helo|ehlo)\b",
    # the network from which the daemon connects
    _near(
        r"\bclient (?:host|ip|\[)|\b(?:your|sending|source|sender) (?:\w+ )?(?:ip|host|server)"
        r"|\bip address(?:es)?\b|\bfrom (?:this|your) ip\b|\bnetwork\b(?! messages)",
        rf"{_NOT}|reputation",
    ),
    _near(
        r"\b(?:from|ip) ?[(\[]?\d{1,3}(?:\.\d{1,3}){3}\b",
        r"reject|block|accept|defer|refus|den(?:y|ied)|banned",
    ),
    r"reverse (?:dns|host|lookup)|\brdns\b|\bptr\b|name lookup failed",
    _near(r"\byour access\b", _NOT),
)

_BLOCKED_HOST = re.compile(r"\bclient host (?:is )?blocked")

_RECORDS = re.compile(  # in DNS
    r"\bdmarc\b|\bspf\b|\bdkim\b|unauthenticated (?:e-?mail|message)"
    r"|authentication (?:information|checks)"
)

_ACCOUNT = _any(
    _near(
        r"\b(?:your|sending|sender|smtp) (?:\w+ )?(?:account|mailbox)\b",
        r"suspend|disabled|block|review|banned|activ|locked|expired|closed|paused|pending",
    ),
    r"\b(?:free|trial) accounts?\b",
    r"(?:outgoing|sending) (?:is |has been )?(?:\w+ )?(?:blocked|disabled|paused|suspended)",
    _near(r"\boutgoing (?:e-?)?mails?\b", r"suspend|disabled|block"),
    r"activate your|licen[sc]e expired|not subscribed to|outboundspam",
)
"""Whatever the reason is, even if it is spam."""

_SENDER = _any(
    _near(
        r"\bsender\b|\b(?:from|return.path|mail ?from|envelope.from)\b"
        r"(?: address| domain| header|:)|\bmailfrom\b|\bemetteur\b"
        r"|\bsending (?:address|domain|account)|\bidentit(?:y|ies)",
        _NOT,
    ),
    r"(?:permissions?|allowed|permitted|authori[sz]ed|right) to (?:send|submit|perform)",
    r"send ?as ?denied|send.on.behalf|not owned by",
    _near(r"\b(?:e-?mail )?(?:address|domains?)\b", r"\b(?:not|un) ?verified|unregistered"),
    r"domain of (?:the )?sender|sandbox|verified sender",
    _LISTS,
    # relaying
    _near(r"\brelay\w*\b(?!=)|rcpthosts", _NOT),
    r"open relay|as a relay",
)

# --- 7. the server itself

_BUSY = _any(
    r"too many errors",
    _near(
        r"\b(?:server|system|service)\b",
        r"\bbusy\b|overload|shutting down|maintenance|(?:un|not )available",
    ),
    r"not accepting (?:\w+ )?(?:messages|connections|mail)",
    r"(?:insufficient|out of) (?:system )?(?:resources|storage|disk)|space shortage",
)


def enhanced_code(text: str) -> tuple[str, str]:
    """Return the class and the rest of an enhanced code; empty if there is none."""
    enhanced = _ENHANCED.match(text) or _ENHANCED_BEHIND.search(text[:MAX_READ])
    return (enhanced[1], enhanced[2]) if enhanced else ("", "")


def _own_words(text: str) -> str:
    """Return the server's own words, without quotations, as one line in lower case."""
    text = _REPEATED_CODE.sub(" ", text[:MAX_READ])
    said = _QUOTED.sub(lambda one: f" {LIST} " if _OF_LIST.match(one[0]) else " ", text)
    said = said.lower().replace("\u2019", "'")
    return " ".join(said.split())


def read_refusal(code: int, text: str, stage: Stage) -> Refusal:
    """Return the meaning of a reply; `text` may have several lines, without the code."""
    level, about = enhanced_code(text)
    level = level or str(code)[0]
    said = _own_words(text)
    by_code = RefusalMeaning.REFUSED if level == "5" else RefusalMeaning.PASSING
    if stage == "connection":
        meaning = _of_connection(code, about, said)
    else:
        meaning = _of_message(code, about, said, stage, by_code)
    return Refusal(meaning, _wait(said) if meaning is RefusalMeaning.QUOTA else None)


_NOT_RELAYED = re.compile(
    r"relay\w* (?:is |access )?(?:not|denied|prohibited|forbidden|refused|disallowed)"
    r"|(?:not|n't|unable to|no) (?:\w+ )?relay"
)
"""A server's own rule, although some servers give it the code of an address."""

_UNKNOWN = frozenset({"1.1", "1.2", "1.6", "1.10"})
_POLICY = _any(
    _NOT_RELAYED.pattern,
    r"\bspam\b|\bscore\b|virus|malware|phish|unsolicited|content|polic(?:y|ies)\b",
    rf"{_LISTS}|r[eé]puta[tc]|\bblock|\bspf\b|\bdkim\b|\bdmarc\b|access denied",
    r"\bsender (?:address )?(?:rejected|refused|denied|unknown)|\bsender ver|\bcallout\b",
    # the same in other languages
    r"\brichtlinie|\bpol[ií]tica|\bpolitique|unerw[uü]nscht|ind[eé]sirable|no desead|indesejad",
    r"indesiderat|sperrliste|gesperrt|bloqu|bloccat|liste noire|lista (?:negra|nera)",
    r"\brelais\b|retransmi|weiterleit|ретрансляц|спам|заблокир|репутац|垃圾|黑名单|中继",
)
_OF_KNOWN_ADDRESS = _any(  # which may exist, or does
    _GREYLISTED.pattern,
    _FULL_MAILBOX.pattern,
    _SIZE.pattern,
    r"temporar|try (?:again )?later|time(?:d |-)?out|soft error|servfail",
)


def says_unknown(text: str) -> bool:
    """Return whether a reply, without its code, says that the recipient's address does not exist.

    Only an enhanced code counts: servers also answer a bare 550, with any text, to senders that
    they block. A code with a text about a policy, or about a mailbox, does not count either.
    """
    level, about = enhanced_code(text)
    said = _own_words(text)
    others = (_POLICY, _RATE, _OF_KNOWN_ADDRESS)
    return level == "5" and about in _UNKNOWN and not any(one.search(said) for one in others)


def _of_connection(code: int, about: str, said: str) -> RefusalMeaning:
    if about in _QUOTA_CODES or _is_quota(code, about, said, "connection"):
        return RefusalMeaning.QUOTA
    if code == _PASSING_LOGIN:
        return RefusalMeaning.UNAVAILABLE
    operators = code in _LOGIN_REPLIES or about in _OPERATOR_CODES or _OPERATOR.search(said)
    return (
        RefusalMeaning.OPERATOR
        if operators or _SENDER.search(said) or _ACCOUNT.search(said)
        else RefusalMeaning.UNAVAILABLE
    )


def _of_message(
    code: int, about: str, said: str, stage: Stage, by_code: RefusalMeaning
) -> RefusalMeaning:
    if about in _RATE_OF_RECIPIENT:
        return RefusalMeaning.PASSING
    is_address = stage != "sender" and "submission" not in said and not _NOT_RELAYED.search(said)
    if about in _ADDRESS and is_address:
        return by_code
    if about in _RULE_OF_RECIPIENT or _RULE_BY_TEXT.search(said):
        return by_code
    is_passing = by_code is RefusalMeaning.PASSING
    if _GREYLISTED.search(said) or (is_passing and _SOON.search(said)):
        return RefusalMeaning.PASSING
    if not _RATE.search(said) and (about == _RECIPIENTS or _TOO_MANY_RECIPIENTS.search(said)):
        return RefusalMeaning.RECIPIENTS if stage == "recipient" else by_code
    if about in _SIZE_CODES or _SIZE.search(said):
        return by_code
    if about in _QUOTA_CODES or _is_quota(code, about, said, stage):
        return RefusalMeaning.QUOTA
    is_login = code in _LOGIN_REPLIES and "disabled recipient" not in said
    if is_login or about in _OPERATOR_CODES or _BLOCKED_HOST.search(said):
        return RefusalMeaning.OPERATOR
    if stage == "recipient" and LIST in said:  # nothing of the message is known yet
        return RefusalMeaning.OPERATOR
    if about in _SENDER_CODES or _RECORDS.search(said) or _ACCOUNT.search(said):
        return RefusalMeaning.SENDER
    if not _CONTENT.search(said):
        if _OPERATOR.search(said):
            return RefusalMeaning.OPERATOR
        if _SENDER.search(said):
            return RefusalMeaning.SENDER
    if is_passing and (about in _SYSTEM_CODES or _BUSY.search(said)):
        return RefusalMeaning.UNAVAILABLE
    if code == 421 and stage != "message":
        return RefusalMeaning.UNAVAILABLE
    is_dialogues = code in _DIALOGUE_REPLIES and not _CONTENT.search(said)
    return RefusalMeaning.SENDER if stage == "sender" or is_dialogues else by_code


def _is_quota(code: int, about: str, said: str, stage: Stage) -> bool:
    if _MAILBOX_OF_RECIPIENT.search(said):
        return False
    if _FULL_MAILBOX.search(said) and not _OUTGOING.search(said):
        return False
    if _RATE.search(said):
        return True
    if _CONTENT.search(said) or not (re.search(_BOUND, said) and re.search(_REACHED, said)):
        return False
    if re.search(_COUNTED, said):
        return True
    # only "quota exceeded": a mailbox's quota if one was named and no policy is mentioned
    return code not in (452, 552) and (stage != "recipient" or about.startswith("7."))


def _wait(said: str) -> timedelta | None:
    named = _WAIT.search(said)
    if named:
        return min(timedelta(seconds=int(named[1]) * _SECONDS[named[2]]), MAX_WAIT)
    if _LONG_PERIOD.search(said):
        return LONG_WAIT
    is_rate = re.search(rf"{_PERIOD}|\brate\b|frequen", said)
    return None if CONNECTIONS.search(said) and not is_rate else SHORT_WAIT
