"""How one tests a sequence: `pytest examples/test_onboarding.py`."""

from pathlib import Path

from sequencerd.testing import load

ONBOARDING = load(Path(__file__).parent / "onboarding.yaml", outcomes={"Score": "next"})

ADA = {"name": "Ada", "email": "ada@example.com", "phone": "+4915112345678"}


def test_an_inactive_subject_is_reminded_and_gets_the_end_of_the_trial() -> None:
    journey = ONBOARDING.simulate(start="2026-03-02T09:00:00Z", data={**ADA, "score": 20})
    assert [entry.step for entry in journey.sent] == ["welcome", "score", "nudge", "last-call"]
    assert journey.status == "completed"


def test_an_active_subject_gets_tips() -> None:
    journey = ONBOARDING.simulate(
        start="2026-03-02T09:00:00Z", data=ADA, changes={"P2D": {"score": 80}}
    )
    assert "tips" in journey.steps
    assert "nudge" not in journey.steps


def test_a_payment_is_confirmed_at_once() -> None:
    journey = ONBOARDING.simulate(
        start="2026-03-02T09:00:00Z", data=ADA, changes={"P1D": {"plan": "pro"}}
    )
    assert [entry.details.get("subject") for entry in journey.sent] == ["Welcome, Ada", "Thank you"]
    assert f"{journey.ended_at:%d %H:%M}" == "03 09:00"
