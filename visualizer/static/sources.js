// The narration's link to the engine function behind an event, and the panel that shows its source file. The files came
// with the page from the running code, so this needs no network and shows the running version.

import { element, setHidden, setText } from "./names.js";

// A function and where it is: see `sources` in sources.py.
/** @typedef {{ name: string, file: string, line: number, last: number, url?: string }} Source */

export class Sources {
  /** @type {Source | undefined} */
  source; // that the link leads to

  /** @param {HTMLElement} root @param {any} sources */
  constructor(root, sources) {
    /** @type {{ [type: string]: Source }} */
    this.functions = sources?.functions ?? {};
    /** @type {{ [memory: string]: { [type: string]: Source } }} */
    this.managers = sources?.managers ?? {};
    /** @type {{ [file: string]: string }} */
    this.files = sources?.files ?? {};
    this.link = root.querySelector("[data-part=source]");
    this.panel = root.querySelector("[data-part=source-panel]");
    this.link.addEventListener("click", () => this.source && this.open(this.source));
    this.link.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => event.stopPropagation()); // space must not reach the timeline
    this.elsewhere = this.panel.querySelector("a");
    this.panel.querySelector("button").addEventListener("click", () => this.panel.close());
    this.panel.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => event.stopPropagation()); // its keys must not reach the timeline
  }

  // `memory` names the engine's memory manager, which may replace some functions.
  /** @param {Sentence | null} told @param {string} memory */
  render(told, memory) {
    const source = told && (this.managers[memory]?.[told.type] ?? this.functions[told.type]);
    setHidden(this.link, !source);
    if (!source || this.source === source) return;
    this.source = source;
    this.link.dataset.source = told.type;
    setText(this.link, `${source.name} · ${source.file.split("/").at(-1)}:${source.line}`);
    this.link.title = `${source.file}, line ${source.line}: the function that did it`;
  }

  // Shows the whole file, with the function's lines marked and scrolled into view.
  /** @param {Source} source */
  open({ name, file, line, last, url }) {
    setText(this.panel.querySelector("h2"), name);
    setText(this.panel.querySelector("small"), `${file}, lines ${line} to ${last}`);
    this.elsewhere.hidden = !url;
    if (url) this.elsewhere.href = url;
    const lines = this.files[file].split("\n").map((words, i) => `${String(i + 1).padStart(4)}  ${words}\n`);
    const pre = this.panel.querySelector("pre");
    pre.replaceChildren(lines.slice(0, line - 1).join(""));
    const mark = element("mark", "", pre, { "data-testid": "source-lines" });
    mark.textContent = lines.slice(line - 1, last).join("");
    pre.append(lines.slice(last).join(""));
    this.panel.showModal();
    pre.scrollTop = mark.offsetTop - 40;
  }
}
