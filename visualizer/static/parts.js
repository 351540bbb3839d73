// Small building blocks of the inspector's views.
//
// `data-go` names the target of a click ("block:17", "seq:3", "token:3:45"), `data-slot` a token's slot ("17:5": block
// and offset). The inspector listens for both, so a view only has to set them.

import { colour, element, ink, letter, setText } from "./names.js";

// Makes the parent's children match the items, and reuses nodes by key: a node that is hovered, focused or being
// clicked must not be replaced while the engine runs on.
/**
 * @template T
 * @param {Element} parent
 * @param {readonly T[]} items
 * @param {(item: T) => string | number | boolean} keyOf
 * @param {(item: T) => Element} build
 * @param {(node: any, item: T) => void} [update]
 */
export function sync(parent, items, keyOf, build, update) {
  const kept = (parent.kept ??= new Map());
  const keys = items.map((item) => String(keyOf(item)));
  const wanted = new Set(keys);
  for (const [key, node] of kept) {
    if (wanted.has(key)) continue;
    node.remove();
    kept.delete(key);
  }
  items.forEach((item, index) => {
    if (!kept.has(keys[index])) kept.set(keys[index], build(item));
    const node = kept.get(keys[index]);
    if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] ?? null);
    update?.(node, item);
  });
}

/** @param {number} id */
export function badge(id) {
  const node = element("button", "mp-tag", null, { type: "button", "data-go": `seq:${id}` });
  node.style.background = colour(id);
  node.style.color = ink(id);
  node.textContent = letter(id);
  node.setAttribute("aria-label", `sequence ${letter(id)}`);
  return node;
}

/** @param {Element} parent @param {string} words */
export function heading(parent, words) {
  const node = element("h4", "", parent);
  node.textContent = words;
  return node;
}

// Fills a definition list from [name, value] pairs; pairs without a value are left out.
/** @param {Element} node @param {[string, any][]} pairs */
export function facts(node, pairs) {
  const known = pairs.filter(([, value]) => value !== undefined && value !== null);
  sync(node, known, ([name]) => name, ([name]) => {
    const row = element("div", "");
    element("dt", "", row).textContent = name;
    element("dd", "", row);
    return row;
  }, (row, [, value]) => setText(row.lastChild, String(value)));
}

/** @param {Element} node @param {string} name @param {string} value */
export function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

// A token's text with visible symbols for spaces and line ends.
/** @param {string | undefined} piece */
export function visible(piece) {
  if (piece === undefined) return "";
  return piece === "" ? "∅" : piece.replaceAll("\n", "⏎").replaceAll(" ", "␣");
}

// The element of one token in running text: a click inspects it. renderToken fills it in.
/** @param {Element | null} parent */
export function token(parent = null) {
  return element("span", "mp-token", parent, { role: "button", tabindex: "-1", "data-testid": "token" });
}

/** @param {Element} node @param {number} seqId @param {number} position @param {string} piece @param {string | null} slot */
export function renderToken(node, seqId, position, piece, slot) {
  // A token that is part of a character has no text, so it has no width; a line end needs some, to be clicked.
  setText(node, piece === "" ? "\u200b" : piece.replaceAll("\n", "⏎\n"));
  setAttribute(node, "data-go", `token:${seqId}:${position}`);
  setAttribute(node, "data-slot", slot ?? "");
}

// The slot that holds the KV of a position: {block, offset}, or null if it is not in the pool.
/** @param {State} state @param {Seq | undefined} seq @param {number} position */
export function slotOf(state, seq, position) {
  const size = state.config.block_size;
  const block = seq?.table[Math.floor(position / size)];
  if (!seq || block === undefined || position >= seq.num_computed) return null;
  return { block, offset: position % size };
}

export const slotName = (/** @type {{ block: number, offset: number } | null} */ slot) =>
  (slot ? `${slot.block}:${slot.offset}` : "");

// Keyboard navigation of a list: it is one Tab stop, and arrow keys move among its tokens (roving tabindex).
/** @param {HTMLElement} list */
export function roving(list) {
  list.addEventListener("keydown", (event) => {
    const move = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    const from = /** @type {HTMLElement} */ (event.target).closest("[data-go]");
    if (event.key === "Enter" && from?.tagName === "SPAN") from.click();
    if (!move || !from) return;
    const all = [...list.querySelectorAll("[data-go]")];
    all[Math.max(0, Math.min(all.length - 1, all.indexOf(from) + move))].focus();
    event.preventDefault();
    event.stopPropagation(); // elsewhere the arrow keys step the view
  });
}

// The same for a grid of buttons, with up and down, too. Calls `focused(cell)` with the focused cell, or null.
/** @param {HTMLElement} grid @param {(cell: HTMLElement | null) => void} focused */
export function rovingCells(grid, focused) {
  const move = (/** @type {HTMLElement} */ from, /** @type {HTMLElement | undefined} */ to) => {
    if (!to) return;
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  };
  grid.addEventListener("keydown", (event) => {
    const cells = /** @type {HTMLElement[]} */ ([...grid.children]);
    const from = /** @type {HTMLElement} */ (event.target);
    const at = cells.indexOf(from);
    const columns = cells.filter((cell) => cell.offsetTop === cells[0].offsetTop).length;
    const keys = new Map([["ArrowRight", 1], ["ArrowLeft", -1], ["ArrowDown", columns], ["ArrowUp", -columns]]);
    const by = keys.get(event.key);
    if (!by || at < 0) return;
    move(from, cells[at + by]);
    event.preventDefault();
    event.stopPropagation();
  });
  grid.addEventListener("focusin", (event) => {
    const cell = /** @type {HTMLElement} */ (event.target);
    if (cell.matches(":focus-visible")) focused(cell);
  });
  grid.addEventListener("focusout", () => focused(null));
}
