// Who may control the engine. In a classroom only the presenter, who has opened the page with the token that the
// server printed; it goes along with every command, and the server checks it. Hiding the controls is mere courtesy.

const KEPT = "minipaged-presenter";

export class Role {
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

  show(presenter) {
    this.root.dataset.role = presenter ? "presenter" : "viewer";
    this.root.querySelector("[data-part=watching]").hidden = presenter;
  }

  send(command) {
    return this.server.command(this.token ? { ...command, token: this.token } : command);
  }
}

// From the address, once: it is not to be seen on the wall. This tab remembers it.
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
