// The live connection: asks for what is new, one request at a time, and comes back when it is lost.

const SHORTEST = 40; // ms between requests: 25 pictures a second are enough for eyes
const PATIENCE = 8000; // ms without an answer: the server answers each request within 2 s
const WAITS = [500, 1000, 2000, 4000, 8000]; // ms before it is tried again, then the last one

/**
 * `ask()` gives the next request; `answer(message, pictures)` is called with each answer, its
 * pictures being a Map of source index to Blob, and the next request waits until it is done.
 * `tell(state, wait)` hears "live"; "paused", for a page that nobody sees asks for nothing; and
 * "lost" with the ms until the next attempt.
 */
export class Connection {
  constructor({ ask, answer, tell }) {
    Object.assign(this, { ask, answer, tell });
    this.failures = 0;
    document.addEventListener("visibilitychange", () => this.turned());
    addEventListener("online", () => this.retry());
    this.turned();
  }

  /** Shown or hidden. */
  turned() {
    if (!document.hidden) return this.retry();
    this.close();
    this.tell("paused");
  }

  open() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}/live`);
    socket.binaryType = "blob";
    socket.onopen = () => socket === this.socket && this.request();
    socket.onmessage = ({ data }) => socket === this.socket && this.take(data);
    socket.onclose = () => socket === this.socket && this.lost();
    this.socket = socket;
    this.message = null;
    this.expect();
  }

  request() {
    this.sent = performance.now();
    this.socket.send(JSON.stringify(this.ask()));
    this.expect();
  }

  expect() {
    clearTimeout(this.silence);
    this.silence = setTimeout(() => this.lost(), PATIENCE);
  }

  /** A text message, then as many pictures as it lists. */
  take(data) {
    if (typeof data === "string") {
      this.message = JSON.parse(data);
      this.pictures = new Map();
    } else if (this.message) {
      this.pictures.set(this.message.pictures[this.pictures.size], data);
    }
    if (this.message && this.pictures.size === this.message.pictures.length) this.done();
  }

  async done() {
    const [socket, message] = [this.socket, this.message];
    this.message = null;
    this.failures = 0;
    this.tell("live");
    await this.answer(message, this.pictures);
    const rest = Math.max(0, this.sent + SHORTEST - performance.now());
    setTimeout(() => socket === this.socket && this.request(), rest);
  }

  close() {
    const socket = this.socket;
    this.socket = null;
    socket?.close();
    clearTimeout(this.silence);
    clearTimeout(this.later);
  }

  lost() {
    this.close();
    const wait = WAITS[Math.min(this.failures, WAITS.length - 1)];
    this.failures += 1;
    this.later = setTimeout(() => this.open(), wait);
    this.tell("lost", wait);
  }

  /** Tries at once, where it would wait. */
  retry() {
    if (this.socket) return;
    clearTimeout(this.later);
    this.open();
  }
}
