// The view of the experiments: a list of the papers' figures; for the chosen one its figure, and its numbers beside the
// paper's. The server measures in a separate process; a viewer starts an experiment, and all viewers see its progress.

import { PaperFigure, table } from "./experiment_result.js";
import { element, plural, setText } from "./names.js";
import { sync } from "./parts.js";

const EVERY = 700; // milliseconds between requests for the progress of a running experiment
const LATER = 4000; // milliseconds while none is running, in case another viewer starts one

export class Experiments {
  /** @type {CatalogueEntry} */
  chosen; // an exported page has no experiments, and nothing that reads this
  wake = () => {}; // ends the wait for the next poll

  // `may` says whether this page may start experiments at all.
  /** @param {HTMLElement} root @param {Send} send @param {CatalogueEntry[]} catalogue */
  constructor(root, send, catalogue, may = true) {
    this.root = root;
    this.send = send;
    this.may = may;
    this.catalogue = catalogue;
    this.looked = 0; // index of the shown result; the newest is first
    this.results = new Map(); // name -> {version, views}
    const part = (/** @type {string} */ name) => root.querySelector(`[data-part=exp-${name}]`);
    this.parts = Object.fromEntries(["list", "title", "figure", "quick", "full", "cancel", "run", "bar", "doing", "message",
      "which", "caption", "plot", "table", "notes", "none", "body"].map((name) => [name, part(name)]));
    this.figure = new PaperFigure(this.parts.plot);
    this.parts.quick.addEventListener("click", () => this.ask({ do: "experiment-run", name: this.chosen.name, quick: true }));
    this.parts.full.addEventListener("click", () => this.ask({ do: "experiment-run", name: this.chosen.name }));
    this.parts.cancel.addEventListener("click", () => this.ask({ do: "experiment-cancel" }));
    const nav = root.querySelector("[data-part=nav]");
    nav.addEventListener("click", () => this.open());
    nav.hidden = !catalogue.length; // an exported page has no server to run experiments
    new ResizeObserver(() => this.figure.resize()).observe(this.parts.plot);
    if (catalogue.length) this.choose(catalogue[0].name);
  }

  get shown() {
    return this.root.dataset.view === "experiments" && this.root.isConnected;
  }

  // Polls the server while this view is open.
  async open() {
    if (this.asking || !this.shown) return;
    this.asking = true;
    while (this.shown) {
      await this.refresh();
      const wait = this.state?.running ? EVERY : LATER;
      await new Promise((resolve) => {
        this.wake = () => resolve(null);
        setTimeout(resolve, wait);
      });
    }
    this.asking = false;
  }

  async refresh() {
    const answer = await this.send({ do: "experiments" }).catch(() => null);
    if (answer?.ok) this.state = answer.result;
    this.gone = !answer?.ok;
    const version = this.state?.results[this.chosen.name];
    if (version !== undefined && this.results.get(this.chosen.name)?.version !== version) await this.load(version);
    this.render();
  }

  /** @param {any} version */
  async load(version) {
    const { name } = this.chosen;
    const answer = await this.send({ do: "experiment", name }).catch(() => null);
    if (!answer?.ok) return;
    this.results.set(name, { version, views: answer.result });
    this.looked = 0;
  }

  /** @param {Command} command */
  async ask(command) {
    this.complaint = "";
    const answer = await this.send(command).catch(() => null);
    if (!answer?.ok) this.complaint = answer ? answer.message : "The server does not answer; is it still running?";
    await this.refresh();
    this.wake();
  }

  /** @param {string} name */
  choose(name) {
    this.chosen = this.catalogue.find((entry) => entry.name === name) ?? this.chosen;
    this.looked = 0;
    this.complaint = "";
    this.parts.body.scrollTop = 0;
    this.render();
    this.wake();
  }

  // --- drawing ---

  render() {
    const { parts, chosen, state } = this;
    this.renderList();
    setText(parts.title, chosen.title);
    setText(parts.figure, chosen.figure);
    setText(parts.full, `Run in full · about ${chosen.minutes} min`);
    const viewer = !this.may || this.root.dataset.role === "viewer";
    const running = state?.running;
    const here = running?.name === chosen.name;
    for (const button of [parts.quick, parts.full]) {
      button.hidden = viewer || here;
      button.disabled = Boolean(running) || !state;
      button.title = running ? "Another experiment is being measured; one at a time" : button.dataset.title;
    }
    parts.cancel.hidden = viewer || !here;
    parts.run.hidden = !here;
    if (here) this.renderRun(running);
    const words = this.words(viewer);
    setText(parts.message, words);
    parts.message.hidden = !words;
    parts.message.dataset.kind = this.complaint || this.failure ? "bad" : "";
    this.renderResult();
  }

  get failure() {
    const ended = this.state?.ended;
    if (ended?.name !== this.chosen.name) return "";
    return ended.cancelled ? "Cancelled before it was done." : `It failed: ${ended.message}`;
  }

  /** @param {boolean} viewer */
  words(viewer) {
    if (this.gone) return "The server does not answer.";
    if (this.complaint || this.failure) return this.complaint || this.failure;
    if (!viewer) return "";
    return this.may ? "Only the presenter starts experiments; you see what comes of them."
      : "A recording is shown here: start minipaged visualize without --replay to run experiments.";
  }

  renderList() {
    const { running, results = {} } = this.state ?? {};
    sync(this.parts.list, this.catalogue, ({ name }) => name, ({ name, title, figure, minutes }) => {
      const item = element("button", "mp-exp-item", null, { type: "button", "data-name": name, "data-testid": `exp-${name}` });
      element("b", "", item).textContent = title;
      element("small", "", item).textContent = `${figure} · ${minutes} min`;
      element("i", "", item);
      item.addEventListener("click", () => this.choose(name));
      return item;
    }, (item, { name }) => {
      const mark = running?.name === name ? "running" : name in results ? (results[name] ? "here" : "earlier") : "";
      item.setAttribute("aria-current", String(name === this.chosen.name));
      item.dataset.mark = mark;
      const says = mark === "running" ? `${percent(running)} %` : mark === "here" ? "measured" : mark;
      setText(item.lastChild, says);
      item.style.setProperty("--done", mark === "running" ? `${percent(running)}%` : "0%");
    });
  }

  /** @param {any} running */
  renderRun(running) {
    this.parts.bar.value = running.done;
    const time = running.seconds < 60 ? `${running.seconds} s` : `${Math.floor(running.seconds / 60)} min ${running.seconds % 60} s`;
    setText(this.parts.doing, `${percent(running)} % · ${running.text} · ${time}${running.quick ? " · quick run" : ""}`);
  }

  renderResult() {
    const { parts } = this;
    const views = this.results.get(this.chosen.name)?.views ?? [];
    const view = views[this.looked];
    parts.none.hidden = Boolean(view);
    setText(parts.none.firstChild, this.state?.running?.name === this.chosen.name ? "Being measured" : "Not measured yet");
    parts.body.hidden = !view;
    sync(parts.which, views, (one) => one.here, (one) => {
      const button = element("button", "", null, { type: "button", "data-testid": `exp-${one.here ? "here" : "earlier"}` });
      button.addEventListener("click", () => {
        this.looked = [...parts.which.children].indexOf(button);
        this.render();
      });
      return button;
    }, (button, one) => {
      setText(button, `${one.here ? "Measured here" : "Measured earlier"}, ${one.quick ? "quick run" : "full run"}`);
      button.setAttribute("aria-pressed", String(one === view));
    });
    if (!view) return;
    this.figure.show(view.figure);
    setText(parts.caption, view.figure.layout?.title?.text ?? "");
    if (view === this.told) return;
    this.told = view;
    table(parts.table, view.rows);
    this.renderNotes(view);
  }

  /** @param {any} view */
  renderNotes(view) {
    const duration = view.seconds < 90 ? plural(Math.round(view.seconds), "second") : `${Math.round(view.seconds / 60)} minutes`;
    const notes = [...view.assumed, `Measured in ${duration} on ${view.machine}.`];
    if (view.secondary) notes.unshift("* The paper's number is from a secondary source; the others were read in the paper.");
    this.parts.notes.replaceChildren(...notes.map((words) => Object.assign(element("li"), { textContent: words })));
  }
}

const percent = (/** @type {any} */ running) => Math.round(100 * (running?.done ?? 0));
