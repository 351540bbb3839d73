// Letters, colours and small words: how a sequence or block is called everywhere on the page.

// Okabe & Ito's palette, which people with any colour vision can tell apart. Letters do the rest: there are more
// sequences than colours.
const PALETTE = [
  ["#0072b2", "#fff"], ["#e69f00", "#1c1400"], ["#009e73", "#fff"], ["#d55e00", "#fff"],
  ["#56b4e9", "#04202f"], ["#cc79a7", "#2a0a1c"], ["#f0e442", "#2b2800"], ["#7d7d85", "#fff"],
];

// A … Z, then A2 … Z2: the same letter never means two sequences.
export function letter(seqId) {
  const round = Math.floor(seqId / 26);
  return String.fromCharCode(65 + (seqId % 26)) + (round ? round + 1 : "");
}

export const colour = (seqId) => PALETTE[seqId % PALETTE.length][0];
export const ink = (seqId) => PALETTE[seqId % PALETTE.length][1];

// Stripes of the owners' colours (of four at most: more cannot be told apart anyway).
export function stripes(owners, width = 7) {
  const bands = owners.slice(0, 4).map(
    (seqId, i) => `${colour(seqId)} ${i * width}px ${(i + 1) * width}px`
  );
  return `repeating-linear-gradient(135deg, ${bands.join(", ")})`;
}

export const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

export function list(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}

// The text of tokens [start, end) of a sequence. Special tokens have no place in what a reader sees.
export function text(seq, start = 0, end = seq.pieces.length) {
  return seq.pieces.slice(start, end).join("").replace(/<\|[a-z]+\|>/g, " ");
}

export function element(tag, className, parent, attributes = {}) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (parent) parent.append(node);
  return node;
}

// Writing to the DOM only what changed keeps twenty updates a second cheap.
export function setText(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

// A text that grows at its end: the browser shapes the new words only.
export function growText(node, value) {
  const shown = node.firstChild;
  if (shown?.data === value) return;
  if (shown && value.startsWith(shown.data)) shown.appendData(value.slice(shown.length));
  else node.textContent = value;
}

export function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}
