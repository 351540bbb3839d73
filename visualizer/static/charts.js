// The panel of charts: tabs, a caption with the numbers of the current step, and a button to enlarge it over the scene.
// The figures are built in Python with plotly and arrive once as JSON. Only their data changes here, at most four times
// a second, and only in the open tab.

import { GanttChart, LatencyChart, LineChart } from "./chart_kinds.js";
import { History } from "./history.js";
import { element, plural, setText } from "./names.js";
import { Waste } from "./waste.js";

const EVERY = 250; // milliseconds between two drawings of a chart, at least
const SHARE = 0.1; // of the browser's time for drawing: a chart that is slow to draw is drawn less often,
const SELDOM = 2000; // but at least once in this many milliseconds
const WIDE = 900; // pixels; a panel this wide has room for two elements side by side
const TABS = {
  memory: "Memory", waste: "Waste", throughput: "Throughput", latency: "Latency", sequences: "Sequences", prefix: "Prefix",
};
const time = (/** @type {number} */ ms) => (ms < 1000 ? `${ms.toFixed(ms < 100 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(2)} s`);
const whole = (/** @type {number} */ value) => Math.round(value).toLocaleString("en");

/** @typedef {import("./history.js").Point} Point */
/** @typedef {{ record: RunRecord, point: Point, state: State, history: History, position: number }} Moment */

// The caption of each tab, about the current step.
/** @type {{ [tab: string]: (about: Moment) => string }} */
const SAY = {
  memory({ record }) {
    const { logical, used, reserved } = record.metrics;
    const share = reserved ? ` (${Math.round((100 * used) / reserved)} %)` : "";
    const process = record.rss === undefined ? "" : ` · process: ${record.rss} MiB`;
    return `${plural(reserved, "slot")} reserved, ${used} filled${share}, for ${plural(logical, "token")}${process}`;
  },
  throughput({ point }) {
    if (point.ms === null) return "nothing computed yet";
    const batch = `${point.decode} decode + ${point.prefill} prefill`;
    return `${batch} tokens in ${point.ms.toFixed(1)} ms · ${point.rate === null ? "–" : whole(point.rate)} tokens/s`;
  },
  latency({ point, history, position }) {
    const { count, ms } = history.latency.median(position);
    if (!count || ms === null) return "no token has come yet";
    const gaps = point.p50 === null || point.p95 === null || point.p99 === null ? ""
      : ` · next: ${time(point.p50)} (p50), ${time(point.p95)} (p95), ${time(point.p99)} (p99)`;
    return `first token: ${time(ms)} (median of ${count})${gaps}`;
  },
  sequences({ state }) {
    const count = (/** @type {"running" | "waiting" | "swapped"} */ name) =>
      state[name].flatMap((id) => state.requests[id]).filter((id) => !state.seqs[id].finish_reason);
    const swapped = count("swapped").length;
    return `${count("running").length} running · ${count("waiting").length} waiting` +
      (swapped ? ` · ${swapped} swapped` : "") + " — pale: waiting, hatched: prefill, framed: preempted";
  },
  prefix({ point, state }) {
    if (!state.config.enable_prefix_caching) return "the prefix cache is switched off";
    const rate = point.known ? `${((100 * point.hit) / point.known).toFixed(1)} %` : "none";
    return `${point.hit} of ${point.known} tokens found (${rate}) · ${plural(point.cached, "block")} cached, ${point.evicted} evicted`;
  },
};

export class Charts {
  /** @type {HTMLElement} */
  caption;
  /** @type {HTMLElement} */
  enlarge;
  /** @type {{ [name: string]: HTMLElement }} */
  tabs = {};
  /** @type {{ [name: string]: Waste | LatencyChart | GanttChart | LineChart }} */
  views = {};
  /** @type {string} */
  shown; // the open tab
  /** @type {Waste} */
  waste; // its view
  /** @type {string | null} */
  said = null; // which moment the caption is about

  /** @param {HTMLElement} root @param {{ [name: string]: Figure }} figures @param {string | null} plotlyUrl */
  constructor(root, figures, plotlyUrl) {
    this.box = root.querySelector("[data-part=charts]");
    this.history = new History();
    this.nextAt = 0;
    this.build(figures);
    this.show("memory");
    new ResizeObserver(() => this.resize()).observe(this.box);
    new MutationObserver(() => this.repaint()).observe(document.body, { attributes: true, attributeFilter: ["class"] });
    if (!plotlyUrl || window.Plotly) return; // not unpacked in an exported page, or already loaded
    // 4.8 MB, loaded last: the rest of the page works before the charts do.
    const script = document.createElement("script");
    script.src = plotlyUrl;
    script.onload = () => (this.nextAt = 0);
    // Plotly measures each text once and remembers: not before the fonts are here.
    const fonts = [...document.fonts].map((face) => face.load());
    Promise.allSettled(fonts).then(() => document.head.append(script));
  }

  /** @param {{ [name: string]: Figure }} figures */
  build(figures) {
    const head = element("div", "mp-charts-head", this.box);
    const list = element("div", "mp-tabs", head, { role: "tablist", "aria-label": "Charts" });
    this.caption = element("output", "mp-chart-now", head, { "data-testid": "chart-now", "aria-live": "off" });
    this.enlarge = element("button", "mp-enlarge", head, { type: "button", "data-testid": "enlarge" });
    this.enlarge.addEventListener("click", () => this.setBig(!this.big));
    for (const [name, title] of Object.entries(TABS)) {
      const ids = { id: `mp-tab-${name}`, "aria-controls": `mp-chart-${name}` };
      const tab = element("button", "mp-tab", list, { type: "button", role: "tab", "data-testid": `tab-${name}`, ...ids });
      tab.textContent = title;
      tab.addEventListener("click", () => this.show(name));
      this.tabs[name] = tab;
      const panel = element("div", `mp-chart mp-chart-${name}`, this.box, {
        id: ids["aria-controls"], role: "tabpanel", "aria-labelledby": ids.id, "data-chart": name,
        "data-testid": name === "memory" ? "chart" : `chart-${name}`,
      });
      this.views[name] = this.viewOf(name, panel, figures[name]);
    }
    this.waste = /** @type {Waste} */ (this.views.waste);
    this.enlarge.before(this.waste.toggle);
    list.addEventListener("keydown", (event) => this.key(event));
    const escape = (/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "Escape" || !this.big || !this.box.isConnected) return;
      event.stopPropagation(); // otherwise it would also clear the selection
      this.setBig(false);
    };
    document.addEventListener("keydown", escape, { capture: true });
    this.setBig(false);
  }

  /** @param {string} name @param {HTMLElement} panel @param {Figure} figure */
  viewOf(name, panel, figure) {
    if (name === "waste") return new Waste(panel, figure);
    if (name === "latency") return new LatencyChart(panel, figure, this.history);
    if (name === "sequences") return new GanttChart(panel, figure, this.history);
    return new LineChart(panel, figure, POINTS[name], this.history);
  }

  get view() {
    return this.views[this.shown];
  }

  resize() {
    this.box.classList.toggle("mp-wide", this.box.clientWidth >= WIDE);
    this.nextAt = 0;
    this.view.resize();
  }

  /** @param {string} name */
  show(name) {
    this.shown = name;
    for (const [other, tab] of Object.entries(this.tabs)) {
      tab.setAttribute("aria-selected", String(other === name));
      tab.tabIndex = other === name ? 0 : -1;
      this.views[other].node.hidden = other !== name;
    }
    const { offsetLeft, parentElement: strip } = this.tabs[name]; // on a phone, the tabs are a scrolling strip
    if (strip) strip.scrollLeft = offsetLeft - strip.offsetLeft - 40;
    this.waste.toggle.hidden = name !== "waste";
    this.nextAt = 0;
    this.said = null;
    this.view.resize();
  }

  // Standard keyboard navigation of tabs. The timeline must not receive these arrow keys, too.
  /** @param {KeyboardEvent} event */
  key(event) {
    const names = Object.keys(TABS);
    const at = names.indexOf(this.shown);
    const keys = new Map([["ArrowRight", at + 1], ["ArrowLeft", at - 1], ["Home", 0], ["End", names.length - 1]]);
    const to = keys.get(event.key);
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const name = names[(to + names.length) % names.length];
    this.show(name);
    this.tabs[name].focus();
  }

  /** @param {boolean} big */
  setBig(big) {
    this.big = big;
    this.box.classList.toggle("mp-big", big);
    this.box.parentElement.toggleAttribute("data-big", big);
    const words = big ? "Make the charts small again (Esc)" : "Enlarge the charts over the scene";
    this.enlarge.textContent = big ? "✕" : "↙↗";
    this.enlarge.title = words;
    this.enlarge.setAttribute("aria-label", words);
    this.enlarge.setAttribute("aria-expanded", String(big));
  }

  repaint() {
    for (const view of Object.values(this.views)) view.unpainted = true;
    this.nextAt = 0;
  }

  /** @param {Player} player @param {number} now */
  render(player, now) {
    if (!player.state.config.num_blocks) return;
    this.say(player);
    if (now < this.nextAt || !(window.Plotly || this.shown === "waste")) return; // the waste tab's bars need no plotly
    if (this.shown !== "memory" && this.shown !== "waste") this.history.follow(player);
    const began = performance.now();
    this.view.render(player);
    const ended = performance.now();
    this.nextAt = ended + Math.min(SELDOM, Math.max(EVERY, (ended - began) / SHARE));
  }

  /** @param {Player} player */
  say(player) {
    const key = `${player.run} ${player.position}`;
    if (this.said === key) return;
    this.said = key;
    if (SAY[this.shown]) this.history.follow(player);
    const record = player.current;
    const { state, position } = player;
    const words = record && SAY[this.shown]?.({ record, state, position, point: this.history.at(position), history: this.history });
    setText(this.caption, words ?? "");
  }
}

// The values of a figure's traces at a record, in the traces' order.
/** @type {{ [tab: string]: (record: RunRecord, point: Point) => (number | null | undefined)[] }} */
const POINTS = {
  memory: ({ metrics, rss }) => [metrics.reserved, metrics.used, metrics.logical, rss],
  throughput: (record, point) => [point.decode, point.prefill, point.ms, point.rate],
  prefix: (record, point) => [point.known ? (100 * point.hit) / point.known : null, point.cached, point.evicted],
};
