// The viewer's role in a classroom: only the presenter, who opened the page with the token that the server printed, may
// control the engine. Every command carries the token, and the server checks it; hiding the controls is no protection.

const KEPT = "minipaged-presenter";

export class Role {
  /** @param {HTMLElement} root @param {any} server @param {{ classroom?: boolean, replay?: any }} more */
  constructor(root, server, { classroom, replay }) {
    this.root = root;
    this.server = server;
    if (!classroom || replay) return;
    this.token = takeToken();
    this.show(false);
    this.ask();
  }

  async ask() {
    const answer = await this.send({ do: "role" }).catch(() => null);
    this.show(Boolean(answer?.ok && answer.result === "presenter"));
  }

  /** @param {boolean} presenter */
  show(presenter) {
    this.root.dataset.role = presenter ? "presenter" : "viewer";
    this.root.querySelector("[data-part=watching]").hidden = presenter;
  }

  /** @param {Command} command */
  send(command) {
    return this.server.command(this.token ? { ...command, token: this.token } : command);
  }
}

// Reads the token and removes it from the URL, so that a projector does not show it. This tab's storage keeps it.
function takeToken() {
  const url = new URL(location.href);
  const token = url.searchParams.get("presenter");
  if (token) {
    sessionStorage.setItem(KEPT, token);
    url.searchParams.delete("presenter");
    history.replaceState(history.state, "", url);
  }
  return sessionStorage.getItem(KEPT);
}
