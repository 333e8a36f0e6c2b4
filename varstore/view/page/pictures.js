// Pictures: histograms, heat maps, curves over steps, the strip of what moved.

const repaint = new Set(); // what draws with colours of the theme, to be drawn again when it changes

function barsPath(counts, from, width, scale) {
  let path = "";
  counts.forEach((value, at) => {
    if (!value) return;
    const x = from + at * width;
    path += `M${x} 100V${(100 - 100 * scale(value)).toFixed(2)}H${(x + width).toFixed(3)}V100Z`;
  });
  return path;
}

function outlinePath(counts, from, width, scale) {
  let path = `M${from} 100`;
  counts.forEach((value, at) => (path += `V${(100 - 100 * scale(value)).toFixed(2)}H${(from + (at + 1) * width).toFixed(3)}`));
  return `${path}V100`;
}

function spark([, , counts]) {
  const most = Math.max(...counts);
  const isOne = counts.length === 1; // a thin bar, as all values are one
  const path = barsPath(counts, isOne ? 49 : 0, isOne ? 2 : 100 / counts.length, (value) => value / most);
  return draw("svg", { class: "spark", viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" },
    draw("path", { d: path }));
}

// `bins` and `other` are [start, width, counts]; `other` is that of the checkpoint that is compared with.
function histogram(bins, other, isLog) {
  const [start, width, counts] = bins;
  let low = start;
  let high = start + width * counts.length;
  if (other) {
    low = Math.min(low, other[0]);
    high = Math.max(high, other[0] + other[1] * other[2].length);
  }
  const span = high - low || 1;
  const place = (value) => (100 * (value - low)) / span;
  const densest = (some) => Math.max(...some[2]) / some[1];
  const most = Math.max(densest(bins), other ? densest(other) : 0);
  const scaleOf = (some) => (value) => {
    const part = value / some[1] / most; // by density, so that bins of other widths compare
    const all = most * Math.max(bins[1], other ? other[1] : 0);
    return isLog ? Math.log1p(part * all) / Math.log1p(all) : part;
  };
  const step = (some) => (100 * some[1]) / span;
  const svg = draw("svg", { class: "plot", viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" });
  const total = counts.reduce((sum, value) => sum + value, 0);
  svg.setAttribute("aria-label", `Histogram of ${plural(total, "value")} from ${figure(low)} to ${figure(high)}` +
    `; the fullest of ${plural(counts.length, "bin")} has ${count(Math.max(...counts))}`);
  svg.append(draw("path", { class: "bars", d: barsPath(counts, place(start), step(bins), scaleOf(bins)) }));
  if (other) svg.append(draw("path", { class: "ghost", d: outlinePath(other[2], place(other[0]), step(other), scaleOf(other)) }));
  if (low < 0 && high > 0) svg.append(draw("path", { class: "zero", d: `M${place(0)} 0V100` }));
  const read = make("p", { class: "read" });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const value = low + ((event.clientX - box.left) / box.width) * span;
    const at = Math.floor((value - start) / width);
    read.textContent = at < 0 || at >= counts.length ? "" :
      `${figure(start + at * width)} to ${figure(start + (at + 1) * width)}: ${count(counts[at])} (${share(counts[at], total)})`;
  });
  svg.addEventListener("pointerleave", () => (read.textContent = ""));
  const axis = make("div", { class: "axis" }, make("span", { text: figure(low) }), make("span", { text: figure(high) }));
  return [svg, axis, read];
}

const bytesOf = (text) => Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
const shadesOf = (kind) => {
  const [middle, plus, minus, most] = ["--middle", "--plus", "--minus", "--accent"].map(colour);
  return kind === "means" ? (code) => (code < 128 ? mixed(middle, minus, (128 - code) / 127) : mixed(middle, plus, (code - 128) / 127))
    : (code) => mixed(middle, most, (code - 1) / 254);
};

// `map` has `shape`, `blocks` (rows and columns), and for each kind its largest value and a byte per block; 0 is a block
// in which a value is nan or infinite.
function heatMap(map, kind) {
  const [rows, columns] = map.blocks;
  const [largest, text] = map[kind];
  const codes = bytesOf(text);
  const valueOf = (code) => (kind === "means" ? ((code - 128) / 127) * largest : ((code - 1) / 254) * largest);
  const canvas = make("canvas", { class: "heat", role: "img", width: columns, height: rows });
  const broken = codes.reduce((sum, code) => sum + (code === 0), 0);
  const what = kind === "means" ? "means" : "mean magnitudes";
  canvas.setAttribute("aria-label", `Heat map of the ${what} of ${rows} × ${columns} blocks, of at most ${figure(largest)} in magnitude` +
    (broken ? `; ${plural(broken, "block")} with nan or inf` : ""));
  canvas.style.aspectRatio = `${Math.min(Math.max(columns / rows, 0.75), 12)}`;
  const ramp = make("canvas", { class: "ramp", width: 255, height: 1, "aria-hidden": "true" });
  const paint = () => {
    const shade = shadesOf(kind);
    const worst = colour("--broken");
    const fill = (target, all) => {
      const context = target.getContext("2d");
      const image = context.createImageData(target.width, target.height);
      all.forEach((code, at) => image.data.set([...(code ? shade(code) : worst), 255], 4 * at));
      context.putImageData(image, 0, 0);
    };
    fill(canvas, codes);
    fill(ramp, Array.from({ length: 255 }, (_, at) => at + 1));
  };
  paint();
  repaint.add(paint);
  const read = make("p", { class: "read" });
  const range = (at, blocks, length) => {
    const [first, last] = [at, at + 1].map((edge) => Math.floor((edge * length) / blocks));
    return last - first > 1 ? `${count(first)}–${count(last - 1)}` : count(first);
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
    const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
    const code = codes[row * columns + column];
    read.textContent = `row ${range(row, rows, map.shape[0])}, column ${range(column, columns, map.shape[1])}: ` +
      (code ? figure(valueOf(code), 3) : "nan or inf");
  });
  canvas.addEventListener("pointerleave", () => (read.textContent = ""));
  const ends = kind === "means" ? [-largest, 0, largest] : [0, largest];
  const axis = make("div", { class: "axis" }, ...ends.map((end) => make("span", { text: figure(end, 3) })));
  const folded = rows < map.shape[0] || columns < map.shape[1];
  const block = map.shape.map((length, at) => Math.ceil(length / map.blocks[at])).join(" × ");
  const note = make("p", { class: "note", text:
    (folded ? `Each cell is the ${kind === "means" ? "mean" : "mean of the magnitudes"} of a block of up to ${block} values: ` : "Each cell is one value: ") +
    `${count(map.shape[0])} rows (the first axis) and ${count(map.shape[1])} columns (the others), shown in steps of ` +
    `1/${kind === "means" ? 127 : 254} of the largest.` + (broken ? ` ${plural(broken, "cell")} with nan or inf in the colour of errors.` : "") });
  return [canvas, ramp, axis, read, note];
}

// A curve of numbers over steps; what is not a number is a gap.
function curve(name, steps, values, form = figure) {
  const known = steps.map((step, at) => [step, values[at], at]).filter(([, value]) => Number.isFinite(value));
  const last = known.at(-1);
  const value = make("span", { class: "value", text: last ? form(last[1]) : "–" });
  const chart = make("figure", { class: "chart" },
    make("figcaption", {}, make("span", { class: "what", text: name, title: name }), value));
  if (!known.length) return chart;
  const low = Math.min(...known.map(([, value]) => value));
  const high = Math.max(...known.map(([, value]) => value));
  const [first, end] = [steps[0], steps.at(-1)];
  const x = (step) => (end > first ? (100 * (step - first)) / (end - first) : 50);
  const y = (value) => (high > low ? 96 - (92 * (value - low)) / (high - low) : 50);
  let path = "";
  let before = -2;
  for (const [step, value, at] of known) {
    path += `${at === before + 1 ? "L" : "M"}${x(step).toFixed(2)} ${y(value).toFixed(2)}`;
    before = at;
  }
  const cursor = draw("path", { class: "cursor" });
  const svg = draw("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" },
    draw("path", { class: "curve", d: path }),
    draw("path", { class: "point", d: `M${x(last[0]).toFixed(2)} ${y(last[1]).toFixed(2)}h0` }), cursor);
  svg.setAttribute("aria-label", `${name} over steps ${first} to ${end}: from ${form(low)} to ${form(high)}, ${form(last[1])} at the last`);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (100 * (event.clientX - box.left)) / box.width;
    const near = known.reduce((best, one) => (Math.abs(x(one[0]) - at) < Math.abs(x(best[0]) - at) ? one : best));
    value.textContent = `step ${count(near[0])}: ${form(near[1])}`;
    cursor.setAttribute("d", `M${x(near[0])} 0V100`);
  });
  svg.addEventListener("pointerleave", () => {
    value.textContent = form(last[1]);
    cursor.removeAttribute("d");
  });
  const range = make("span", { text: high > low ? `${form(low)} … ${form(high)}` : "" });
  chart.append(svg, make("div", { class: "axis" }, make("span", { text: count(first) }), range, make("span", { text: count(end) })));
  return chart;
}

// The bytes of each step: those of its own files below, and above them those that links share with earlier steps.
function disk(steps, own, all) {
  const most = Math.max(...all, 1);
  const width = 100 / steps.length;
  const saved = all.reduce((sum, value, at) => sum + value - own[at], 0);
  const svg = draw("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img" },
    draw("path", { class: "area", d: barsPath(all, 0, width, (value) => value / most) }),
    draw("path", { class: "own", d: barsPath(own, 0, width, (value) => value / most) }));
  const taken = own.reduce((sum, value) => sum + value, 0);
  svg.setAttribute("aria-label", `Bytes per step, new and shared: ${size(taken)} on disk, links save ${size(saved)}`);
  return make("figure", { class: "chart" },
    make("figcaption", {}, make("span", { class: "what", text: "disk" }), make("span", { class: "value", text: `${size(taken)} of ${size(taken + saved)}` })),
    svg, make("div", { class: "axis" }, make("span", { text: count(steps[0]) }), make("span", { text: count(steps.at(-1)) })));
}
