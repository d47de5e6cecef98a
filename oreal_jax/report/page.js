// The sections of the page, from the data that oreal_jax/report/page.py writes.

const data = JSON.parse(document.getElementById("data").textContent);
const section = (id) => document.getElementById(id);
const several = data.runs.length > 1;
const runName = (run) => (several ? run.name : "");

function showRuns() {
  data.runs.forEach((run, index) => {
    const swatch = element("span", { class: "swatch", style: `background: ${runColour(index)}` });
    const done = run.steps.length ? run.steps.at(-1) + 1 : 0;
    const steps = `, ${done}${run.planned ? ` of ${run.planned}` : ""} steps`;
    const model = run.model ? `, from ${run.model}` : "";
    section("runs").append(element("span", { class: "run" }, swatch, run.name + steps + model));
  });
}

function showWarnings() {
  const lines = data.runs.flatMap((run) => [
    ...run.findings.map(({ metric, text }) => `${text} (${metric})`),
    ...run.notes,
  ].map((text) => (several ? `${run.name}: ${text}` : text)));
  section("warnings").append(...(lines.length
    ? lines.map((text) => element("div", { class: "warning", text }))
    : [element("p", { class: "note", text: "None." })]));
}

function showCurves() {
  const grid = element("div", { class: "grid" });
  for (const { name, unit, meaning, healthy } of data.charts) {
    const lines = data.runs.map((run, index) => ({
      name: runName(run), colour: runColour(index),
      points: (run.metrics[name] ?? []).map((value, i) => [run.steps[i], value]),
    })).filter((line) => line.points.length);
    const note = [meaning, healthy && `healthy: ${healthy}`].filter(Boolean);
    grid.append(lineChart(name, unit, lines, note));
  }
  section("curves").append(data.charts.length ? grid
    : element("p", { class: "note", text: "No finished step yet." }));
}

const interval = ({ value, low, high }) =>
  percent(value) + (low === null ? "" : ` (${percent(low)} to ${percent(high)})`);

function showEvaluations() {
  const each = data.runs.flatMap((run) => run.evaluations), target = section("evaluations");
  if (!each.length && !data.items.length) {
    target.append(element("p", { class: "note",
      text: "None during training (field evaluation of the config). Files of " +
        "oreal eval --items are added by oreal report --items FILE." }));
    return;
  }
  const grid = element("div", { class: "grid" });
  const names = [...new Set(each.map((e) => `${e.set}, ${e.measure}`))];
  for (const name of names) {
    const lines = data.runs.map((run, index) => {
      const own = run.evaluations.filter((e) => `${e.set}, ${e.measure}` === name);
      return { name: runName(run), colour: runColour(index),
        points: own.map((e) => [e.step, e.value]),
        bars: own.filter((e) => e.low !== null).map((e) => [e.step, e.low, e.high]) };
    }).filter((line) => line.points.length);
    grid.append(lineChart(name, "share solved", lines, ["healthy: rises"]));
  }
  target.append(grid);

  // A row per set and step, a column per run.
  const rows = new Map();
  data.runs.forEach((run, index) => run.evaluations.forEach((e) => {
    const key = JSON.stringify([e.set, e.measure, e.step]);
    if (!rows.has(key)) rows.set(key, { ...e, cells: data.runs.map(() => "") });
    rows.get(key).cells[index] = interval(e) + (e.best ? ", best so far" : "");
  }));
  const sorted = [...rows.values()].sort((a, b) => a.set.localeCompare(b.set) || a.step - b.step);
  const body = sorted.map((row) => [row.set, row.measure, `after step ${row.step}`,
    row.problems ?? "", ...row.cells]);
  const heads = data.runs.map((run) => run.name);
  if (body.length) target.append(makeTable(["set", "measure", "policy", "problems", ...heads], body));
  if (data.items.length)
    target.append(makeTable(["set", "measure", "file", "problems", "value"],
      data.items.map((e) => [e.set, e.measure, e.source, e.problems, interval(e)])));
  if (each.some((e) => e.low === null))
    target.append(element("p", { class: "note", text: "In parentheses: 95% interval over problems. " +
      "It is omitted where the run's files do not determine it; files of oreal eval --items do." }));
}

function makeTable(heads, rows) {
  const cells = (tag, texts) => texts.map((text) => element(tag, { text }));
  return element("table", {}, element("thead", {}, element("tr", {}, ...cells("th", heads))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells("td", row)))));
}

function showReward() {
  const target = section("reward");
  const scored = data.runs.filter((run) => run.diagnostics);
  if (!scored.length) {
    target.append(element("p", { class: "note", text: "No completions with token scores." }));
    return;
  }
  const tenth = (part) => `tokens ${part * 10}% to ${part * 10 + 10}%`;
  const table = scored.map(({ name, diagnostics: d }) => [
    name, `${d.steps[0]} to ${d.steps[1]}`, d.completions, d.auc.toFixed(3),
    d.pairs ? `${interval(d.pairs)} of ${d.pairs.prompts}` : "",
    d.diverges_at === null ? "nowhere" : `from ${d.diverges_at * 10}% of the tokens on`,
    ...[d.early.correct, d.early.incorrect].map((x) => (x === null ? "" : percent(x))),
  ]);
  target.append(element("p", { class: "note", text: "On the completions trained on in the newest steps. " +
      "An uninformative model has AUC 0.5; uniform weights put 50% on the first half." }),
    makeTable(["run", "steps", "completions", "AUC", "correctly ordered pairs",
      "predictions diverge", "weight on first half, correct", "incorrect"], table));
  const lines = (values) => data.runs.flatMap((run, index) => run.diagnostics
    ? [{ name: runName(run), colour: runColour(index), points: values(run.diagnostics) }] : []);
  const grid = element("div", { class: "grid" });
  grid.append(
    lineChart("AUC by position", "", lines((d) => d.auc_parts.map((y, x) => [x, y])),
      ["of the mean token score within each tenth of a completion",
        "healthy: above 0.5, rises to the end"],
      { label: tenth }),
    lineChart("credit by position", "probability", data.runs.flatMap((run, index) =>
      ["correct", "incorrect"].flatMap((outcome) => run.diagnostics
        ? [{ name: `${runName(run)} ${outcome}`.trim(), colour: runColour(index),
            dash: outcome === "correct" ? "none" : "4 3",
            points: run.diagnostics.credit[outcome].map((y, x) => [x, y]) }] : [])),
      ["mean prediction from the tokens so far, correct (solid) and incorrect (dashed)",
        "healthy: they diverge early, and increasingly"],
      { label: tenth }),
    lineChart("calibration", "share correct", data.runs.flatMap((run, index) => run.diagnostics
      ? [{ name: runName(run), colour: runColour(index),
          points: run.diagnostics.calibration.map((bin) => [bin.predicted, bin.value]),
          bars: run.diagnostics.calibration.map((bin) => [bin.predicted, bin.low, bin.high]) }] : []),
      ["share of correct completions by prediction, in bins of equal size, with 95% intervals",
        "healthy: close to the prediction"],
      { range: [0, 1], label: (x) => `predicted ${brief(x)}` }));
  target.append(grid);
}

function showDifferences() {
  if (!data.differences.length) return;
  section("curves").append(element("h3", { text: "Settings that differ" }),
    makeTable(["setting", ...data.runs.map((run) => run.name)],
      data.differences.map(({ name, values }) => [name, ...values])));
}

async function main() {
  document.title = `oreal report: ${data.runs.map((run) => run.name).join(", ")}`;
  showRuns();
  showWarnings();
  showCurves();
  showDifferences();
  showEvaluations();
  showReward();
  const parts = document.getElementById("contents").textContent.split("\n\n");
  const contents = data.runs.map((run, index) => (parts[index] ? parts[index].split("\n") : []));
  const tables = await Promise.all(data.runs.map((run) => readTable(run.rows)));
  window.browser = new Browser(data, contents, tables);
  document.documentElement.dataset.ready = Math.round(performance.now());
}

main().catch((error) => {
  const text = `This browser cannot show the trajectories: ${error}`;
  section("extent").textContent = text;
  console.error(error);
});
