// Draws the charts in the reader's theme, moves those over time together, and draws again when the theme changes.
(() => {
  'use strict';
  const read = (element) => JSON.parse(element.textContent);
  const themes = read(document.getElementById('themes'));
  const dark = window.matchMedia('(prefers-color-scheme: dark)');
  const charts = [...document.querySelectorAll('.chart')].map((element) => ({
    element,
    spec: read(element.nextElementSibling),
    overTime: 'overTime' in element.dataset,
  }));
  let whole = [0, 1];
  let shown = null;

  async function draw(chart) {
    if (chart.view) chart.view.finalize();
    const config = themes[dark.matches ? 'dark' : 'light'];
    const result = await window.vegaEmbed(chart.element, chart.spec, {
      config, actions: false, renderer: 'canvas', mode: 'vega-lite', tooltip: {theme: 'custom'},
    });
    chart.view = chart.element.view = result.view;
    if (!chart.overTime) return;
    whole = chart.view.scale('x').domain();
    chart.view.addSignalListener('zoom_a', (_, range) => show(range, chart));
    if (shown) chart.view.signal('zoom_a', shown).run();
  }

  // Let every chart over time show the same seconds; null is the whole run.
  function show(range, from) {
    const same = (a, b) => a === b || (a && b && a[0] === b[0] && a[1] === b[1]);
    if (same(range, shown)) return;
    shown = range && [...range];
    for (const chart of charts) {
      if (chart.overTime && chart.view && chart !== from) chart.view.signal('zoom_a', shown).runAsync();
    }
  }

  function change(move, zoom) {
    const [from, to] = shown || whole;
    const middle = (from + to) / 2 + move * (to - from);
    const half = Math.min((to - from) * zoom, whole[1] - whole[0]) / 2;
    const centre = Math.min(Math.max(middle, whole[0] + half), whole[1] - half);
    show([centre - half, centre + half], null);
  }

  for (const tools of document.querySelectorAll('.tools')) {
    tools.hidden = false;
    tools.addEventListener('click', (event) => {
      const {zoom, move} = event.target.dataset;
      if ('all' in event.target.dataset) show([...whole], null);
      else if (zoom || move) change(Number(move || 0), Number(zoom || 1));
    });
  }

  const drawAll = () => Promise.all(charts.map(draw)).then(
    () => { document.body.dataset.drawn = charts.length; },
    (error) => { document.body.dataset.failed = error; console.error(error); },
  );
  dark.addEventListener('change', drawAll);
  drawAll();
})();
