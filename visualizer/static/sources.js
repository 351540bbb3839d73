// Who did it: the narration's link to the function in the engine's source, at GitHub or in a small panel of its own.
// Names, files and lines come from the server, which looked them up in the running code.

import { setText } from "./names.js";

export class Sources {
  constructor(root, sources) {
    this.sources = sources ?? {};
    this.link = root.querySelector("[data-part=source]");
    this.panel = root.querySelector("[data-part=source-panel]");
    this.link.addEventListener("click", (event) => {
      if (this.link.hasAttribute("href")) return;
      event.preventDefault();
      this.open(this.sources[this.link.dataset.source]);
    });
    this.link.addEventListener("keydown", (event) => {
      if (!["Enter", " "].includes(event.key) || this.link.hasAttribute("href")) return;
      event.preventDefault(); // or the same key would press the panel's first button
      event.stopPropagation();
      this.link.click();
    });
    this.panel.querySelector("button").addEventListener("click", () => this.panel.close());
    this.panel.addEventListener("keydown", (event) => event.stopPropagation()); // its keys are not the timeline's
  }

  render(told) {
    const source = this.sources[told?.type];
    this.link.hidden = !source;
    if (!source || this.link.dataset.source === told.type) return;
    this.link.dataset.source = told.type;
    setText(this.link, `${source.name} · ${source.file.split("/").at(-1)}:${source.line}`);
    this.link.title = `${source.file}, line ${source.line}: the function that did it`;
    if (source.url) {
      this.link.href = source.url;
    } else {
      this.link.tabIndex = 0;
      this.link.setAttribute("role", "button");
    }
  }

  open({ name, file, line, text }) {
    setText(this.panel.querySelector("h2"), name);
    setText(this.panel.querySelector("small"), `${file}:${line}`);
    const lines = text.split("\n").map((words, i) => `${String(line + i).padStart(4)}  ${words}`);
    setText(this.panel.querySelector("pre"), lines.join("\n"));
    this.panel.showModal();
  }
}
