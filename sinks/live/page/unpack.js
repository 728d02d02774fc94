/** The first script of a report: unpacks the modules of the page and the runs, then starts the page. Not a module. */
(async () => {
  const textOf = (id) => document.getElementById(id).textContent;
  const unpacked = (id) => {
    const bytes = Uint8Array.from(atob(textOf(id)), (one) => one.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
  };
  /** The columns that begin at a place of the bytes (see `Packing` of report_file.py): means, lowest and highest values. */
  const columnsOf = (bytes, { at, length, columns, gaps, middle, size, scale }) => {
    const steps = Array.from({ length: columns }, (_, column) => {
      const from = at + 4 * length * column;
      let now = 0;
      return Int32Array.from({ length }, (_, index) => {
        let change = 0;
        for (let byte = 3; byte >= 0; byte--) change = (change << 8) | bytes[from + length * byte + index];
        return (now += (change >>> 1) ^ -(change & 1));
      });
    });
    const isGap = new Set(gaps);
    const read = (step, index) => (isGap.has(index) ? null : middle + size * Math.sinh(step / scale));
    const [mean, below, above] = steps;
    const all = below ? [mean, mean.map((step, i) => step - below[i]), mean.map((step, i) => step + above[i])] : [mean];
    return all.map((column) => Array.from(column, read));
  };
  const add = (type, text) => {
    const script = document.createElement("script");
    script.type = type;
    script.textContent = text;
    document.head.append(script);
  };
  const [{ library, modules, report }, curves, values] = await Promise.all([
    unpacked("packed").json(),
    unpacked("curves").json(),
    unpacked("values").arrayBuffer(),
  ]);
  const bytes = new Uint8Array(values);
  report.media = JSON.parse(textOf("report-media"));
  const times = curves.times.map((time) => (Array.isArray(time) ? time : columnsOf(bytes, time)[0]));
  curves.runs.forEach((run, index) => {
    for (const series of Object.values(run.series)) {
      series.step = curves.columns[series.step];
      series.time = times[series.time];
      if (!Array.isArray(series.mean)) [series.mean, series.min, series.max] = columnsOf(bytes, series.mean);
    }
    Object.assign(report.runs[index], run);
  });
  report.notices.push(...curves.notices);
  window.stagecastReport = report;
  add("text/javascript", library);
  const address = (text) => `data:text/javascript;charset=utf-8,${encodeURIComponent(text)}`;
  const imports = Object.entries(modules).map(([name, text]) => [`stagecast/${name}`, address(text)]);
  add("importmap", JSON.stringify({ imports: Object.fromEntries(imports) }));
  add("module", 'import "stagecast/live.js";');
})().catch((error) => {
  console.error(error);
  document.getElementById("waiting-title").textContent = "This report cannot be unpacked";
  document.getElementById("waiting-text").textContent = `It needs a browser of 2024 or later (${error.message}).`;
});
