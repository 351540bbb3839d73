// Arrows from the block table of the selected sequence to its blocks in the pool.
// Only for the selected one, or else for what was handed out last: all of them at once are spaghetti.

import { colour } from "./names.js";

const NEWEST = 3; // arrows drawn when nothing is selected
const FADED = 10; // records after which they are gone

const NS = "http://www.w3.org/2000/svg";

export class Arrows {
  constructor(scene) {
    this.scene = scene;
    this.svg = document.createElementNS(NS, "svg");
    this.svg.setAttribute("class", "mp-arrows");
    this.svg.setAttribute("aria-hidden", "true");
    scene.append(this.svg);
  }

  render(lit, sequences, pool, player) {
    const chips = lit ? sequences.chipsOf(lit.seq).map((chip) => ({ chip, seq: lit.seq })) : newest(player, sequences);
    const paths = this.paths(chips, lit, sequences, pool);
    while (this.svg.children.length > paths.length) this.svg.lastChild.remove();
    paths.forEach(({ d, hue, strong, opacity }, index) => {
      const path = this.svg.children[index] ?? this.svg.appendChild(document.createElementNS(NS, "path"));
      path.setAttribute("d", d);
      path.setAttribute("stroke", hue);
      path.setAttribute("class", strong ? "mp-strong" : "");
      path.style.opacity = opacity ?? "";
    });
  }

  paths(chips, lit, sequences, pool) {
    const origin = this.scene.getBoundingClientRect();
    const visible = sequences.list.getBoundingClientRect();
    const paths = [];
    for (const { chip, seq, opacity } of chips) {
      const cell = pool.cellOf(Number(chip.dataset.chip));
      const from = chip.getBoundingClientRect();
      if (!cell || from.bottom < visible.top || from.top > visible.bottom) continue;
      const to = cell.getBoundingClientRect();
      // A long table is cut off at its right edge, where the arrows of what is hidden begin.
      const edge = chip.parentElement.getBoundingClientRect().right;
      const [x1, y1] = [Math.min(from.left + from.width / 2, edge) - origin.left, from.bottom - origin.top];
      const [x2, y2] = [to.left - origin.left + 2, to.top + to.height / 2 - origin.top];
      const reach = (x2 - x1) * 0.5;
      paths.push({
        d: `M${x1},${y1} C${x1 + reach},${y1 + 14} ${x2 - reach},${y2} ${x2},${y2}`,
        hue: colour(seq),
        strong: lit?.block === Number(chip.dataset.chip),
        opacity,
      });
    }
    return paths;
  }
}

// The chips of the latest allocations and copies, as long as they are news.
function newest(player, sequences) {
  const chips = [];
  const last = player.position - player.first - 1;
  for (let age = 0; age < Math.min(FADED, last + 1); age += 1) {
    for (const event of player.records[last - age].events.toReversed()) {
      if (event.type !== "allocated" && event.type !== "copied") continue;
      const chip = sequences.chipsOf(event.seq_id)[event.logical];
      if (chip) chips.push({ chip, seq: event.seq_id, opacity: (0.75 * (FADED - age)) / FADED });
      if (chips.length === NEWEST) return chips;
    }
  }
  return chips;
}
