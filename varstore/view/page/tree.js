// The variables as a tree of the parts of their names, or as a list; only the rows that can be seen are in the document.

const COLUMNS = [
  { key: "name", title: "Name", of: null },
  { key: "shape", title: "Shape" },
  { key: "dtype", title: "Type" },
  { key: "params", title: "Params", of: (variable) => variable.count, sum: true, text: amount },
  { key: "bytes", title: "Bytes", of: (variable) => variable.nbytes, sum: true, text: size },
  { key: "mean", title: "Mean", of: (variable) => variable.mean, text: figure, leaf: true },
  { key: "std", title: "Std", of: (variable) => variable.std, text: figure, leaf: true },
  { key: "norm", title: "Norm", of: (variable) => variable.norm, squares: true, text: figure },
  { key: "moved", title: "Moved", of: (variable) => variable.moved, text: figure },
  { key: "shown", title: "Spread" },
  { key: "marks", title: "Marks", of: (variable) => variable.marks.length, sum: true },
];
const MARKS = new Map([["nan", "nan"], ["inf", "inf"], ["zero", "all zero"], ["constant", "constant"], ["dead", "dead rows"], ["duplicate", "duplicate"]]);
const marksOf = ({ marks }) => marks.filter((mark) => mark !== "constant" || !marks.includes("zero")); // zero says it
const isBad = (mark) => mark === "nan" || mark === "inf";
const collator = new Intl.Collator("en", { numeric: true });
const asNumber = (value) => (typeof value === "string" ? Number(value.replace("inf", "Infinity")) : value);

class Group {
  constructor(label, path, depth) {
    Object.assign(this, { label, path, depth, variable: null, below: new Map(), values: {}, variables: 0, marks: new Map() });
  }
}

function grow(variables, separator) {
  const root = new Group("", "", -1);
  for (const variable of variables) {
    let at = root;
    for (const part of variable.name.split(separator)) {
      if (!at.below.has(part)) at.below.set(part, new Group(part, at === root ? part : at.path + separator + part, 0));
      at = at.below.get(part);
    }
    if (at.variable) { // two names that look alike
      const twin = new Group(at.label, `${at.path}#${variable.number}`, 0);
      root.below.set(twin.path, twin);
      at = twin;
    }
    at.variable = variable;
  }
  const settle = (node, depth) => {
    while (node !== root && !node.variable && node.below.size === 1) {
      const [only] = node.below.values();
      Object.assign(node, { label: node.label + separator + only.label, path: only.path, variable: only.variable, below: only.below });
    }
    node.depth = depth;
    const parts = [...node.below.values()];
    for (const part of parts) settle(part, depth + 1);
    measure(node, parts);
  };
  settle(root, -1);
  return root;
}

function measure(node, parts) {
  const own = node.variable ? [node.variable] : [];
  node.variables = own.length + parts.reduce((sum, part) => sum + part.variables, 0);
  for (const { key, of, sum, squares } of COLUMNS) {
    if (!of) continue;
    const all = [...own.map((variable) => asNumber(of(variable))), ...parts.map((part) => part.values[key])].filter((value) => Number.isFinite(value));
    node.values[key] = !all.length ? null : sum ? all.reduce((a, b) => a + b, 0) : squares ? Math.hypot(...all) : Math.max(...all);
  }
  node.odd = own.filter(({ marks }) => marks.some((mark) => !isBad(mark))).length + parts.reduce((sum, part) => sum + part.odd, 0);
  node.marks = new Map();
  for (const mark of own.flatMap((variable) => variable.marks)) node.marks.set(mark, 1);
  for (const part of parts) for (const [mark, number] of part.marks) node.marks.set(mark, (node.marks.get(mark) ?? 0) + number);
}

class Tree {
  constructor(variables, { separator, isCompared, isLive, open }) {
    this.variables = variables;
    this.open = open;
    this.isLive = isLive;
    this.root = grow(variables, separator);
    this.isTree = true;
    this.sort = null;
    this.wanted = new Set(); // marks
    this.search = "";
    this.folded = new Set();
    this.lines = [];
    this.active = 0;
    this.chosen = null;
    this.box = byId("tree");
    this.rows = byId("rows");
    this.box.classList.toggle("compared", isCompared);
    this.columns = COLUMNS.filter(({ key }) => key !== "moved" || isCompared);
    this.box.setAttribute("aria-colcount", this.columns.length);
    this.head();
    if (variables.length > 400) for (const node of this.groups()) if (node.depth > 0 || this.root.below.size > 60) this.folded.add(node.path);
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.rows.addEventListener("click", (event) => this.click(event));
    addEventListener("scroll", () => this.render(), { passive: true });
    addEventListener("resize", () => this.render());
    new ResizeObserver(() => this.render()).observe(this.box);
    this.update();
  }

  // Draw the rows before the next frame, once; `seeks` also scrolls to the active one.
  render(seeks = false) {
    this.seeks ||= seeks;
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.height = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
      if (this.seeks) this.seek();
      this.seeks = false;
      this.draw();
    });
  }

  groups(node = this.root, found = []) {
    for (const part of node.below.values()) {
      if (part.below.size) found.push(part);
      this.groups(part, found);
    }
    return found;
  }

  head() {
    const cells = this.columns.map(({ key, title, of }) => {
      const isSorted = of || key === "name";
      const about = { role: "columnheader", class: `${key} ${of && key !== "marks" ? "number" : ""}`, "aria-sort": isSorted ? "none" : null };
      return make("div", about, isSorted ? make("button", { type: "button", "data-key": key, text: title, on: { click: () => this.sortBy(key) } })
        : make("span", { class: "plain-head", text: title }));
    });
    byId("head").replaceChildren(make("div", { role: "row", class: "line" }, ...cells));
  }

  sortBy(key) {
    const first = key === "name" ? 1 : -1;
    const way = this.sort?.key !== key ? first : this.sort.way === first ? -first : 0;
    this.sort = way ? { key, way } : null;
    for (const button of byId("head").querySelectorAll("button")) {
      const is = this.sort && button.dataset.key === this.sort.key;
      button.parentNode.setAttribute("aria-sort", is ? (this.sort.way > 0 ? "ascending" : "descending") : "none");
    }
    this.update();
  }

  sorted(nodes) {
    if (!this.sort) return nodes;
    const { key, way } = this.sort;
    if (key === "name") return nodes.sort((a, b) => way * collator.compare(this.isTree ? a.label : a.path, this.isTree ? b.label : b.path));
    const value = (node) => node.values[key] ?? Infinity * way; // last
    return nodes.sort((a, b) => way * (value(a) - value(b) || 0));
  }

  shows(variable) {
    return variable.lower.includes(this.search) && (!this.wanted.size || variable.marks.some((mark) => this.wanted.has(mark)));
  }

  update() {
    const isFiltered = Boolean(this.search || this.wanted.size);
    const before = this.lines[this.active];
    const lines = [];
    const reach = (node) => (node.variable && this.shows(node.variable)) || [...node.below.values()].some(reach);
    const visit = (node) => {
      for (const part of this.sorted([...node.below.values()])) {
        if (isFiltered && !reach(part)) continue;
        const isLeaf = part.variable && (!isFiltered || this.shows(part.variable));
        if (this.isTree) lines.push(part);
        else if (isLeaf) lines.push(part);
        if (part.below.size && (!this.isTree || isFiltered || !this.folded.has(part.path))) visit(part);
      }
    };
    visit(this.root);
    this.lines = this.isTree || !this.sort ? lines : this.sorted(lines);
    this.isFiltered = isFiltered;
    this.active = Math.max(0, before ? this.lines.indexOf(before) : 0);
    const found = isFiltered ? this.variables.filter((variable) => this.shows(variable)).length : this.variables.length;
    byId("count").textContent = isFiltered ? `${count(found)} of ${plural(this.variables.length, "variable")}` : plural(found, "variable");
    this.box.setAttribute("aria-rowcount", this.lines.length + 1);
    this.render();
  }

  isFolded(node) {
    return !this.isFiltered && this.folded.has(node.path);
  }

  draw() {
    const height = this.height;
    this.rows.style.height = `${Math.max(this.lines.length, 2) * height}px`;
    const above = -this.rows.getBoundingClientRect().top;
    const first = Math.max(0, Math.min(this.lines.length - 1, Math.floor(above / height)) - 6);
    const last = Math.min(this.lines.length, first + Math.min(90, Math.ceil(innerHeight / height) + 12));
    const shown = [];
    for (let at = first; at < last; at += 1) shown.push(this.line(this.lines[at], at));
    if (!this.lines.length) shown.push(make("div", { role: "row" }, make("div", { role: "gridcell", class: "none", text: "No variable matches." })));
    this.rows.replaceChildren(...shown);
    const isThere = this.active >= first && this.active < last;
    if (isThere) this.box.setAttribute("aria-activedescendant", `line-${this.active}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  line(node, at) {
    const isGroup = this.isTree && node.below.size > 0;
    const variable = node.variable;
    const classes = ["line", isGroup ? "group" : "", at === this.active ? "active" : "", variable && variable === this.chosen ? "chosen" : ""];
    const row = make("div", { role: "row", id: `line-${at}`, class: classes.join(" ").trim(), "data-at": at, "aria-rowindex": at + 2 });
    if (this.isTree) row.setAttribute("aria-level", node.depth + 1);
    if (isGroup) row.setAttribute("aria-expanded", String(!this.isFolded(node)));
    if (variable) row.setAttribute("aria-selected", String(variable === this.chosen));
    row.style.transform = `translateY(${at * this.height}px)`;
    for (const column of this.columns) row.append(this.cell(column, node, isGroup));
    return row;
  }

  cell({ key, of, text, leaf, sum }, node, isGroup) {
    const variable = node.variable;
    const cell = make("div", { role: "gridcell", class: of && key !== "marks" ? `${key} number` : key });
    if (key === "name") {
      cell.classList.add("label");
      if (this.isTree) cell.style.paddingLeft = `${0.2 + Math.min(node.depth, 12) * 1.1}rem`;
      if (this.isTree) cell.append(make("span", { class: "twist", "aria-hidden": "true", text: isGroup ? (this.isFolded(node) ? "▶" : "▼") : "" }));
      const name = this.isTree ? node.label : variable.name;
      cell.append(make("span", { class: "text", text: name, title: variable ? variable.name : node.path }));
    } else if (key === "shape") {
      if (isGroup) cell.append(make("span", { class: "quiet", text: plural(node.variables, "variable") }));
      else cell.textContent = shapeText(variable.shape);
    } else if (key === "dtype") {
      if (!isGroup) cell.textContent = variable.dtype;
    } else if (key === "shown") {
      if (!isGroup && variable.bins) cell.append(spark(variable.bins));
    } else if (key === "marks") {
      const odd = isGroup ? [[node.odd, node.odd ? `${count(node.odd)} marked` : ""]] : marksOf(variable).filter((mark) => !isBad(mark)).map((mark) => [1, MARKS.get(mark)]);
      for (const [mark, number] of node.marks) if (isBad(mark)) cell.append(make("span", { class: "tag bad", text: isGroup && number > 1 ? `${mark} ${count(number)}` : mark }));
      const isBadGroup = isGroup && [...node.marks.keys()].some(isBad);
      for (const [number, said] of odd) if (number && !isBadGroup) cell.append(make("span", { class: "tag odd", text: said }));
      if (variable && variable.tied !== undefined) cell.append(make("span", { class: "tag quiet", text: "tied" }));
    } else if (!(isGroup && (leaf || (this.isLive && !sum)))) {
      const value = isGroup ? node.values[key] : of(variable);
      cell.textContent = value === null || value === undefined ? "" : text(value);
    }
    return cell;
  }

  click(event) {
    const row = event.target.closest("[data-at]");
    if (!row) return;
    this.active = Number(row.dataset.at);
    this.enter(event.target.closest(".twist"));
  }

  enter(onlyFold) {
    const node = this.lines[this.active];
    if (!node) return;
    if (node.variable && !onlyFold) this.choose(node.variable);
    else if (node.below.size && this.isTree) this.toggle(node);
    else this.render();
  }

  toggle(node, isFolded = !this.folded.has(node.path)) {
    if (isFolded) this.folded.add(node.path);
    else this.folded.delete(node.path);
    this.update();
  }

  choose(variable) {
    this.chosen = variable;
    this.render();
    this.open(variable);
  }

  // Draw what is newly known of a variable.
  refresh(variable) {
    const visit = (node) => {
      const parts = [...node.below.values()];
      const has = node.variable === variable || parts.map(visit).some(Boolean);
      if (has) measure(node, parts);
      return has;
    };
    visit(this.root);
    this.render();
  }

  // Show a variable in the tree, whatever is folded or filtered.
  reveal(variable) {
    const unfold = (node) => {
      const is = node.variable === variable || [...node.below.values()].some(unfold);
      if (is) this.folded.delete(node.path);
      return is;
    };
    unfold(this.root);
    this.update();
    this.active = Math.max(0, this.lines.findIndex((node) => node.variable === variable));
    this.choose(variable);
    this.render(true);
  }

  all(isFolded) {
    this.folded = new Set(isFolded ? this.groups().map((node) => node.path) : []);
    this.update();
  }

  key(event) {
    if (event.target.closest("button") || event.ctrlKey || event.metaKey || event.altKey) return;
    const node = this.lines[this.active];
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15, Home: -Infinity, End: Infinity };
    const isFolded = node && this.isFolded(node);
    if (event.key in moves) this.active = Math.min(this.lines.length - 1, Math.max(0, this.active + moves[event.key]));
    else if (event.key === "ArrowRight" && this.isTree && node?.below.size) {
      if (isFolded) this.toggle(node, false);
      else this.active += 1;
    } else if (event.key === "ArrowLeft" && this.isTree && node) {
      if (node.below.size && !this.isFiltered && !isFolded) this.toggle(node, true);
      else this.active = this.lines.findLastIndex((other, at) => at < this.active && other.depth < node.depth);
      this.active = Math.max(0, this.active);
    } else if (event.key === "Enter" || event.key === " ") this.enter();
    else return;
    event.preventDefault();
    this.render(true);
  }

  above() {
    const isSticky = getComputedStyle(byId("tools")).position === "sticky";
    return (isSticky ? byId("tools").offsetHeight : 0) + byId("head").offsetHeight;
  }

  seek() {
    this.rows.style.height = `${Math.max(this.lines.length, 2) * this.height}px`;
    const top = this.rows.getBoundingClientRect().top + this.active * this.height;
    const least = this.above() + 4;
    const most = innerHeight - this.height - 4;
    if (top < least) scrollBy(0, top - least);
    else if (top > most) scrollBy(0, top - most);
  }
}
