// Draws an experiment's result: the paper's figure with plotly, and a table of the paper's numbers beside ours.

import { colours } from "./chart_kinds.js";
import { element } from "./names.js";

const CONFIG = { displayModeBar: false, responsive: false };
const WAIT = 200; // milliseconds between checks whether plotly, the last script, has loaded

export class PaperFigure {
  /** @param {any} node */
  constructor(node) {
    this.node = node; // plotly puts its data and layout on it
    /** @type {Figure | null} */
    this.figure = null;
    new MutationObserver(() => this.paint()).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  }

  /** @param {Figure} figure */
  show(figure) {
    if (figure === this.figure) return;
    this.figure = figure;
    this.draw();
  }

  draw() {
    clearTimeout(this.timer);
    if (!this.figure) return;
    if (!window.Plotly || !this.node.clientWidth) {
      this.timer = setTimeout(() => this.draw(), WAIT);
      return;
    }
    const { data, layout } = structuredClone(this.figure);
    window.Plotly.react(this.node, data, ours(layout, getComputedStyle(this.node).fontFamily), CONFIG);
    this.paint();
  }

  // Applies the colours of light or dark mode.
  paint() {
    if (this.figure && this.node.layout && this.node.isConnected) window.Plotly.relayout(this.node, colours(this.node));
  }

  resize() {
    if (this.node.layout && this.node.clientWidth) window.Plotly.Plots.resize(this.node);
  }
}

// The layout in this page's style, without its title (shown above the plot) and its template (only plotly.py has it).
/** @param {any} layout @param {string} family */
function ours({ title, template, ...layout }, family) {
  const axis = { zeroline: false, automargin: true, fixedrange: true };
  return {
    ...layout,
    xaxis: { ...layout.xaxis, ...axis, showgrid: layout.xaxis?.type === "log" || !layout.barmode },
    yaxis: { ...layout.yaxis, ...axis, nticks: 6 },
    font: { family, size: 12 },
    hoverlabel: { font: { family } },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 44, r: 10, t: 30, b: 34 },
    legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom" },
    bargap: 0.25,
    autosize: true,
  };
}

// Fills a table with rows {what, paper, ours, why}. Adjacent rows with the same `why` share one cell.
/** @param {HTMLElement} node @param {any[]} rows */
export function table(node, rows) {
  node.replaceChildren();
  const head = element("tr", "", element("thead", "", node));
  const compared = rows.some((row) => row.why || row.paper !== "–");
  const columns = compared ? ["", "paper", "here", "why they differ"] : ["", "here"];
  for (const words of columns) element("th", "", head, { scope: "col" }).textContent = words;
  const body = element("tbody", "", node);
  rows.forEach(({ what, paper, ours: number, why }, i) => {
    const row = element("tr", "", body);
    element("th", "", row, { scope: "row" }).textContent = what;
    if (compared) element("td", "mp-exp-paper", row).textContent = paper;
    element("td", "mp-exp-ours", row).textContent = number;
    if (!compared || (i && rows[i - 1].why === why)) return;
    row.className = i ? "mp-exp-group" : "";
    let span = 1;
    while (rows[i + span]?.why === why) span += 1;
    element("td", "mp-exp-why", row, { rowspan: span }).textContent = why;
  });
}
