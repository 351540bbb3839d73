// Recordings: parsing one (the JSON lines that minipaged.events.Recorder writes), choosing one, saving the current run,
// and exporting a run as a standalone page.

import { State, check } from "./reducer.js";
import { element, setText } from "./names.js";

const FORMAT = "minipaged-recording/1";
const LARGEST = 50e6; // characters; browsers cannot handle much more

// Parses a recording into records: one per step, or the events between two steps. It applies all events once, so that a
// recording that loads also plays. Throws an Error whose message names the line that is wrong.
/** @param {string} text */
export function parse(text) {
  if (text.length > LARGEST) throw new Error("it is larger than 50 MB");
  const lines = text.split("\n");
  if (lines.at(-1) === "") lines.pop();
  const state = new State();
  /** @type {EngineEvent[][]} */
  const records = [];
  let open = false; // whether the next event belongs to the last record
  lines.forEach((line, index) => {
    try {
      const event = JSON.parse(line);
      if (index === 0) {
        if (event?.format !== FORMAT) throw new Error(`its first line does not say ${FORMAT}`);
        return;
      }
      if ((index === 1) !== (event?.type === "engine_started")) throw new Error("a recording begins with one engine_started");
      state.apply(event);
      if (!open || event.type === "step_started" || event.type === "request_added") records.push([event]);
      else records[records.length - 1].push(event);
      open = !["engine_started", "step_finished"].includes(event.type);
      if (!open) check(state);
    } catch (error) {
      throw new Error(`line ${index + 1}: ${/** @type {Error} */ (error).message}`);
    }
  });
  if (!records.length) throw new Error("there is nothing in it");
  return records;
}

export class Recordings {
  /**
   * @param {HTMLElement} root
   * @param {any} server
   * @param {string[]} shipped
   * @param {{ load: (name: string, text: string, records: EngineEvent[][]) => void, leave: () => void, text: () => string | undefined }} page
   */
  // `shipped`: names of the server's recordings; `load(name, text, records)`, `leave()` and `text()` are the page's.
  constructor(root, server, shipped, { load, leave, text }) {
    this.root = root;
    this.server = server;
    this.load = load;
    this.text = text;
    this.menu = root.querySelector("[data-part=recordings]");
    this.notice = root.querySelector("[data-part=notice]");
    this.toggle = root.querySelector("[data-do=recordings]");
    const on = (/** @type {string} */ name, /** @type {() => void} */ action) =>
      root.querySelector(`[data-do=${name}]`).addEventListener("click", action);
    on("recordings", () => this.open(this.menu.hidden));
    on("leave", leave);
    on("save", () => this.save());
    on("export", () => this.export());
    root.querySelector("[data-part=trouble] button").addEventListener("click", () => this.complain(""));
    const file = this.menu.querySelector("input[type=file]");
    on("load", () => file.click());
    file.addEventListener("change", async () => {
      if (file.files[0]) this.show(file.files[0].name, await file.files[0].text());
      file.value = ""; // so that choosing the same file again is a change
    });
    const list = this.menu.querySelector("[data-part=shipped]");
    for (const name of shipped) {
      const button = element("button", "", list, { type: "button", "data-testid": "shipped" });
      button.textContent = `▶ ${name.replaceAll("-", " ")}`;
      button.addEventListener("click", () => this.fetch(name));
    }
    document.addEventListener("pointerdown", (/** @type {On<PointerEvent>} */ event) => {
      if (!event.target.closest("[data-part=recordings], [data-do=recordings]")) this.open(false);
    });
  }

  /** @param {boolean} open */
  open(open) {
    this.menu.hidden = !open;
    this.toggle.setAttribute("aria-expanded", String(open));
  }

  // Returns true if the recording plays; otherwise the page says why, and continues with what it showed before.
  /** @param {string} name @param {string} text */
  show(name, text) {
    this.open(false);
    try {
      this.load(name, text, parse(text));
    } catch (error) {
      return this.complain(`${name} is not a recording this page can play: ${/** @type {Error} */ (error).message}`);
    }
    this.complain("");
    return true;
  }

  /** @param {string} name */
  async fetch(name) {
    const answer = await this.server.recording({ name }).catch(() => null);
    if (answer?.ok) this.show(name, answer.text);
    else this.complain(answer?.message ?? "The server does not answer; is it still running?");
  }

  // The text of the shown recording, or of the live run as the server recorded it; null on failure.
  async current() {
    if (this.text()) return this.text();
    const answer = await this.server.recording({}).catch(() => null);
    if (!answer?.ok) this.complain(answer?.message ?? "The server does not answer; is it still running?");
    return answer?.ok ? answer.text : null;
  }

  async save() {
    const text = await this.current();
    if (text) download("minipaged-run.jsonl", text, "application/x-ndjson");
    this.open(false);
  }

  async export() {
    const [text, answer] = await Promise.all([this.current(), this.server.template({}).catch(() => null)]);
    if (!text) return;
    if (!answer?.html) return this.complain("This page cannot be exported again; save the run instead.");
    // Only "<" could end the script element, and JSON allows an escape for it.
    const data = JSON.stringify(text).replaceAll("<", "\\u003c").replaceAll("\u2028", "\\u2028").replaceAll("\u2029", "\\u2029");
    download("replay.html", answer.html.replace('"THE RECORDING"', () => data), "text/html");
    this.open(false);
  }

  /** @param {string} words */
  complain(words) {
    const node = this.root.querySelector("[data-part=trouble]");
    setText(node.querySelector("span"), words);
    node.hidden = !words;
    if (words) this.open(false);
    return !words;
  }
}

/** @param {string} name @param {string} text @param {string} type */
function download(name, text, type) {
  const link = element("a", "", document.body, { download: name });
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
