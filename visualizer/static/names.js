// Names and colours of sequences, used everywhere on the page, and small helpers for text and DOM nodes.

// Okabe & Ito's palette, which is safe for colour-blind viewers. Since there are more sequences than colours, letters
// distinguish the rest. Each entry: the colour, and the text colour on it.
const PALETTE = [
  ["#0072b2", "#fff"], ["#e69f00", "#1c1400"], ["#009e73", "#fff"], ["#d55e00", "#fff"],
  ["#56b4e9", "#04202f"], ["#cc79a7", "#2a0a1c"], ["#f0e442", "#2b2800"], ["#7d7d85", "#fff"],
];

// A sequence's name: A … Z, then A2 … Z2. No two sequences have the same name.
/** @param {number} seqId */
export function letter(seqId) {
  const round = Math.floor(seqId / 26);
  return String.fromCharCode(65 + (seqId % 26)) + (round ? round + 1 : "");
}

export const colour = (/** @type {number} */ seqId) => PALETTE[seqId % PALETTE.length][0];
export const ink = (/** @type {number} */ seqId) => PALETTE[seqId % PALETTE.length][1];

// Stripes in the owners' colours (at most four: more stripes cannot be distinguished).
/** @param {number[]} owners */
export function stripes(owners, width = 7) {
  const bands = owners.slice(0, 4).map(
    (seqId, i) => `${colour(seqId)} ${i * width}px ${(i + 1) * width}px`
  );
  return `repeating-linear-gradient(135deg, ${bands.join(", ")})`;
}

export const plural = (/** @type {number} */ n, /** @type {string} */ word) => `${n} ${word}${n === 1 ? "" : "s"}`;

/** @param {string[]} words */
export function list(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

// The text of tokens [start, end) of a sequence, with special tokens replaced by spaces.
/** @param {Pick<Seq, "pieces">} seq */
export function text(seq, start = 0, end = seq.pieces.length) {
  return seq.pieces.slice(start, end).join("").replace(/<\|[a-z]+\|>/g, " ");
}

/**
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag
 * @param {string} [className]
 * @param {Element | null} [parent] that gets it as its last child
 * @param {{ [name: string]: string | number }} [attributes]
 */
export function element(tag, className, parent, attributes = {}) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  if (parent) parent.append(node);
  return node;
}

// Writes to the DOM only if the text has changed, so that twenty updates a second stay cheap.
/** @param {Node} node @param {string} value */
export function setText(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

// Like setText, for a text that grows at its end: it appends, so that the browser lays out only the new words.
/** @param {Node} node that has no element in it @param {string} value */
export function growText(node, value) {
  const shown = /** @type {Text | null} */ (node.firstChild);
  if (shown?.data === value) return;
  if (shown && value.startsWith(shown.data)) shown.appendData(value.slice(shown.length));
  else node.textContent = value;
}

/** @param {HTMLElement} node @param {boolean} hidden */
export function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}
