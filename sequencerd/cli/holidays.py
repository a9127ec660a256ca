"""The command that fills the calendars of holidays."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from datetime import date

from sequencerd.cli.commands import connected, explain, on_shards, report_missing
from sequencerd.cli.ids import labelled
from sequencerd.cli.output import say, say_json, warn
from sequencerd.core.config import nearest
from sequencerd.errors import UsageError
from sequencerd.settings import Settings
from sequencerd.storage.connections import Shard
from sequencerd.storage.every_shard import ask
from sequencerd.storage.statements import QUERIES


@on_shards
async def holidays_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    code = arguments.country.upper()
    days = _public_holidays(code, arguments.years)
    calendar = arguments.calendar or code

    async def add(shard: Shard) -> int:
        async with connected(shard) as connection:
            added: int = await connection.fetchval(
                QUERIES["add_holidays"], calendar, list(days), list(days.values())
            )
        return added

    answers = await ask(explain(arguments), shards, add, warn=warn)
    years = ", ".join(map(str, sorted(set(arguments.years))))
    for shard, added in answers.found.items():
        if arguments.json:
            counts = {"calendar": calendar, "added": added, "known": len(days) - added}
            say_json(labelled(shard, counts, as_json=True))
            continue
        where = "" if shard.name is None else f"{shard.name}: "
        known = f"; {len(days) - added} existed already" if added < len(days) else ""
        say(f"{where}{calendar}: added {added} holidays of {years}{known}")
    return report_missing(answers)


def _public_holidays(code: str, years: Collection[int]) -> Mapping[date, str]:
    """Return the public holidays of a country, or a part such as DE-BY. Raises UsageError."""
    import holidays  # noqa: PLC0415 - no other command needs it, and it takes long

    known = holidays.list_supported_countries()
    country, _, part = code.partition("-")
    if country not in known:
        raise UsageError(
            f"holidays of {country!r} are not known: write the code of a country such as DE, or "
            "DE-BY for a part of it; insert your own days into the table holidays"
        )
    if part and part not in known[country]:
        hint = nearest(part, known[country]) if known[country] else "it has no parts"
        raise UsageError(f"{country} has no part {part!r}; {hint}")
    found = holidays.country_holidays(country, subdiv=part or None, years=years)
    for year in years:
        if not any(day.year == year for day in found):
            raise UsageError(f"the package holidays knows no holiday of {code} in {year}")
    return dict(sorted(found.items()))
