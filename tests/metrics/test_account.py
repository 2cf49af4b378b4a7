"""The parts of an account sum to the whole."""

import pytest

from pdjax.metrics.report import Report
from pdjax.types.worker import Role, WorkerSpec

WORKERS = (WorkerSpec('p', Role.PREFILL), WorkerSpec('d', Role.DECODE))


def test_accounts_close_over_many_requests(disaggregated, stamps):
  shifted = [
    type(stamps)(**{name: getattr(stamps, name) * (1 + i / 7) for name in stamps.__dataclass_fields__})
    for i in range(5)
  ]
  for one in shifted:
    report = Report.from_events(disaggregated(one), workers=WORKERS)
    account = report.account
    assert account.ttft_closes_s < 1e-12 and account.handoff_closes_s < 1e-12
    assert account.queue_ms + account.prefill_ms == pytest.approx(report.ttft.mean_ms)
    parts = account.wait_ms + account.wire_ms + account.admit_ms + account.step_ms
    assert parts == pytest.approx(report.handoff.mean_ms)
