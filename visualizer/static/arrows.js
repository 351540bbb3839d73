// Arrows from the block table of the selected sequence to its blocks in the pool.
// Only for the selected one: all of them at once are spaghetti.

import { colour } from "./names.js";

const NS = "http://www.w3.org/2000/svg";

export class Arrows {
  constructor(scene) {
    this.scene = scene;
    this.svg = document.createElementNS(NS, "svg");
    this.svg.setAttribute("class", "mp-arrows");
    this.svg.setAttribute("aria-hidden", "true");
    scene.append(this.svg);
  }

  render(lit, sequences, pool) {
    const paths = lit?.seq === undefined ? [] : this.paths(lit, sequences, pool);
    while (this.svg.children.length > paths.length) this.svg.lastChild.remove();
    paths.forEach(({ d, hue, strong }, index) => {
      const path = this.svg.children[index] ?? this.svg.appendChild(document.createElementNS(NS, "path"));
      path.setAttribute("d", d);
      path.setAttribute("stroke", hue);
      path.setAttribute("class", strong ? "mp-strong" : "");
    });
  }

  paths(lit, sequences, pool) {
    const origin = this.scene.getBoundingClientRect();
    const visible = sequences.list.getBoundingClientRect();
    const paths = [];
    for (const chip of sequences.chipsOf(lit.seq)) {
      const cell = pool.cellOf(Number(chip.dataset.chip));
      const from = chip.getBoundingClientRect();
      if (!cell || from.bottom < visible.top || from.top > visible.bottom) continue;
      const to = cell.getBoundingClientRect();
      const [x1, y1] = [from.left + from.width / 2 - origin.left, from.bottom - origin.top];
      const [x2, y2] = [to.left - origin.left + 2, to.top + to.height / 2 - origin.top];
      const reach = (x2 - x1) * 0.5;
      paths.push({
        d: `M${x1},${y1} C${x1 + reach},${y1 + 14} ${x2 - reach},${y2} ${x2},${y2}`,
        hue: colour(lit.seq),
        strong: lit.block === Number(chip.dataset.chip),
      });
    }
    return paths;
  }
}
