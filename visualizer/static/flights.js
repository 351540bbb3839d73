// Animates copies from block to block, and swaps between the pool and the CPU: a small block moves along a line, which
// stays for a while, or as long as the view is frozen.
// With the browser's "reduce motion" setting only the lines are drawn.

import { colour } from "./names.js";

const NS = "http://www.w3.org/2000/svg";
const FLIGHT = 520; // milliseconds
const LINGER = 1500; // milliseconds that a line stays if the view is not frozen
const MOST = 16; // moves drawn at once; a viewer cannot follow more
const CLOSE = 12; // records: after a longer jump of the view, the moves in between are not drawn

// A block of the pool, or of the CPU.
/** @typedef {{ block: number, swapped?: boolean }} End */
/** @typedef {{ from: End, to: End, seq: number, kind: string }} Move */

export class Flights {
  /** @param {HTMLElement} scene @param {Pool} pool @param {SwapSpace} swap */
  constructor(scene, pool, swap) {
    this.scene = scene;
    this.pool = pool;
    this.swap = swap;
    this.svg = document.createElementNS(NS, "svg");
    this.svg.setAttribute("class", "mp-flights");
    this.svg.setAttribute("aria-hidden", "true");
    scene.append(this.svg);
    this.still = window.matchMedia("(prefers-reduced-motion: reduce)");
    /** @type {Pick<Player, "run" | "position" | "sub">} */
    this.seen = { run: null, position: 0, sub: 0 };
  }

  /** @param {Player} player */
  render(player) {
    const { run, position, sub, mode } = player;
    const before = this.seen;
    if (before.run === run && before.position === position && before.sub === sub) return;
    this.seen = { run, position, sub };
    this.clear(mode === "frozen");
    const moves = this.events(player, before).flatMap(movesOf);
    for (const move of moves.slice(-MOST)) this.fly(move, mode === "frozen");
  }

  // The events since the last call. A frozen view gets the events of its current record, however it got there.
  /** @param {Player} player @param {Player | Flights["seen"]} before */
  events(player, before) {
    if (player.mode === "frozen") return player.latest;
    const count = player.position - before.position;
    if (before.run !== player.run || count < 1 || count > CLOSE) return [];
    return player.records.slice(before.position - player.first, player.position - player.first).flatMap((record) => record.events);
  }

  /** @param {boolean} all */
  clear(all) {
    for (const line of /** @type {SVGElement[]} */ ([...this.svg.children])) {
      if (all || line.dataset.keep === "1") line.remove();
    }
  }

  /** @param {Move} move @param {boolean} keep */
  fly({ from, to, seq, kind }, keep) {
    const [source, target] = [this.cell(from), this.cell(to)];
    if (!source || !target) return;
    const origin = this.scene.getBoundingClientRect();
    const middle = (/** @type {HTMLElement} */ cell) => {
      const box = cell.getBoundingClientRect();
      return [box.left + box.width / 2 - origin.left, box.top + box.height / 2 - origin.top];
    };
    const [[x1, y1], [x2, y2]] = [middle(source), middle(target)];
    const line = document.createElementNS(NS, "path");
    line.setAttribute("d", arc(x1, y1, x2, y2));
    line.setAttribute("stroke", colour(seq));
    line.setAttribute("data-testid", "flight");
    Object.assign(line.dataset, { kind, from: name(from), to: name(to), keep: keep ? "1" : "0" });
    this.svg.append(line);
    if (!keep) setTimeout(() => line.remove(), LINGER);
    if (!this.still.matches) this.animate(line, colour(seq), source.getBoundingClientRect().width);
  }

  /** @param {SVGPathElement} line @param {string} hue @param {number} width */
  animate(line, hue, width) {
    const block = document.createElementNS(NS, "rect");
    const size = Math.max(10, Math.min(26, width * 0.6));
    for (const [key, value] of Object.entries({ x: -size / 2, y: -size / 2, width: size, height: size, rx: 4, fill: hue })) {
      block.setAttribute(key, String(value));
    }
    block.style.offsetPath = `path("${line.getAttribute("d")}")`;
    block.style.offsetRotate = "0deg";
    this.svg.append(block);
    const flight = block.animate([{ offsetDistance: "0%" }, { offsetDistance: "100%" }], { duration: FLIGHT, easing: "ease-in-out" });
    flight.onfinish = flight.oncancel = () => block.remove();
  }

  /** @param {End} end */
  cell({ block, swapped }) {
    return swapped ? this.swap.cellOf(block) : this.pool.cellOf(block);
  }
}

const name = (/** @type {End} */ { block, swapped }) => (swapped ? `cpu-${block}` : String(block));

/** @param {number} x1 @param {number} y1 @param {number} x2 @param {number} y2 */
function arc(x1, y1, x2, y2) {
  const bend = Math.min(60, 12 + Math.hypot(x2 - x1, y2 - y1) * 0.2);
  return `M${x1},${y1} Q${(x1 + x2) / 2},${(y1 + y2) / 2 - bend} ${x2},${y2}`;
}

/** @param {EngineEvent} e @returns {Move[]} */
function movesOf(e) {
  if (e.type === "copied") return [{ from: { block: e.src }, to: { block: e.dst }, seq: e.seq_id, kind: "copy" }];
  if (e.type !== "swapped_out" && e.type !== "swapped_in") return [];
  const out = e.type === "swapped_out";
  return e.blocks.map((block, i) => {
    const [here, there] = [{ block }, { block: e.swap_blocks[i], swapped: true }];
    return { from: out ? here : there, to: out ? there : here, seq: e.seq_id, kind: out ? "swap-out" : "swap-in" };
  });
}
