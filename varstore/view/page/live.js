// What a viewer adds: statistics when a variable is opened, and slices of its values as numbers.

class Live {
  constructor(page) {
    this.page = page;
  }

  async ask(what) {
    try {
      const answer = await fetch(what);
      const found = await answer.json();
      return answer.ok ? found : { failed: `The viewer refused: ${found.failed}.` };
    } catch {
      return { failed: "The viewer does not answer; it may have ended." };
    }
  }

  // Look at a variable, and ask again while it takes longer and is still shown.
  async look(variable) {
    if (variable.zeros !== undefined || variable.left) return;
    variable.failed = null;
    for (;;) {
      const { share, ...found } = await this.ask(`variable/${variable.number}`);
      Object.assign(variable, found);
      if (share === undefined) break;
      variable.share = share;
      if (this.page.detail.variable !== variable) return;
      this.page.detail.fill();
    }
    this.page.tree.refresh(variable);
  }

  waiting(variable) {
    return variable.share ? `Looking at the values: ${Math.floor(100 * variable.share)} %` : "Looking at the values …";
  }

  slices(variable) {
    const example = variable.shape.map((length) => (length > 8 ? "0:8" : ":")).join(", ");
    const input = make("input", { id: "slice", "aria-label": "Slice", value: variable.slice ?? example, autocomplete: "off", spellcheck: "false" });
    const shown = make("div", { role: "status" });
    const ask = async () => {
      variable.slice = input.value;
      const found = await this.ask(`values/${variable.number}?at=${encodeURIComponent(input.value)}`);
      if (found.failed) shown.replaceChildren(make("p", { class: "failed", text: found.failed }));
      else shown.replaceChildren(...this.grids(found));
    };
    const form = make("div", { class: "slice" }, input, make("button", { type: "button", text: "Show", on: { click: ask } }));
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") ask();
    });
    return [make("h3", { text: "Values" }), form, shown];
  }

  grids(found) {
    const { comparison, title } = this.page.data;
    const grid = ({ shape, values }, label) => make("pre", { tabindex: 0, "aria-label": label, text: gridText(shape, values) });
    if (!found.before) return [grid(found, "Values")];
    return [make("p", { class: "note", text: `${title}:` }), grid(found, `Values of ${title}`),
      make("p", { class: "note", text: `${comparison.title}:` }), grid(found.before, `Values of ${comparison.title}`)];
  }
}

// Numbers in lines of the last axis, with an empty line after each matrix.
function gridText(shape, values) {
  if (!values.length) return "no values";
  const texts = values.map((value) => figure(value, 5));
  const width = Math.max(...texts.map((text) => text.length));
  const columns = shape.at(-1) ?? 1;
  const rows = shape.at(-2) ?? 1;
  let text = "";
  texts.forEach((value, at) => {
    text += value.padStart(width);
    if ((at + 1) % columns) text += "  ";
    else text += (at + 1) % (columns * rows) ? "\n" : "\n\n";
  });
  return text.trimEnd();
}
