// One variable: facts, statistics, pictures, and in a viewer its values.

class Detail {
  constructor(page, closed) {
    this.page = page;
    this.box = byId("detail");
    this.closed = closed;
    this.isLog = false;
    this.kind = "means";
    this.variable = null;
    this.box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.close();
    });
  }

  get isSheet() {
    return getComputedStyle(this.box).position === "fixed";
  }

  async show(variable) {
    this.variable = variable;
    const isNew = this.box.hidden;
    this.box.hidden = false;
    this.fill();
    requestAnimationFrame(() => (this.box.scrollTop = 0));
    if (isNew && this.isSheet) this.box.querySelector("button").focus();
    if (this.page.live) await this.page.live.look(variable);
    if (this.page.live && this.variable === variable) this.fill();
  }

  close() {
    if (this.box.hidden) return;
    this.box.hidden = true;
    this.variable = null;
    this.closed();
  }

  toggleLog() {
    this.isLog = !this.isLog;
    if (this.variable) this.fill();
  }

  fill() {
    const variable = this.variable;
    repaint.clear();
    const parts = [this.title(variable)];
    if (variable.left) parts.push(make("p", { class: "note", text: `Not looked at: ${variable.left}` }));
    if (variable.failed) parts.push(make("p", { class: "failed", role: "alert", text: variable.failed }));
    if (variable.zeros !== undefined) parts.push(this.numbers(variable));
    else if (this.page.live && !variable.left && !variable.failed) parts.push(make("p", { class: "note", role: "status", text: this.page.live.waiting(variable) }));
    if (variable.bins) parts.push(...this.histogram(variable));
    if (variable.map) parts.push(...this.heat(variable));
    if (variable.norms?.some(Number.isFinite)) parts.push(make("h3", { text: "Norm over steps" }), curve("norm", this.page.data.run.looked, variable.norms));
    if (this.page.live) parts.push(...this.page.live.slices(variable));
    if (variable.attributes) parts.push(make("h3", { text: "Attributes" }), make("pre", { tabindex: 0, "aria-label": "Attributes", text: variable.attributes }));
    this.box.replaceChildren(...parts);
  }

  title(variable) {
    const facts = [variable.dtype, shapeText(variable.shape), plural(variable.count, "value"), size(variable.nbytes)].join(" · ");
    const box = make("div", { class: "tags" }, ...marksOf(variable).map((mark) => make("span", { class: `tag ${isBad(mark) ? "bad" : "odd"}`, text: this.said(variable, mark) })));
    if (variable.tied !== undefined) box.append(make("span", { class: "tag quiet", text: `tied to ${this.page.name(variable.tied)}` }));
    const close = make("button", { type: "button", class: "plain", text: "Close", on: { click: () => this.close() } });
    return make("div", {}, make("div", { class: "title" }, make("h2", { text: variable.name }), close), make("p", { class: "facts", text: facts }), box);
  }

  said(variable, mark) {
    if (mark === "nan" || mark === "inf") return `${count(variable[mark])} ${mark}`;
    if (mark === "dead") return plural(variable.dead, "dead row");
    if (mark === "duplicate") return `the same as ${this.page.name(variable.same)}`;
    return MARKS.get(mark);
  }

  numbers(variable) {
    const list = make("dl", { class: "numbers" });
    const add = (label, value, bad) => list.append(make("div", {}, make("dt", { text: label }), make("dd", { text: value, class: bad ? "bad" : null })));
    for (const label of ["min", "max", "mean", "std", "norm"]) add(label, figure(variable[label], 6));
    add("zeros", variable.zeros ? `${count(variable.zeros)} (${share(variable.zeros, variable.count)})` : "0");
    for (const label of ["nan", "inf"]) if (variable[label]) add(label, count(variable[label]), true);
    for (const [label, value] of variable.change ?? []) add(label, figure(value, 5));
    return list;
  }

  histogram(variable) {
    const other = variable.before;
    const log = make("button", { type: "button", id: "log", text: "Log scale", "aria-pressed": String(this.isLog), on: { click: () => {
      this.toggleLog();
      byId("log").focus();
    } } });
    const head = make("div", { class: "picture-head" }, make("h3", { text: "Histogram" }), log);
    const found = [head, ...histogram(variable.bins, other, this.isLog)];
    if (variable.dtype.startsWith("complex")) found.push(make("p", { class: "note", text: "Complex values count by their magnitude." }));
    if (other) found.push(make("p", { class: "note", text: `The line is that of ${this.page.data.comparison.title}.` }));
    return found;
  }

  heat(variable) {
    const kinds = [["means", "Means"], ["magnitudes", "Magnitudes"]];
    const choice = make("div", { class: "switch", role: "group", "aria-label": "What the heat map shows" }, ...kinds.map(([kind, text]) =>
      make("button", { type: "button", id: `heat-${kind}`, text, "aria-pressed": String(kind === this.kind), on: { click: () => {
        this.kind = kind;
        this.fill();
        byId(`heat-${kind}`).focus();
      } } })));
    return [make("div", { class: "picture-head" }, make("h3", { text: "Heat map" }), choice), ...heatMap(variable.map, this.kind)];
  }
}
