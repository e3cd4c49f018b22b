"""The conformance suite on every registered block; `zoo verify NAME` asks the same."""

import json

import pytest

from zoo.conformance import ask, cases, verify
from zoo.registry import list_blocks


def every_case():
    for name in list_blocks():
        numbers: dict[str, int] = {}
        for check, subject in cases(name):
            n = numbers[check.name] = numbers.get(check.name, -1) + 1
            marks = [pytest.mark.slow] if check.slow else []
            yield pytest.param(check, subject, id=f"{name}-{check.name}-{n}", marks=marks)


@pytest.mark.parametrize(("check", "subject"), list(every_case()))
def test_block(check, subject):
    result = ask(check, subject)
    assert result.ok, f"{subject.name}({dict(subject.options)}): {check.summary}\n{result.message}"


def test_report_is_json():
    report = verify("swiglu", only=["segments", "parameters"])
    document = json.loads(json.dumps(report.to_json()))
    assert document["ok"] and document["passed"] == len(document["results"]) == 4
    assert "4 of 4" in str(report)
