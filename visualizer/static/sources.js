// The narration's link to the engine function behind an event, and the panel that shows its source file. The files came
// with the page from the running code, so this needs no network and shows the running version.

import { element, setHidden, setText } from "./names.js";

export class Sources {
  constructor(root, sources) {
    this.functions = sources?.functions ?? {};
    this.managers = sources?.managers ?? {};
    this.files = sources?.files ?? {};
    this.link = root.querySelector("[data-part=source]");
    this.panel = root.querySelector("[data-part=source-panel]");
    this.link.addEventListener("click", () => this.open(this.source));
    this.link.addEventListener("keydown", (event) => event.stopPropagation()); // space must not reach the timeline
    this.elsewhere = this.panel.querySelector("a");
    this.panel.querySelector("button").addEventListener("click", () => this.panel.close());
    this.panel.addEventListener("keydown", (event) => event.stopPropagation()); // its keys must not reach the timeline
  }

  // `memory` names the engine's memory manager, which may replace some functions.
  render(told, memory) {
    const source = this.managers[memory]?.[told?.type] ?? this.functions[told?.type];
    setHidden(this.link, !source);
    if (!source || this.source === source) return;
    this.source = source;
    this.link.dataset.source = told.type;
    setText(this.link, `${source.name} · ${source.file.split("/").at(-1)}:${source.line}`);
    this.link.title = `${source.file}, line ${source.line}: the function that did it`;
  }

  // Shows the whole file, with the function's lines marked and scrolled into view.
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
