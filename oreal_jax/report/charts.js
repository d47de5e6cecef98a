// Elements and line charts. Text of a run is always set as textContent.

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (name === "class") node.className = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function shape(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// A number in about four digits.
function brief(value) {
  if (value === null || value === undefined) return "none";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

const percent = (value) => `${(100 * value).toFixed(1)}%`;
const runColour = (index) => `var(--run${index % 8})`;

const WIDTH = 330, HEIGHT = 140, LEFT = 54, RIGHT = 8, TOP = 8, BOTTOM = 18;

// `lines`: [{name, colour, points: [[x, y or null], ...], bars: [[x, low, high], ...]}].
// Returns a figure with the lines of `note`, and the values under the pointer.
function lineChart(title, unit, lines, note = [], options = {}) {
  const points = lines.flatMap((line) => line.points).filter(([, y]) => y !== null);
  const extent = points.map(([, y]) => y);
  for (const line of lines)
    for (const [, low, high] of line.bars ?? []) extent.push(low, high);
  let [low, high] = options.range ?? range(extent);
  const [first, last] = range(points.map(([x]) => x));
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const place = (x) =>
    LEFT + ((x - first) / (last - first || 1)) * (WIDTH - LEFT - RIGHT);
  const level = (y) =>
    HEIGHT - BOTTOM - ((y - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);

  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  for (const y of [low, (low + high) / 2, high]) {
    svg.append(
      shape("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: level(y), y2: level(y) }),
      shape("text", { x: LEFT - 5, y: level(y) + 3, "text-anchor": "end" }, brief(y)));
  }
  for (const [x, anchor] of [[first, "start"], [last, "end"]])
    svg.append(shape("text", { x: place(x), y: HEIGHT - 4, "text-anchor": anchor },
      options.label ? options.label(x) : brief(x)));
  for (const line of lines) {
    for (const [x, bottom, top] of line.bars ?? [])
      svg.append(shape("line", { x1: place(x), x2: place(x), y1: level(bottom),
        y2: level(top), style: `stroke: ${line.colour}`, "stroke-opacity": 0.5 }));
    const visible = line.points.filter(([, y]) => y !== null);
    svg.append(shape("polyline", { fill: "none", style: `stroke: ${line.colour}`,
      "stroke-width": 1.6, "stroke-dasharray": line.dash ?? "none",
      points: visible.map(([x, y]) => `${place(x).toFixed(1)},${level(y).toFixed(1)}`).join(" ") }));
    if (visible.length <= 40)
      for (const [x, y] of visible)
        svg.append(shape("circle", { cx: place(x), cy: level(y), r: 2,
          style: `fill: ${line.colour}` }));
  }
  const cursor = shape("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 });
  svg.append(cursor);

  const value = element("p", { class: "value" });
  const figure = element("figure", {},
    element("figcaption", { text: title }, element("span", { text: unit ? ` ${unit}` : "" })),
    svg, value);
  figure.append(...note.map((text) => element("p", { text })));
  const show = (x) => {
    cursor.setAttribute("x1", place(x));
    cursor.setAttribute("x2", place(x));
    const texts = lines.map((line) => {
      const point = line.points.find(([other]) => other === x);
      return point ? `${line.name} ${brief(point[1])}`.trim() : "";
    });
    value.textContent = `${options.label ? options.label(x) : `step ${x}`}: ` +
      texts.filter(Boolean).join(", ");
  };
  const places = [...new Set(points.map(([x]) => x))];
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    const distance = (candidate) => Math.abs(place(candidate) - x);
    if (places.length)
      show(places.reduce((a, b) => (distance(b) < distance(a) ? b : a)));
  });
  if (places.length) show(last);
  return figure;
}

function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 1];
}
