// The memory chart: tokens as the sequences see them, slots really filled, slots reserved. The figure was built in
// Python with plotly and arrives once as JSON; only its data changes here, four times a second at most.

const EVERY = 250; // milliseconds
const WINDOW = 400; // records shown
const LINES = ["reserved", "used", "logical"]; // in the order of the figure's traces

export class Chart {
  constructor(root, figure, plotlyUrl) {
    this.node = root.querySelector("[data-part=chart]");
    this.figure = figure;
    this.nextAt = 0;
    this.drawn = { first: -1, end: -1 };
    if (!plotlyUrl) { // an exported recording carries no plotly with it
      this.node.hidden = true;
      return;
    }
    // 4.8 MB: the page is alive long before the chart is.
    const script = document.createElement("script");
    script.src = plotlyUrl;
    script.onload = () => this.begin();
    document.head.append(script);
  }

  async begin() {
    const config = { displayModeBar: false, responsive: true, staticPlot: false };
    await window.Plotly.newPlot(this.node, this.figure.data, this.figure.layout, config);
    this.ready = true;
    const repaint = () => window.Plotly.relayout(this.node, colours(this.node));
    repaint();
    new MutationObserver(repaint).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  }

  render(player, now) {
    if (!this.ready || now < this.nextAt || !player.state.config.num_blocks) return;
    const end = player.position;
    const first = Math.max(player.first, end - WINDOW);
    if (this.drawn.run === player.run && this.drawn.first === first && this.drawn.end === end) return;
    this.nextAt = now + EVERY;
    // Going on from what is drawn: add to it. Anything else (a seek, a new run): draw afresh.
    const goesOn = this.drawn.run === player.run && this.drawn.end > first && this.drawn.end < end;
    const from = goesOn ? this.drawn.end : first;
    const points = player.records.slice(from - player.first, end - player.first).map((record) => record.metrics);
    const x = LINES.map(() => points.map((point) => point.step));
    const y = LINES.map((name) => points.map((point) => point[name]));
    if (goesOn) window.Plotly.extendTraces(this.node, { x, y }, [0, 1, 2], WINDOW);
    else window.Plotly.restyle(this.node, { x, y }, [0, 1, 2]);
    this.capacity(player);
    this.drawn = { run: player.run, first, end };
  }

  // The pool's size as a line that nothing can cross.
  capacity(player) {
    const { num_blocks, block_size } = player.state.config;
    const slots = num_blocks * block_size;
    if (this.slots === slots) return;
    this.slots = slots;
    window.Plotly.relayout(this.node, {
      "shapes[0].y0": slots, "shapes[0].y1": slots, "annotations[0].y": slots,
      "annotations[0].text": `the pool: ${slots} slots`,
    });
  }
}

// Gradio's variables know whether the page is light or dark.
function colours(node) {
  const style = getComputedStyle(node);
  const soft = style.getPropertyValue("--mp-soft");
  const line = style.getPropertyValue("--mp-hair");
  return {
    "font.color": soft, "xaxis.gridcolor": line, "yaxis.gridcolor": line, "xaxis.linecolor": line,
    "shapes[0].line.color": soft, "annotations[0].font.color": soft, "legend.font.color": soft,
  };
}
