// The kinds of plotly charts: lines over the steps, latency, and the Gantt chart of the sequences. Each knows which
// part of the history to show, and marks the step that the page shows when the view is not live.

import { colour, letter, plural } from "./names.js";

export const WINDOW = 400; // records shown
const CONFIG = { displayModeBar: false, responsive: false };
const MOST_ROWS = 40; // in the Gantt chart

// The range of records to show. When following live or replaying, it ends at the current position; a frozen view also
// shows the known records after it.
/** @param {Player} player */
export function windowOf(player) {
  const ahead = player.mode === "frozen" ? WINDOW / 4 : 0;
  const end = Math.min(player.end, Math.max(player.position + ahead, ahead && player.first + WINDOW));
  return { first: Math.max(player.first, end - WINDOW), end };
}

export class PlotlyChart {
  // `node` is the tab's panel; `plot` is the element in it that the plot fills.
  /** @param {HTMLElement} node @param {Figure} figure */
  constructor(node, figure, plot = node) {
    this.node = node;
    this.plot = plot;
    this.figure = figure;
    this.unpainted = true;
    this.marked = "";
  }

  // Creates the plot at the first call. Plotly must be loaded.
  begin() {
    if (this.begun) return;
    this.begun = true;
    window.Plotly.newPlot(this.plot, this.figure.data, this.figure.layout, CONFIG);
  }

  resize() {
    if (this.begun && this.plot.clientWidth) window.Plotly.Plots.resize(this.plot);
  }

  // The layout changes since the last call: colours, the line at the pool's size, the line at the current step.
  /** @param {Player} player @param {number} step */
  decorations(player, step) {
    const { num_blocks, block_size } = player.state.config;
    const slots = num_blocks * block_size;
    const moment = player.mode === "live" ? null : step;
    const key = `${slots} ${moment}`;
    if (!this.unpainted && key === this.marked) return {};
    const changes = this.unpainted ? colours(this.plot) : {};
    const { shapes = [], annotations = [] } = this.figure.layout;
    shapes.forEach((/** @type {any} */ { name }, /** @type {number} */ i) => {
      if (name === "pool") Object.assign(changes, { [`shapes[${i}].y0`]: slots, [`shapes[${i}].y1`]: slots });
      if (name === "moment") {
        Object.assign(changes, {
          [`shapes[${i}].visible`]: moment !== null, [`shapes[${i}].x0`]: moment ?? 0, [`shapes[${i}].x1`]: moment ?? 0,
        });
      }
    });
    annotations.forEach((/** @type {any} */ { name }, /** @type {number} */ i) => {
      if (name !== "pool") return;
      Object.assign(changes, { [`annotations[${i}].y`]: slots, [`annotations[${i}].text`]: `the pool: ${slots} slots` });
    });
    this.marked = key;
    this.unpainted = false;
    return changes;
  }

  // Updates data (null: unchanged) and layout in one call, since plotly recomputes the whole chart on every call.
  /** @param {any} data @param {any} layout */
  update(data, layout) {
    if (data) window.Plotly.update(this.plot, data, layout);
    else if (Object.keys(layout).length) window.Plotly.relayout(this.plot, layout);
  }
}

// Lines over the steps. `values(record, point)` returns each trace's value at a record.
export class LineChart extends PlotlyChart {
  /**
   * @param {HTMLElement} node
   * @param {Figure} figure
   * @param {(record: RunRecord, point: import("./history.js").Point) => (number | null | undefined)[]} values
   * @param {StepHistory} history
   */
  constructor(node, figure, values, history) {
    super(node, figure);
    this.values = values;
    this.history = history;
    /** @type {{ records?: RunRecord[], first: number, end: number }} */
    this.drawn = { first: -1, end: -1 };
  }

  /** @param {Player} player */
  render(player) {
    this.begin();
    const data = this.data(player, windowOf(player));
    /** @type {{ [change: string]: any }} */
    const layout = this.decorations(player, player.state.step);
    if (data && this.figure.layout.yaxis2) layout["yaxis2.showticklabels"] = data.showlegend.at(-1);
    this.update(data, layout);
  }

  /** @param {Player} player @param {{ first: number, end: number }} shown */
  data(player, { first, end }) {
    const { drawn } = this;
    if (drawn.records === player.records && drawn.first === first && drawn.end === end) return null;
    this.drawn = { records: player.records, first, end };
    const records = player.records.slice(first - player.first, end - player.first);
    const rows = records.map((record, i) => this.values(record, this.history.points[first + i - this.history.first]));
    /** @type {number[]} */
    const traces = Object.keys(this.figure.data).map(Number);
    const steps = records.map((record) => record.metrics.step);
    // A recording tells nothing of the process' memory: the trace is empty, and neither its name nor its axis has a text.
    const showlegend = traces.map((i) => !rows.length || rows.some((row) => row[i] !== undefined));
    return { x: traces.map(() => steps), y: traces.map((i) => rows.map((row) => row[i] ?? null)), showlegend };
  }
}

// A dot for each request's time to first token (TTFT), and the percentiles of the inter-token latency (ITL).
export class LatencyChart extends PlotlyChart {
  /** @param {HTMLElement} node @param {Figure} figure @param {StepHistory} history */
  constructor(node, figure, history) {
    super(node, figure);
    this.history = history;
  }

  /** @param {Player} player */
  render(player) {
    this.begin();
    const { first, end } = windowOf(player);
    const key = `${player.run} ${first} ${end}`;
    const [data, layout] = key !== this.drawn && end > first ? this.data(first, end) : [null, {}];
    this.drawn = key;
    this.update(data, { ...layout, ...this.decorations(player, player.state.step) });
  }

  /** @param {number} first @param {number} end */
  data(first, end) {
    const { history } = this;
    const dots = history.latency.firsts.filter(({ number }) => number >= first && number < end);
    const points = history.points.slice(first - history.first, end - history.first).filter(({ p50 }) => p50 !== null);
    const steps = points.map(({ step }) => step);
    const [from, to] = [history.at(first + 1).step, history.at(end).step];
    const range = [from - 1 - (to - from) / 40, to + 1]; // the same for both charts, with room for a letter at the left
    const others = [undefined, undefined, undefined];
    return [{
      x: [dots.map(({ step }) => step), steps, steps, steps],
      y: [dots.map(({ ms }) => ms), ...SHARES.map((name) => points.map((point) => point[name]))],
      text: [dots.map(({ seq }) => letter(seq)), ...others],
      "marker.color": [dots.map(({ seq }) => colour(seq)), ...others],
    }, { "xaxis.range": range, "xaxis2.range": range }];
  }
}

const SHARES = /** @type {const} */ (["p50", "p95", "p99"]); // in the order of the figure's traces
const PHASES = ["waiting", "prefill", "decode", "preempted"]; // in the order of the figure's traces

// The bars of one trace.
/** @typedef {{ x: number[], y: number[], base: number[], customdata: string[], colours: string[] }} Bars */

export class GanttChart extends PlotlyChart {
  /** @param {HTMLElement} node @param {Figure} figure @param {StepHistory} history */
  constructor(node, figure, history) {
    super(node, figure);
    this.history = history;
  }

  /** @param {Player} player */
  render(player) {
    this.begin();
    const { first, end } = windowOf(player);
    const key = `${player.run} ${first} ${end} ${this.plot.clientHeight}`;
    const [data, layout] = key !== this.drawn && end > first
      ? this.data(this.history.at(first + 1).step, this.history.at(end).step + 1) : [null, {}];
    this.drawn = key;
    this.update(data, { ...layout, ...this.decorations(player, player.state.step + 0.5) });
  }

  // The data and layout for steps [from, to).
  /** @param {number} from @param {number} to */
  data(from, to) {
    const lived = (/** @type {[number, import("./history.js").Life]} */ [, { spans, ended }]) =>
      spans.length && spans[0].from < to && (ended ?? to) > from;
    const rows = [...this.history.seqs].filter(lived).slice(-MOST_ROWS);
    const traces = PHASES.map(() => /** @type {Bars} */ ({ x: [], y: [], base: [], customdata: [], colours: [] }));
    rows.forEach(([id, seq], row) => {
      for (const span of seq.spans) this.bar(traces, row, id, seq, span, from, to);
    });
    const each = (/** @type {keyof Bars} */ name) => traces.map((trace) => trace[name]);
    const data = {
      x: each("x"), y: each("y"), base: each("base"), customdata: each("customdata"),
      // All preempted bars look the same; the others have their sequence's colour.
      "marker.color": [...each("colours").slice(0, 3), undefined],
    };
    const height = this.plot.clientHeight - 30;
    const size = Math.max(6, Math.min(12, height / Math.max(1, rows.length)));
    const layout = {
      "yaxis.range": [Math.max(rows.length, 4) - 0.5, -0.5], "yaxis.tickvals": rows.map((_, row) => row),
      "yaxis.ticktext": rows.map(([id]) => letter(id)), "yaxis.tickfont.size": size, "xaxis.range": [from, Math.max(to, from + 10)],
    };
    return [data, layout];
  }

  /**
   * @param {Bars[]} traces
   * @param {number} row
   * @param {number} id
   * @param {import("./history.js").Life} seq
   * @param {import("./history.js").Span} span
   * @param {number} from
   * @param {number} to
   */
  bar(traces, row, id, seq, span, from, to) {
    const start = Math.max(from, span.from);
    const stop = Math.min(to, span.to ?? to);
    if (stop <= start) return;
    const trace = traces[span.name === "swapped" ? 3 : PHASES.indexOf(span.name)];
    trace.x.push(stop - start);
    trace.base.push(start);
    trace.y.push(row);
    trace.colours.push(colour(id));
    const ending = span.to !== null && span.to === seq.ended ? `, then finished (${seq.reason})` : "";
    const length = plural((span.to ?? to) - span.from, "step");
    trace.customdata.push(`${letter(id)}: ${span.name} from step ${span.from}, ${length}${ending}`);
  }
}

// The layout's colours, read from Gradio's CSS variables, which depend on light or dark mode.
/** @param {any} node */
export function colours(node) {
  const style = getComputedStyle(node);
  const soft = style.getPropertyValue("--mp-soft");
  const line = style.getPropertyValue("--mp-hair");
  /** @type {{ [path: string]: string }} */
  const result = { "font.color": soft, "legend.font.color": soft, "hoverlabel.bgcolor": style.getPropertyValue("--mp-card") };
  for (const axis of Object.keys(node.layout).filter((name) => /^[xy]axis/.test(name))) {
    Object.assign(result, { [`${axis}.gridcolor`]: line, [`${axis}.linecolor`]: line });
  }
  Object.keys(node.layout.annotations ?? []).forEach((i) => (result[`annotations[${i}].font.color`] = soft));
  (node.layout.shapes ?? []).forEach((/** @type {any} */ { name }, /** @type {number} */ i) => {
    result[`shapes[${i}].line.color`] = name === "moment" ? style.getPropertyValue("--mp-red") : soft;
  });
  return result;
}
