"""Notes of a report that spoil a comparison."""

from pdjax.metrics.report import Report
from pdjax.types.worker import Role, WorkerSpec

WORKERS = (WorkerSpec('p', Role.PREFILL), WorkerSpec('d', Role.DECODE))


def test_notes_name_what_spoils_a_comparison(disaggregated, stamps):
  workers = (WorkerSpec('p', 'prefill', devices=(0,)), WorkerSpec('d', 'decode', devices=(0,)))
  report = Report.from_events(disaggregated(stamps), workers=workers, calibrated=False, notes=['Timed on battery.'])
  assert report.notes[0] == 'Timed on battery.'
  assert 'p and d share a device' in report.notes[1] and 'Uncalibrated' in report.notes[2]
  assert Report.from_events(disaggregated(stamps), workers=WORKERS).notes == ()
