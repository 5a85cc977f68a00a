"""Which real models a run takes, and the table of figures at its end."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import pytest

from tests.zoo.architectures import ARCHITECTURES, sample


def _chosen(option: str, route: bool) -> list[tuple[str, str]]:
    if option == "sample":
        cases = sample(datetime.date.today().toordinal())
        # the path of a heavy model takes minutes on a small machine
        return list(cases[:1] if route else cases)
    names = list(ARCHITECTURES) if option == "full" else option.split(",")
    unknown = [name for name in names if name not in ARCHITECTURES]
    if unknown:
        raise pytest.UsageError(f"--zoo {unknown[0]}: expected sample, full, or some of {', '.join(ARCHITECTURES)}")
    items = [ARCHITECTURES[name] for name in names]
    return [(item.name, scheme) for item in items for scheme in (item.route if route else item.schemes)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument in ("compared", "travelled"):
        if argument in metafunc.fixturenames:
            cases = _chosen(metafunc.config.getoption("zoo"), route=argument == "travelled")
            metafunc.parametrize(argument, cases, ids=["-".join(case) for case in cases])


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Put figures into the table at the end of the run."""

    def write(**figures: object) -> None:
        cells = [
            f"{key} {value:.1e}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
        ]
        record_property("zoo", "  ".join(cells))

    return write


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [item for kind in ("passed", "failed") for item in terminalreporter.getreports(kind)]
    lines = [
        f"{report.nodeid.partition('[')[2].rstrip(']'):<42} {value}  {report.duration:.0f} s"
        for report in reports
        for key, value in getattr(report, "user_properties", ())
        if key == "zoo" and report.when == "call"
    ]
    if lines and terminalreporter.config.getoption("zoo") != "sample":
        terminalreporter.section("real models")
        for line in lines:
            terminalreporter.line(line)
