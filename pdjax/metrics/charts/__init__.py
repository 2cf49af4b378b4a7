"""Charts of runs, each as an Altair chart: steps and pages over time, latencies, accounts, figures over the rate.

    from pdjax.metrics import charts
    charts.gantt(result.report)                         # a notebook shows it, drawn by the reader's browser
    charts.picture(charts.gantt(result.report))         # the same as a PNG, which shows wherever the notebook goes
    charts.latency(ours.report, baseline.report, metric='ttft')
    charts.save(charts.overview(result.report), 'run.svg')

Altair is loaded when a chart is made.
"""

from pdjax.metrics.charts.accounts import account as account
from pdjax.metrics.charts.files import Picture as Picture
from pdjax.metrics.charts.files import page_spec as page_spec
from pdjax.metrics.charts.files import picture as picture
from pdjax.metrics.charts.files import save as save
from pdjax.metrics.charts.hits_over_time import interval_s as interval_s
from pdjax.metrics.charts.hits_over_time import place_colours as place_colours
from pdjax.metrics.charts.hits_over_time import prefix_hits as prefix_hits
from pdjax.metrics.charts.latencies import METRICS as METRICS
from pdjax.metrics.charts.latencies import latency as latency
from pdjax.metrics.charts.latencies import limit_ms as limit_ms
from pdjax.metrics.charts.pages_over_time import pages as pages
from pdjax.metrics.charts.rates import over_rate as over_rate
from pdjax.metrics.charts.style import MAX_BARS as MAX_BARS
from pdjax.metrics.charts.systems import system_colours as system_colours
from pdjax.metrics.charts.together import overview as overview
from pdjax.metrics.charts.together import side_by_side as side_by_side
from pdjax.metrics.charts.work_over_time import gantt as gantt
from pdjax.metrics.charts.work_over_time import slot_seconds as slot_seconds
