// The page as a whole: totals, what is known of the checkpoint, the run, the comparison, the theme and the keys.

const THEMES = ["auto", "light", "dark"];

class Page {
  constructor(data) {
    this.data = data;
    this.variables = data.variables;
    this.variables.forEach((variable, number) => {
      Object.assign(variable, { number, lower: variable.name.toLowerCase(), marks: variable.marks ?? [] });
    });
    document.title = `${data.title} – varstore`;
    byId("title").textContent = data.title;
    byId("place").textContent = [data.path, data.format].filter(Boolean).join(" · ");
    byId("made").textContent = data.made;
    this.totals();
    this.about();
    this.run();
    this.comparison();
    this.alarms();
    this.detail = new Detail(this, () => {
      this.tree.chosen = null;
      this.tree.render();
      byId("tree").focus({ preventScroll: true });
    });
    this.live = data.live ? new Live(this) : null;
    this.tree = new Tree(this.variables, {
      separator: data.separator,
      isCompared: Boolean(data.comparison),
      isLive: Boolean(data.live),
      open: (variable) => this.detail.show(variable),
    });
    this.tools();
    this.theme();
    addEventListener("keydown", (event) => this.key(event));
  }

  name(number) {
    return this.variables[number].name;
  }

  totals() {
    const sum = (of) => this.variables.reduce((total, variable) => total + (of(variable) ?? 0), 0);
    const params = sum((variable) => (variable.tied === undefined ? variable.count : 0));
    const bytes = sum((variable) => (variable.tied === undefined ? variable.nbytes : 0));
    const card = (name, figure, more) => make("div", { class: "card" }, make("p", { class: "name", text: name }), make("p", { class: "figure", text: figure }), make("p", { class: "more", text: more }));
    const tied = this.variables.filter((variable) => variable.tied !== undefined).length;
    byId("totals").replaceChildren(
      card("Variables", count(this.variables.length), tied ? `${count(tied)} tied to others` : ""),
      card("Parameters", amount(params), params >= 1000 ? count(params) : ""),
      card("Size", size(bytes), bytes >= 1000 ? `${count(bytes)} bytes` : ""),
      this.types(bytes),
    );
  }

  types(bytes) {
    const by = new Map();
    for (const variable of this.variables) if (variable.tied === undefined) by.set(variable.dtype, (by.get(variable.dtype) ?? 0) + variable.nbytes);
    const parts = [...by].sort((a, b) => b[1] - a[1]);
    if (parts.length > 6) parts.splice(5, Infinity, ["others", parts.slice(5).reduce((sum, [, part]) => sum + part, 0)]);
    const bar = make("div", { class: "types", "aria-hidden": "true" });
    const legend = make("ul", { class: "legend" });
    parts.forEach(([dtype, part], at) => {
      const stretch = make("span", { class: `tone-${at}` });
      stretch.style.flexGrow = String(part || 1);
      bar.append(stretch);
      legend.append(make("li", {}, make("span", { class: `swatch tone-${at}`, "aria-hidden": "true" }), `${dtype} ${share(part, bytes)}`));
    });
    return make("div", { class: "card wide" }, make("p", { class: "name", text: "Types, by size" }), bar, legend);
  }

  about() {
    const { attributes, files } = this.data;
    const parts = [];
    if (attributes) parts.push(make("details", {}, make("summary", { text: "Attributes" }), make("pre", { tabindex: 0, "aria-label": "Attributes", text: attributes })));
    if (files.length) {
      const text = files.map(([name, kind, nbytes]) => `${name}  ${kind}  ${size(nbytes)}`).join("\n");
      parts.push(make("details", {}, make("summary", { text: plural(files.length, "attached file") }), make("pre", { tabindex: 0, "aria-label": "Attached files", text })));
    }
    byId("about").replaceChildren(...parts);
    byId("about").hidden = !parts.length;
  }

  run() {
    const run = this.data.run;
    if (!run) return;
    byId("run").hidden = false;
    const steps = run.steps.map((step) => step.step);
    const charts = run.metrics.map(([name, values]) => curve(name, steps, values));
    if (run.looked.length) charts.push(curve("norm of all variables", run.looked, run.norms));
    charts.push(disk(steps, run.steps.map((step) => step.own), run.steps.map((step) => step.nbytes)));
    const row = (step) => make("tr", {}, make("td", { class: "number", text: count(step.step) }), make("td", { text: step.time }),
      make("td", { class: "number", text: size(step.nbytes) }), make("td", { class: "number", text: size(step.own) }), make("td", { text: step.marks }));
    const heads = [["Step", 1], ["Time", 0], ["Size", 1], ["New", 1], ["", 0]].map(([text, isNumber]) =>
      text ? make("th", { scope: "col", class: isNumber ? "number" : null, text }) : make("td"));
    const listed = run.steps.slice(-50).reverse();
    byId("run").append(
      make("p", { class: "quiet", text: run.said }),
      make("div", { class: "charts" }, ...charts),
      make("details", {}, make("summary", { text: listed.length < steps.length ? `The last ${listed.length} steps` : "Steps" }),
        make("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Steps" }, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...listed.map(row))))));
  }

  comparison() {
    const comparison = this.data.comparison;
    if (!comparison) return;
    const box = byId("comparison");
    box.hidden = false;
    box.append(make("p", { class: "quiet", text: comparison.said }));
    for (const [label, names] of comparison.lists) {
      if (names.length) box.append(make("details", {}, make("summary", { text: `${label}: ${count(names.length)}` }), make("pre", { tabindex: 0, "aria-label": label, text: names.join("\n") })));
    }
    const layers = comparison.layers.map(([name, part, first]) => ({ name, first, part: part === "inf" ? Infinity : part }));
    if (layers.length) box.append(...this.strip(layers));
  }

  strip(layers) {
    const finite = layers.map((layer) => layer.part).filter((part) => part > 0 && part < Infinity);
    const most = Math.max(...finite, 1e-300);
    const depth = Math.max(Math.log(most / Math.min(...finite, most)), Math.log(10));
    const part = (layer) => (layer.part > 0 ? Math.min(1, Math.max(0, 1 - Math.log(most / layer.part) / depth) * 0.92 + 0.08) : 0);
    const said = (layer) => (layer.part === Infinity ? "inf" : figure(layer.part, 3));
    const canvas = make("canvas", { class: "strip", role: "img", width: layers.length, height: 1 });
    canvas.setAttribute("aria-label", `${plural(layers.length, "layer")}, sorted by how much they moved: ${layers[0].name}, by ${said(layers[0])} of its norm, the most`);
    const paint = () => {
      const [middle, plus] = ["--middle", "--plus"].map(colour);
      const context = canvas.getContext("2d");
      layers.forEach((layer, at) => {
        context.fillStyle = `rgb(${mixed(middle, plus, part(layer))})`;
        context.fillRect(at, 0, 1, 1);
      });
    };
    paint();
    this.repaint = paint;
    const read = make("p", { class: "read" });
    const under = (event) => {
      const box = canvas.getBoundingClientRect();
      return layers[Math.min(layers.length - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * layers.length)))];
    };
    canvas.addEventListener("pointermove", (event) => (read.textContent = `${under(event).name}: ${said(under(event))}`));
    canvas.addEventListener("pointerleave", () => (read.textContent = ""));
    canvas.addEventListener("click", (event) => this.tree.reveal(this.variables[under(event).first]));
    const list = make("ol", { class: "movers", "aria-label": "The layers that moved most" }, ...layers.slice(0, 12).filter((layer) => layer.part > 0).map((layer) => {
      const meter = make("span", { class: "meter", "aria-hidden": "true" });
      meter.style.width = `${Math.min(100, (100 * layer.part) / most)}%`;
      return make("li", {}, make("button", { type: "button", on: { click: () => this.tree.reveal(this.variables[layer.first]) } },
        make("span", { class: "text", text: layer.name, title: layer.name }), meter, make("span", { class: "value", text: said(layer) })));
    }));
    const note = make("p", { class: "note", text: "A layer is the variables whose names begin alike, up to the first number. It moved by the norm of the difference, divided by the norm before. Colours are logarithmic." });
    return [canvas, read, list, note];
  }

  alarms() {
    const box = byId("alarms");
    const found = new Map([...MARKS.keys()].map((mark) => [mark, 0]));
    for (const variable of this.variables) for (const mark of variable.marks) found.set(mark, found.get(mark) + 1);
    const chips = [...found].filter(([, number]) => number).map(([mark, number]) =>
      make("button", { type: "button", class: isBad(mark) ? "bad" : "odd", "aria-pressed": "false", text: `${MARKS.get(mark)} ${count(number)}`, on: { click: (event) => {
        const wanted = this.tree.wanted;
        if (!wanted.delete(mark)) wanted.add(mark);
        event.currentTarget.setAttribute("aria-pressed", String(wanted.has(mark)));
        this.tree.update();
      } } }));
    box.replaceChildren(...chips);
    if (!chips.length) {
      box.removeAttribute("role");
      box.removeAttribute("aria-label");
      box.append(this.data.live ? make("p", { class: "quiet", text: "Open a variable to look at its values." }) : make("p", { class: "fine", text: "✓ no nan or inf" }));
    }
  }

  tools() {
    const search = byId("search");
    search.addEventListener("input", () => {
      this.tree.search = search.value.toLowerCase();
      this.tree.update();
    });
    search.addEventListener("keydown", (event) => {
      if (event.key === "Escape" || event.key === "Enter" || event.key === "ArrowDown") {
        if (event.key === "Escape") search.value = this.tree.search = "";
        this.tree.update();
        this.tree.render(true);
        byId("tree").focus({ preventScroll: true });
        event.preventDefault();
        event.stopPropagation();
      }
    });
    for (const [id, isTree] of [["as-tree", true], ["as-list", false]]) {
      byId(id).addEventListener("click", () => {
        this.tree.isTree = isTree;
        for (const [other, is] of [["as-tree", isTree], ["as-list", !isTree]]) byId(other).setAttribute("aria-pressed", String(is));
        for (const other of ["fold", "unfold"]) byId(other).disabled = !isTree;
        this.tree.update();
      });
    }
    byId("unfold").addEventListener("click", () => this.tree.all(false));
    byId("fold").addEventListener("click", () => this.tree.all(true));
    const place = () => document.documentElement.style.setProperty("--tools", `${byId("tools").offsetHeight - 1}px`);
    new ResizeObserver(place).observe(byId("tools"));
  }

  theme() {
    const button = byId("theme");
    let at = 0;
    const apply = () => {
      document.documentElement.dataset.theme = THEMES[at];
      button.textContent = `Theme: ${THEMES[at]}`;
      this.colours();
    };
    this.nextTheme = () => {
      at = (at + 1) % THEMES.length;
      apply();
    };
    button.addEventListener("click", this.nextTheme);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.colours());
    apply();
  }

  colours() {
    colours.clear();
    for (const paint of repaint) paint();
    this.repaint?.();
  }

  key(event) {
    const isTyping = event.target.closest?.("input, textarea, select");
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") byId("search").focus();
    else if (event.key === "Escape") this.detail.close();
    else if (event.key === "t" || event.key === "T") this.nextTheme();
    else if (event.key === "l" || event.key === "L") this.detail.toggleLog();
    else return;
    event.preventDefault();
  }
}

new Page(JSON.parse(byId("data").textContent));
