// Elements and numbers. All text reaches the page as text: nothing here, or elsewhere, parses HTML.

function make(tag, about = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(about)) {
    if (name === "text") element.textContent = value;
    else if (name === "on") for (const [event, act] of Object.entries(value)) element.addEventListener(event, act);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...inside);
  return element;
}

function draw(tag, about = {}, ...inside) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(about)) element.setAttribute(name, value);
  element.append(...inside);
  return element;
}

const byId = (id) => document.getElementById(id);

const whole = new Intl.NumberFormat("en-US");
const count = (number) => whole.format(number);
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

function scaled(number, units, base = 1000) {
  let at = 0;
  while (Math.abs(number) >= base && at < units.length - 1) {
    number /= base;
    at += 1;
  }
  const digits = at === 0 || Math.abs(number) >= 100 ? 0 : Math.abs(number) >= 10 ? 1 : 2;
  return `${number.toFixed(digits)}${units[at]}`;
}

const size = (bytes) => scaled(bytes, [" B", " kB", " MB", " GB", " TB", " PB"]);
const amount = (number) => scaled(number, ["", " K", " M", " B", " T", " Q"]);

// Numbers that JSON cannot hold come as text: "nan", "inf", integers beyond 2**53.
function figure(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  if (value === 0) return "0";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value).replace("-", "−");
  const size = Math.abs(value);
  const text = size >= 1e5 || size < 1e-3 ? value.toExponential(digits - 2) : value.toPrecision(digits);
  return text.replace("e+", "e").replaceAll("-", "−");
}

const share = (part, all) => (all ? `${((100 * part) / all).toFixed(part / all < 0.1 ? 1 : 0)} %` : "–");
const shapeText = (shape) => (shape ? (shape.length ? shape.join(" × ") : "scalar") : "?");

// The colour that a custom property stands for in the present theme, as [red, green, blue].
const colours = new Map();

function colour(name) {
  if (!colours.has(name)) {
    const probe = make("span", { hidden: true });
    probe.style.color = `var(${name})`;
    document.body.append(probe);
    colours.set(name, getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number));
    probe.remove();
  }
  return colours.get(name);
}

const mixed = (from, to, part) => from.map((value, at) => Math.round(value + (to[at] - value) * part));
