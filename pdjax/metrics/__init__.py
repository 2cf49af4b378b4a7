"""The figures of a run: timelines, reports and tables, computed from the event log alone."""

from pdjax.metrics.account import Account as Account
from pdjax.metrics.drawing import draw as draw
from pdjax.metrics.event_log import EventLog as EventLog
from pdjax.metrics.event_log import read_events as read_events
from pdjax.metrics.page import Beside as Beside
from pdjax.metrics.page import OverRate as OverRate
from pdjax.metrics.page import save_html as save_html
from pdjax.metrics.perfetto import save_trace as save_trace
from pdjax.metrics.report import Report as Report
from pdjax.metrics.run_log import RunLog as RunLog
from pdjax.metrics.stats import Stats as Stats
from pdjax.metrics.table import print_report as print_report
from pdjax.metrics.table import render as render
from pdjax.metrics.timeline import BusySpan as BusySpan
from pdjax.metrics.timeline import HandOff as HandOff
from pdjax.metrics.timeline import RequestTimeline as RequestTimeline
from pdjax.metrics.timeline import Summary as Summary
from pdjax.metrics.timeline import Timeline as Timeline
from pdjax.metrics.timeline import read_timeline as read_timeline
from pdjax.metrics.utilisation import Utilisation as Utilisation
