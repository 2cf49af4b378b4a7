"""Shares of a run that workers were busy, from logs written by hand."""

from pdjax.metrics.report import Report
from pdjax.types.worker import Role, WorkerSpec

WORKERS = (WorkerSpec('p', Role.PREFILL), WorkerSpec('d', Role.DECODE))


def test_utilisation_is_the_share_of_the_run_that_steps_cover(disaggregated, stamps):
  prefill, decode = Report.from_events(disaggregated(stamps), workers=WORKERS).utilisation
  assert (prefill.worker, prefill.role, prefill.busy, prefill.prefill) == (
    'p',
    Role.PREFILL,
    0.5 / 1.8125,
    0.5 / 1.8125,
  )
  assert (decode.busy, decode.decode, decode.prefill, decode.fused) == (0.5 / 1.8125, 0.5 / 1.8125, 0, 0)
  assert prefill.transfer == decode.transfer == 0.125 / 1.8125


def test_overlapping_and_overhanging_spans_count_once(log):
  log.turn(0.0)
  log.arrive('r')
  first, second = log.step('w', chunks=[('r', 0, 4)]), log.step('w', decodes=['r'])
  log.turn(2.0)
  log.done(first, 0.0, 1.5, {'r': 1})
  log.finish('r')
  log.turn(9.0)
  log.done(second, 1.0, 9.0)  # computed past the end of the run
  (use,) = Report.from_events(log.events, workers=[WorkerSpec('w')]).utilisation
  assert (use.busy, use.prefill, use.decode) == (1.0, 0.75, 0.5)
