// Where a row's text shows which token, without an element for each: a place in the text is found from the pointer, and a
// run of tokens is a Range that the browser paints (`::highlight` in scene.css). Nothing is added to the document, so
// twenty steps a second stay cheap however long the texts are.

import { plural, setText, text } from "./names.js";

// The token under the pointer, as a position in the sequence; undefined beside the text.
export function tokenAt(row, seq, x, y) {
  const caret = caretAt(x, y);
  const part = [row.prompt, row.output].find((node) => caret && node.contains(caret.node));
  if (!part || caret.node.nodeType !== Node.TEXT_NODE) return undefined;
  // The caret stands between two characters; the pointer is over one of them.
  const letter = [caret.offset, caret.offset - 1].find((at) => covers(caret.node, at, x));
  if (letter === undefined) return undefined;
  const first = part === row.prompt ? 0 : seq.num_prompt;
  const end = part === row.prompt ? seq.num_prompt : seq.tokens.length;
  for (let token = first; token < end; token += 1) if (letterOf(seq, token + 1, part === row.prompt) > letter) return token;
  return undefined;
}

function caretAt(x, y) {
  const at = document.caretPositionFromPoint?.(x, y);
  if (at) return { node: at.offsetNode, offset: at.offset };
  const range = document.caretRangeFromPoint?.(x, y);
  return range && { node: range.startContainer, offset: range.startOffset };
}

function covers(node, letter, x) {
  if (letter < 0 || letter >= node.length) return false;
  const range = document.createRange();
  range.setStart(node, letter);
  range.setEnd(node, letter + 1);
  const box = range.getBoundingClientRect();
  return x >= box.left && x <= box.right;
}

// Where a token begins in what is shown of the prompt or of the output. Special tokens and the spaces that a prompt begins
// with are not shown as they are.
function letterOf(seq, token, inPrompt) {
  if (!inPrompt) return text(seq, seq.num_prompt, token).length;
  const hidden = text(seq, 0, seq.num_prompt);
  return Math.max(0, text(seq, 0, token).length - (hidden.length - hidden.trimStart().length));
}

// The Range of tokens [start, end); null if none of them is to be seen.
export function rangeOf(row, seq, start, end) {
  const place = (token, inPrompt) => {
    const node = (inPrompt ? row.prompt : row.output).firstChild;
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

// What is guessed to come next, while it is computed; struck out what of it was taken back in this step.
export function renderGuess(node, { proposed, taken_back: back }) {
  const kind = proposed.length ? "proposed" : "taken";
  if (node.dataset.kind !== kind) node.dataset.kind = kind;
  setText(node, text({ pieces: proposed.length ? proposed : back }));
  node.title = back.length ? `guessed, computed, and taken back: ${plural(back.length, "token")}` : "";
}

const painted = {};

// Paints ranges in the colours that `::highlight(name)` gives.
export function paint(name, ranges) {
  if (!globalThis.Highlight) return; // a browser without them shows the rest
  if (!ranges.length && !painted[name]) return;
  painted[name] = ranges.length > 0;
  if (ranges.length) CSS.highlights.set(name, new Highlight(...ranges));
  else CSS.highlights.delete(name);
}
