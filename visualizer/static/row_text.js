// Maps between a row's text and its tokens, without one element per token: a pointer position is mapped to a token, and
// a run of tokens to a Range that the browser paints (`::highlight` in scene.css). Nothing is added to the document, so
// twenty steps a second stay cheap even for long sequences.

import { plural, setText, text } from "./names.js";

// The position in the sequence of the token under the pointer; undefined if the pointer is not over text.
/** @param {Row} row @param {Seq} seq @param {number} x @param {number} y */
export function tokenAt(row, seq, x, y) {
  const caret = caretAt(x, y);
  const part = [row.prompt, row.output].find((node) => caret && node.contains(caret.node));
  if (!caret || !part || caret.node.nodeType !== Node.TEXT_NODE) return undefined;
  // The caret is between two characters; the pointer is over one of them.
  const letter = [caret.offset, caret.offset - 1].find((at) => covers(/** @type {Text} */ (caret.node), at, x));
  if (letter === undefined) return undefined;
  const first = part === row.prompt ? 0 : seq.num_prompt;
  const end = part === row.prompt ? seq.num_prompt : seq.tokens.length;
  for (let token = first; token < end; token += 1) if (letterOf(seq, token + 1, part === row.prompt) > letter) return token;
  return undefined;
}

/** @param {number} x @param {number} y @returns {{ node: Node, offset: number } | null} */
function caretAt(x, y) {
  const at = document.caretPositionFromPoint?.(x, y);
  if (at) return { node: at.offsetNode, offset: at.offset };
  const range = document.caretRangeFromPoint?.(x, y);
  return range ? { node: range.startContainer, offset: range.startOffset } : null;
}

/** @param {Text} node @param {number} letter @param {number} x */
function covers(node, letter, x) {
  if (letter < 0 || letter >= node.length) return false;
  const range = document.createRange();
  range.setStart(node, letter);
  range.setEnd(node, letter + 1);
  const box = range.getBoundingClientRect();
  return x >= box.left && x <= box.right;
}

// The offset at which a token begins in the displayed prompt or output. Special tokens are displayed as spaces, and a
// prompt's leading spaces are not displayed.
/** @param {Seq} seq @param {number} token @param {boolean} inPrompt */
function letterOf(seq, token, inPrompt) {
  if (!inPrompt) return text(seq, seq.num_prompt, token).length;
  const hidden = text(seq, 0, seq.num_prompt);
  return Math.max(0, text(seq, 0, token).length - (hidden.length - hidden.trimStart().length));
}

// The Range of tokens [start, end); null if none of them is displayed.
/** @param {Row} row @param {Seq} seq @param {number} start @param {number} end */
export function rangeOf(row, seq, start, end) {
  /** @param {number} token @param {boolean} inPrompt @returns {[Text, number] | null} */
  const place = (token, inPrompt) => {
    const node = /** @type {Text | null} */ ((inPrompt ? row.prompt : row.output).firstChild);
    return node && [node, Math.min(node.length, letterOf(seq, token, inPrompt))];
  };
  const from = place(start, start < seq.num_prompt);
  const to = place(Math.min(end, seq.tokens.length), end <= seq.num_prompt);
  if (!from || !to) return null;
  const range = document.createRange();
  range.setStart(...from);
  range.setEnd(...to);
  return range.collapsed ? null : range;
}

// Shows the draft tokens that are being verified, or struck out those that this step rejected.
/** @param {HTMLElement} node @param {Seq} seq */
export function renderGuess(node, { proposed, taken_back: back }) {
  const kind = proposed.length ? "proposed" : "taken";
  if (node.dataset.kind !== kind) node.dataset.kind = kind;
  setText(node, text({ pieces: proposed.length ? proposed : back }));
  node.title = back.length ? `guessed, computed, and taken back: ${plural(back.length, "token")}` : "";
}

/** @type {{ [name: string]: boolean }} */
const painted = {};

// Paints ranges in the colours of CSS's `::highlight(name)`.
/** @param {string} name @param {Range[]} ranges */
export function paint(name, ranges) {
  if (!globalThis.Highlight) return; // old browsers show no highlights
  if (!ranges.length && !painted[name]) return;
  painted[name] = ranges.length > 0;
  if (ranges.length) CSS.highlights.set(name, new Highlight(...ranges));
  else CSS.highlights.delete(name);
}
