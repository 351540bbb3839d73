// Draws arrows from the selected sequence's block table to its blocks in the pool.
// Without a selection only the newest allocations get arrows: arrows for all sequences would be unreadable.

import { colour } from "./names.js";

const NEWEST = 3; // arrows drawn without a selection, prefix cache hits not counted
const MOST = 8; // arrows drawn without a selection, hits included
const FADED = 10; // records after which such an arrow has faded out

const NS = "http://www.w3.org/2000/svg";

// An entry of a block table that gets an arrow.
/** @typedef {{ chip: HTMLElement, seq: number, kind?: string, opacity?: number }} Traced */

export class Arrows {
  /** @param {HTMLElement} scene */
  constructor(scene) {
    this.drawn = "";
    this.scene = scene;
    this.svg = document.createElementNS(NS, "svg");
    this.svg.setAttribute("class", "mp-arrows");
    this.svg.setAttribute("aria-hidden", "true");
    scene.append(this.svg);
  }

  /**
   * @param {Lit | null} lit
   * @param {Sequences} sequences
   * @param {Pool} pool
   * @param {SwapSpace} swap
   * @param {Player} player
   */
  render(lit, sequences, pool, swap, player) {
    const chips = lit ? traced(lit, sequences) : newest(player, sequences);
    const paths = this.paths(chips, lit, sequences, pool, swap);
    const key = JSON.stringify(paths);
    if (key === this.drawn) return;
    this.drawn = key;
    while (this.svg.children.length > paths.length) this.svg.lastChild?.remove();
    paths.forEach(({ d, hue, strong, opacity, kind, block }, index) => {
      const path = /** @type {SVGElement} */ (
        this.svg.children[index] ?? this.svg.appendChild(document.createElementNS(NS, "path")));
      path.setAttribute("d", d);
      path.setAttribute("stroke", hue);
      path.setAttribute("class", strong ? "mp-strong" : "");
      Object.assign(path.dataset, { kind, block });
      path.style.opacity = String(opacity ?? "");
    });
  }

  /**
   * @param {Traced[]} chips
   * @param {Lit | null} lit
   * @param {Sequences} sequences
   * @param {Pool} pool
   * @param {SwapSpace} swap
   */
  paths(chips, lit, sequences, pool, swap) {
    const origin = this.scene.getBoundingClientRect();
    const visible = sequences.list.getBoundingClientRect();
    const paths = [];
    for (const { chip, seq, opacity, kind = "traced" } of chips) {
      const onCpu = chip.dataset.swap !== undefined;
      const block = Number(onCpu ? chip.dataset.swap : chip.dataset.chip);
      const cell = (onCpu ? swap : pool).cellOf(block);
      const from = chip.getBoundingClientRect();
      if (!cell || from.bottom < visible.top || from.top > visible.bottom) continue;
      const to = cell.getBoundingClientRect();
      // A long block table is cut off at its right edge; the arrows of its hidden entries begin there.
      const edge = (chip.parentElement ?? chip).getBoundingClientRect().right;
      const [x1, y1] = [Math.min(from.left + from.width / 2, edge) - origin.left, from.bottom - origin.top];
      const [x2, y2] = [to.left - origin.left + 2, to.top + to.height / 2 - origin.top];
      const reach = (x2 - x1) * 0.5;
      paths.push({
        d: `M${x1},${y1} C${x1 + reach},${y1 + 14} ${x2 - reach},${y2} ${x2},${y2}`,
        hue: colour(seq),
        strong: (onCpu ? lit?.swap : lit?.block) === block,
        opacity,
        kind,
        block,
      });
    }
    return paths;
  }
}

// For a highlighted sequence, all entries of its block table; for a highlighted block, its entry in every block table.
/** @param {Lit} lit @param {Sequences} sequences @returns {Traced[]} */
function traced(lit, sequences) {
  const chips = [...lit.seqs].flatMap((seq) =>
    [...sequences.chipsOf(seq), ...sequences.swapChipsOf(seq)].map((chip) => ({ chip, seq })));
  if (lit.seq !== undefined) return chips;
  const block = (/** @type {Traced} */ { chip: { dataset } }) => (lit.swap === undefined ? dataset.chip : dataset.swap);
  return chips.filter((entry) => block(entry) === String(lit.swap ?? lit.block));
}

// Whether an event is an allocation, a copy or a prefix cache hit.
/** @param {EngineEvent} event @returns {event is Allocated | Copied | Shared} */
const NEWS = (event) =>
  event.type === "allocated" || event.type === "copied" || (event.type === "shared" && event.reason === "prefix");

// The block table entries of the latest allocations, copies and prefix cache hits, from the last FADED records.
/** @param {Player} player @param {Sequences} sequences */
function newest(player, sequences) {
  /** @type {Traced[]} */
  const chips = [];
  const last = player.position - player.first - 1;
  for (let age = 0; age < Math.min(FADED, last + 1); age += 1) {
    const events = age === 0 ? player.latest : player.records[last - age].events;
    for (const event of events.filter(NEWS).toReversed()) {
      const chip = sequences.chipsOf(event.seq_id)[event.logical];
      // One prefix cache hit covers several blocks: all of them are shown.
      const kind = event.type === "shared" ? "found" : event.type;
      if (chip) chips.push({ chip, seq: event.seq_id, kind, opacity: (0.75 * (FADED - age)) / FADED });
      if (chips.filter((entry) => entry.kind !== "found").length === NEWEST || chips.length === MOST) return chips;
    }
  }
  return chips;
}
