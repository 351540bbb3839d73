// Draws a batch's groups as a tree under the pool: one branch per group, as long as the group's shared prefix, with the
// blocks that the group keeps and a leaf for each of its requests. It is visible only while a batch runs.

import { colour, element, ink, letter, list, plural, setHidden } from "./names.js";

// Map of block -> the number of the group that keeps it.
export const keptBlocks = (/** @type {State} */ state) => new Map(
  Object.entries(state.groups).flatMap(([number, { kept }]) =>
    kept.map((block) => /** @type {[number, number]} */ ([block, Number(number)])))
);

export class Groups {
  /** @param {HTMLElement} root @param {Pool} pool */
  constructor(root, pool) {
    this.node = root.querySelector("[data-part=groups]");
    this.pool = pool;
    /** @type {HTMLElement[]} */
    this.marked = []; // pool cells that have a group's colour
    this.key = "";
  }

  /** @param {State} state */
  render(state) {
    const groups = Object.entries(state.groups).map(([number, group]) => branchOf(state, Number(number), group));
    setHidden(this.node, !groups.length);
    const key = JSON.stringify(groups);
    if (key === this.key) return;
    this.key = key;
    this.node.replaceChildren(...groups.map(draw));
    this.mark(groups);
  }

  // Gives the blocks that a group keeps its colour in the pool, even if sequences also use them.
  /** @param {ReturnType<typeof branchOf>[]} groups */
  mark(groups) {
    for (const cell of this.marked) {
      delete cell.dataset.kept;
      cell.style.removeProperty("--group");
    }
    this.marked = [];
    for (const { kept, hue } of groups) {
      for (const block of kept) {
        const cell = this.pool.cellOf(block);
        if (!cell) continue;
        cell.dataset.kept = "";
        cell.style.setProperty("--group", hue);
        this.marked.push(cell);
      }
    }
  }
}

// The data to draw of a group. Its colour is its first sequence's; requests dropped from the state have no leaf.
/** @param {State} state @param {number} number @param {Group} group */
function branchOf(state, number, { request_ids: ids, num_blocks: length, kept }) {
  const leaves = ids.filter((id) => state.requests[id]).map((id) => {
    const seq = state.requests[id][0];
    const [running, over] = [state.running.includes(id), state.finished.includes(id)];
    return { seq, name: running ? "runs" : over ? "has ended" : "waits" };
  });
  return { number, length, kept, leaves, all: ids.length, hue: colour(leaves[0]?.seq ?? number) };
}

/** @param {ReturnType<typeof branchOf>} branch */
function draw({ number, length, kept, leaves, all, hue }) {
  const row = element("div", "mp-branch", null, { "data-testid": "group", "data-group": number });
  row.style.setProperty("--group", hue);
  const stem = element("span", "mp-stem", row);
  stem.style.setProperty("--length", String(length));
  stem.classList.toggle("mp-kept", kept.length > 0);
  stem.textContent = kept.length ? kept.join(" ") : "";
  stem.title = `${plural(length, "block")} in common` + (kept.length ? `, kept: ${list(kept.map(String))}` : ", not computed yet");
  for (const { seq, name } of leaves) {
    const leaf = element("i", "mp-leaf", row, { "data-seq": seq, "data-state": name, title: `${letter(seq)} ${name}` });
    leaf.style.background = colour(seq);
    leaf.style.color = ink(seq);
    leaf.textContent = letter(seq);
  }
  const words = `group ${number + 1}: ${plural(length, "block")} in common, ${kept.length ? "kept" : "not computed yet"}; ` +
    `${plural(all, "request")}, ${list(leaves.map(({ seq, name }) => `${letter(seq)} ${name}`))}`;
  row.setAttribute("role", "img");
  row.setAttribute("aria-label", words);
  return row;
}
