// The browser of trajectories: filters, a paged list, and coloured completions.

const PAGE = 100; // rows of the list
const SIGNED = new Set(["token_scores", "advantage", "difference"]);

class Browser {
  constructor(data, contents, tables) {
    this.data = data;
    this.contents = contents; // by run: of the first rows of its table
    this.tables = tables; // by run
    this.texts = tables.map(() => new Map()); // of completions that were searched
    this.form = document.getElementById("filters");
    this.cards = [];
    this.page = 0;
    const runs = this.form.elements.run;
    data.runs.forEach((run, index) =>
      runs.append(element("option", { value: index, text: run.name })));
    runs.parentElement.hidden = data.runs.length < 2;
    runs.addEventListener("change", () => this.setRun(Number(runs.value)));
    this.form.addEventListener("input", () => this.filter());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("reset", () => setTimeout(() => {
      this.only = null;
      this.setRun(0);
    }));
    const move = (id, by) => document.getElementById(id).addEventListener("click", () => {
      this.page += by;
      this.showList();
    });
    move("previous", -1);
    move("next", 1);
    this.quantity = document.getElementById("quantity");
    this.quantity.addEventListener("change", () => this.colour());
    const cards = document.getElementById("cards");
    cards.addEventListener("pointermove", (event) => this.showTip(event));
    cards.addEventListener("pointerleave", () => this.hideTip());
    this.setRun(0);
  }

  setRun(index) {
    this.run = index;
    const table = this.tables[index], run = this.data.runs[index];
    this.only = null;
    this.fillChoices("outcome", table.outcomes);
    this.fillChoices("by", table.verifiers);
    const counts = new Map();
    for (const reason of table.reason) counts.set(reason, (counts.get(reason) ?? 0) + 1);
    const common = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 30);
    document.getElementById("reasons").replaceChildren(...common.map(([reason]) =>
      element("option", { value: table.reasons[reason] })));
    const contained = this.contents[index].length;
    document.getElementById("extent").textContent = run.total === 0
      ? "No trajectories."
      : contained === run.total
        ? `All ${run.total} completions.`
        : `${run.total} completions in the files; ${run.listed} in this list, ${contained} ` +
          "with their text. The others were omitted to keep the page small: see --step " +
          "and --max-size of oreal report.";
    this.filter();
  }

  fillChoices(name, values) {
    const select = this.form.elements[name];
    while (select.options.length > 1) select.remove(1);
    select.append(...values.filter(Boolean).map((text) => element("option", { text })));
  }

  // Keeps the numbers of matching rows in `this.rows`, newest step first.
  async filter() {
    const ticket = (this.ticket = {});
    const { elements } = this.form, table = this.tables[this.run];
    const number = (name, otherwise) =>
      elements[name].value === "" ? otherwise : Number(elements[name].value);
    const outcome = table.outcomes.indexOf(elements.outcome.value);
    const by = table.verifiers.indexOf(elements.by.value);
    const search = elements.search.value.toLowerCase();
    const reason = elements.reason.value.toLowerCase();
    const contains = (text, part) => text.toLowerCase().includes(part);
    const questions = table.questions.map((text) => contains(text, search));
    const searched = table.reasons.map((text) => contains(text, search));
    const reasons = table.reasons.map((text) => contains(text, reason));
    if (search && elements.texts.checked) await this.readTexts();
    const texts = elements.texts.checked ? this.texts[this.run] : new Map();
    if (ticket !== this.ticket) return; // a later change of the filters
    const pairs = elements.kind.value === "pairs" ? new Set(this.pairs().flat()) : null;
    const rows = [];
    for (let row = 0; row < table.step.length; row++) {
      const step = table.step[row], tokens = table.tokens[row];
      if (outcome >= 0 && table.outcome[row] !== outcome) continue;
      if (by >= 0 && table.by[row] !== by) continue;
      if (!reasons[table.reason[row]]) continue;
      if (step < number("first", 0) || step > number("last", Infinity)) continue;
      if (tokens < number("shortest", 0) || tokens > number("longest", Infinity)) continue;
      if (elements.kind.value === "selected" && !table.selected[row]) continue;
      if (pairs && !pairs.has(row)) continue;
      if (this.only && this.groupName(row) !== this.only) continue;
      if (search && !questions[table.question[row]] && !searched[table.reason[row]] &&
          !texts.get(row)?.includes(search)) continue;
      rows.push(row);
    }
    const order = (row) => [-table.step[row], table.group[row], table.sample[row]];
    rows.sort((a, b) => {
      const [x, y] = [order(a), order(b)];
      return x[0] - y[0] || x[1] - y[1] || x[2] - y[2];
    });
    this.rows = rows;
    this.page = 0;
    this.showList();
  }

  async readTexts() {
    const texts = this.texts[this.run];
    for (let row = 0; row < this.contents[this.run].length; row++)
      if (!texts.has(row)) texts.set(row, (await this.read(row)).text.toLowerCase());
  }

  read(row) {
    return readContent(this.contents[this.run][row], this.tables[this.run].advantage[row]);
  }

  groupName(row) {
    const table = this.tables[this.run];
    return `${table.step[row]}/${table.group[row]}`;
  }

  isCorrect(row) {
    const table = this.tables[this.run];
    return table.outcomes[table.outcome[row]] === "correct";
  }

  // Returns the correct and the incorrect completion trained on of each prompt.
  pairs() {
    const table = this.tables[this.run], groups = new Map();
    for (let row = 0; row < table.step.length; row++) {
      if (!table.selected[row]) continue;
      const name = this.groupName(row);
      if (!groups.has(name)) groups.set(name, {});
      groups.get(name)[this.isCorrect(row)] ??= row;
    }
    return [...groups.values()].filter((group) => "true" in group && "false" in group)
      .map((group) => [group.true, group.false]);
  }

  showList() {
    const table = this.tables[this.run], pages = Math.ceil(this.rows.length / PAGE);
    this.page = Math.max(0, Math.min(this.page, pages - 1));
    const start = this.page * PAGE;
    document.getElementById("position").textContent = this.rows.length
      ? `${start + 1} to ${Math.min(start + PAGE, this.rows.length)} of ${this.rows.length}`
      : "no completion matches";
    const body = document.querySelector("#list tbody");
    body.replaceChildren(...this.rows.slice(start, start + PAGE).map((row) => {
      const outcome = table.outcomes[table.outcome[row]];
      const line = element("tr", { tabindex: 0, "data-row": row },
        element("td", { text: table.step[row] }),
        element("td", { text: outcome, class: outcome }),
        element("td", { text: table.tokens[row] }),
        element("td", { text: table.questions[table.question[row]].slice(0, 110) },
          element("small", { text: table.reasons[table.reason[row]].slice(0, 90) })));
      line.addEventListener("click", () => this.open(row));
      line.addEventListener("keydown", (event) => event.key === "Enter" && this.open(row));
      return line;
    }));
    this.markOpen();
  }

  markOpen() {
    const open = new Set(this.cards.map((card) => String(card.row)));
    for (const line of document.querySelectorAll("#list tbody tr"))
      line.classList.toggle("open", open.has(line.dataset.row));
  }

  // Shows a completion; one of a pair with the other one at its side.
  async open(row) {
    const ticket = (this.opening = {});
    const pair = this.pairs().find((pair) => pair.includes(row)) ?? [row];
    const cards = await Promise.all(pair.map((each) => this.makeCard(each)));
    if (ticket !== this.opening) return;
    this.cards = cards;
    document.getElementById("cards").replaceChildren(...cards.map((card) => card.node));
    const names = new Set(cards.flatMap((card) => Object.keys(card.content?.values ?? {})));
    const previous = this.quantity.value;
    this.quantity.replaceChildren(...this.data.quantities
      .filter((each) => names.has(each.name))
      .map((each) => element("option",
        { value: each.name, text: each.label, title: each.meaning })));
    if (names.has(previous)) this.quantity.value = previous;
    this.quantity.parentElement.hidden = !names.size;
    this.markOpen();
    this.colour();
  }

  async makeCard(row) {
    const table = this.tables[this.run];
    const content = row < this.contents[this.run].length ? await this.read(row) : null;
    const outcome = table.outcomes[table.outcome[row]];
    const facts = {
      question: content?.question || table.questions[table.question[row]],
      "gold answer": content?.gold ?? "not in this page",
      reason: `${content?.reason ?? table.reasons[table.reason[row]]} (by ${table.verifiers[table.by[row]]})`,
      tokens: `${table.tokens[row]}, ended by ${table.finishes[table.finish[row]] || "unknown"}`,
      advantage: brief(table.advantage[row]),
    };
    const list = element("dl");
    for (const [name, text] of Object.entries(facts))
      list.append(element("dt", { text: name }), element("dd", { text }));
    const text = element("div", { class: "text" });
    const spans = [];
    if (!content) {
      text.textContent = "The text of this completion was omitted to keep the page small.";
    } else if (!content.tokens.length) {
      text.textContent = content.text;
    } else {
      content.tokens.forEach((piece, index) => {
        const omitted = content.omitted.get(index);
        // Part of a character that a later token completes, or not part of the text.
        const node = element("span", { text: piece || omitted || "\u00b7" });
        if (!piece) node.className = "omitted";
        node.token = index;
        spans.push(node);
      });
      text.append(...spans);
    }
    const group = element("button", { type: "button", text: "all completions of this prompt" });
    group.addEventListener("click", () => {
      this.only = this.groupName(row);
      this.filter();
    });
    const node = element("div", { class: "card" },
      element("strong", { text: outcome, class: outcome }),
      ` step ${table.step[row]}, sample ${table.sample[row]}${table.selected[row] ? ", trained on" : ""} `,
      group, list);
    if (content?.exact === false)
      node.append(element("p", { class: "note",
        text: "Each token's text was decoded on its own." }));
    node.append(text);
    return { row, content, node, spans };
  }

  // Colours every token; completions at each other's side share the scale.
  colour() {
    const name = this.quantity.value;
    const sizes = this.cards
      .flatMap((card) => [...(card.content?.values[name] ?? [])])
      .map(Math.abs).sort((a, b) => a - b);
    // Above the largest two percent all are the same: outliers would hide the others.
    const full = sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes.at(-1) || 1;
    for (const { content, spans } of this.cards) {
      const values = content?.values[name];
      spans.forEach((node, index) => {
        const share = values ? Math.max(-1, Math.min(1, values[index] / full)) : 0;
        const colour = share < 0 ? "var(--minus)" : "var(--plus)";
        node.style.backgroundColor = `rgba(${colour}, ${(0.65 * Math.abs(share)).toFixed(3)})`;
      });
    }
    const legend = document.getElementById("legend");
    legend.replaceChildren();
    if (!sizes.length) return;
    const low = SIGNED.has(name) ? -full : 0;
    const from = low < 0 ? "rgba(var(--minus), 0.65), transparent" : "transparent";
    const meaning = this.data.quantities.find((each) => each.name === name).meaning;
    legend.append(brief(low),
      element("i", { style: `background: linear-gradient(90deg, ${from}, rgba(var(--plus), 0.65))` }),
      `${brief(full)}: ${meaning}`);
  }

  showTip(event) {
    const index = event.target.token;
    const card = this.cards.find((each) => each.node.contains(event.target));
    if (index === undefined || !card) return this.hideTip();
    const { content } = card, lines = [];
    const piece = content.tokens[index] || content.omitted.get(index) || "part of a character";
    lines.push(`token ${index} of ${content.tokens.length}: ${JSON.stringify(piece)}`);
    for (const { name, label } of this.data.quantities)
      if (content.values[name]) lines.push(`${label}: ${brief(content.values[name][index])}`);
    const tip = document.getElementById("tip");
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 18, innerHeight - tip.offsetHeight - 8)}px`;
  }

  hideTip() {
    document.getElementById("tip").hidden = true;
  }
}
