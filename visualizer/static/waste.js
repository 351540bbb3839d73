// The waste chart: the slots that other memory managers would hold for the same sequences, as a table of bars for the
// current step, one plain sentence, and lines over time. accounts.js computes the data, from when the tab is opened.

import { Accounts, PAGE_TOKENS } from "./accounts.js";
import { PlotlyChart, windowOf } from "./chart_kinds.js";
import { element, setText } from "./names.js";

const SCALE = 2.5; // a bar's largest length in pools; longer bars are cut off, to keep the others readable
const CLASSES = ["token", "reserved", "internal", "external"];
/** @type {{ [kind: string]: string }} */
const WORDS = {
  token: "holds a token", reserved: "kept for tokens to come", internal: "will never be used", external: "lost to rounding",
};
/** @type {{ [name: string]: string[] }} */
const MANAGERS = {
  "orca-max": ["FT, Orca Max", "Sets aside the longest possible text for each, as FasterTransformer (FT) does"],
  "orca-pow2": ["Orca Pow2", "Sets aside the prompt and the output's length rounded up to a power of two"],
  "orca-oracle": ["Orca Oracle", "Knows how long each text will be, and sets aside exactly that"],
  vattention: ["vAttention", `Maps pages of the GPU's own memory as a text grows; here ${PAGE_TOKENS} tokens a page`],
  paged: ["paged", "Hands out blocks on demand, and shares them where texts begin alike"],
};
const NAMES = Object.keys(MANAGERS); // in the order of accounts.js

export class Waste extends PlotlyChart {
  /** @type {HTMLElement} */
  sentence;
  /** @type {HTMLElement} */
  table;
  /** @type {HTMLElement} */
  toggle;
  /** @type {ReturnType<Waste["buildBar"]>[]} */
  bars;
  /** @type {string | null} */
  drawn = null; // names the lines over time that are drawn
  told = ""; // names the step that the bars show

  /** @param {HTMLElement} panel @param {Figure} figure */
  constructor(panel, figure) {
    super(panel, figure, element("div", "mp-waste-line", null, { "data-testid": "waste-line" }));
    this.accounts = new Accounts();
    this.build(panel);
  }

  /** @param {HTMLElement} panel */
  build(panel) {
    this.sentence = element("p", "mp-waste-say", panel, { "data-testid": "waste-say" });
    const body = element("div", "mp-waste-body", panel);
    this.table = element("div", "mp-waste-bars", body, {
      role: "table", "data-testid": "waste-bars",
      "aria-label": "Slots that each memory manager would hold for the texts that are running",
    });
    this.bars = NAMES.map((name) => this.buildBar(name));
    body.append(this.plot);
    this.legend = element("p", "mp-waste-legend", panel);
    for (const name of CLASSES) {
      const item = element("span", "", this.legend, { title: WORDS[name] });
      element("i", `mp-w-${name}`, item);
      item.append(name);
    }
    const note = element("span", "mp-waste-note", this.legend);
    note.textContent = "Running texts count at their limit; once one ends, its past is corrected.";
    this.toggle = element("button", "mp-waste-toggle", null, { // charts.js inserts it into the panel
      type: "button", "aria-pressed": "false", "data-testid": "waste-toggle",
    });
    this.toggle.textContent = "over time";
    this.toggle.addEventListener("click", () => {
      const over = panel.classList.toggle("mp-over-time");
      this.toggle.setAttribute("aria-pressed", String(over));
      this.drawn = null;
      this.resize();
    });
  }

  /** @param {string} name */
  buildBar(name) {
    const [title, meaning] = MANAGERS[name];
    const row = element("div", "mp-w-row", this.table, { role: "row", "data-manager": name });
    const head = element("span", "mp-w-name", row, { role: "rowheader" });
    head.textContent = title;
    const track = element("div", "mp-w-track", row, { role: "cell" });
    const parts = CLASSES.map((kind) => element("i", `mp-w-${kind}`, track));
    const words = element("span", "mp-w-words", row, { role: "cell" });
    const fit = element("span", "mp-w-fit", row, { role: "cell" });
    return { row, track, parts, words, fit, meaning };
  }

  /** @param {Player} player */
  render(player) {
    this.accounts.follow(player);
    const row = this.accounts.at(player.position - 1);
    const key = `${player.run} ${row?.[0]} ${this.accounts.revision}`;
    if (key !== this.told) this.tell(player, row);
    this.told = key;
    if (this.plot.clientWidth && window.Plotly) this.drawLine(player);
  }

  // --- now ---

  /** @param {Player} player @param {number[] | undefined} row */
  tell(player, row) {
    const { num_blocks, block_size } = player.state.config;
    const slots = num_blocks * block_size;
    this.table.dataset.number = String(row?.[0] ?? "");
    const held = NAMES.map((_, i) => (row ? row.slice(3 + 5 * i, 7 + 5 * i) : [0, 0, 0, 0]));
    const totals = held.map((parts) => parts.reduce((a, b) => a + b));
    const scale = Math.max(slots, Math.min(SCALE * slots, Math.max(...totals)));
    this.table.style.setProperty("--pool", `${(100 * slots) / scale}%`);
    const { memory } = player.state.config;
    this.bars.forEach((bar, i) => {
      const seen = NAMES[i] === (memory === "vattention" ? "paged" : memory); // its page-groups are blocks of the pool
      bar.row.classList.toggle("mp-w-seen", seen);
      bar.row.title = seen ? `${bar.meaning}. This is what you see above, by ${memory}` : bar.meaning;
      bar.parts.forEach((part, kind) => (part.style.width = `${(100 * held[i][kind]) / scale}%`));
      const detail = CLASSES.map((kind, k) => `${held[i][k]} ${kind}`).join(", ");
      bar.track.setAttribute("aria-label", detail);
      bar.track.title = `${detail}: ${Math.round((100 * totals[i]) / slots)} % of the pool's ${slots} slots`;
      bar.track.classList.toggle("mp-beyond", totals[i] > scale);
      setText(bar.words, row?.[2] ? `holds ${totals[i]} slots for ${held[i][0]} tokens` : "");
      setText(bar.fit, row?.[2] ? `${row[7 + 5 * i]} of ${row[2]} fit` : "");
      bar.fit.title = "How many of the running texts a pool of this size could serve at once, first come, first served";
    });
    setText(this.sentence, row ? sentence(row, totals, memory) : "Nothing has happened yet, so nobody holds anything.");
  }

  // --- over time ---

  /** @param {Player} player */
  drawLine(player) {
    const { first, end } = windowOf(player);
    const key = `${player.run} ${this.accounts.revision} ${first} ${end}`;
    this.begin();
    let data = null;
    if (key !== this.drawn) {
      const rows = this.accounts.rows.slice(first - this.accounts.first, end - this.accounts.first);
      /** @type {number[]} */
      const traces = Object.keys(this.figure.data).map(Number);
      const x = rows.map((row) => row[1]);
      const total = (/** @type {number[]} */ row, /** @type {number} */ i) => row[3 + 5 * i] + row[4 + 5 * i] + row[5 + 5 * i] + row[6 + 5 * i];
      const y = traces.map((i) => rows.map((row) => (i < NAMES.length ? total(row, i) : row[3 + 5 * (NAMES.length - 1)])));
      data = { x: traces.map(() => x), y };
      this.drawn = key;
    }
    this.update(data, this.decorations(player, player.state.step));
  }
}

// The sentence about Orca Max, which wastes the most. `row` and `totals` as in `tell`.
/** @param {number[]} row @param {number[]} totals @param {string} memory */
function sentence(row, totals, memory) {
  const [, , running] = row;
  const paged = totals.at(-1);
  if (!paged) return "Nothing is running, so nobody holds anything; rewind to compare.";
  const times = (totals[0] / paged).toFixed(1);
  const texts = running === 1 ? "this text" : "these texts";
  const fits = row[7] >= running
    ? running === 1 ? "it would fit" : `all ${running} would still fit`
    : `${row[7]} of these ${running} would fit`;
  return `For ${texts} Orca Max ${memory === "orca-max" ? "holds" : "would hold"} ${times}× what paging ${memory.startsWith("orca-") ? "would" : "holds"}: ${fits}.`;
}
