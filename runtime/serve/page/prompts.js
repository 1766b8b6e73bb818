// The labels in use, as chips or as JSON; what is applied counts from the next frame on.

import { byId, element, setText } from "./elements.js";
import { compose, composeLong, parse } from "./label_set.js";
import { send } from "./send.js";

export class Prompts {
  constructor() {
    this.set = { labels: [], rest: {} };
    this.saved = "[]";
    this.names = []; // that are shown here
    this.told = []; // that the live connection told last
    const [form, entry, json] = [byId("prompts"), byId("entry"), byId("json")];
    form.onsubmit = (event) => this.submit(event);
    form.onkeydown = (event) => {
      if (event.key === "Enter" && event.ctrlKey) this.submit(event);
    };
    entry.onkeydown = (event) => this.key(event);
    entry.oninput = () => this.typed();
    entry.onpaste = (event) => this.pasted(event);
    json.oninput = () => this.mark();
    byId("advanced").onclick = () => this.toggle();
    byId("clear").onclick = () => this.clear();
    byId("chip-view").onclick = (event) => {
      if (!event.target.closest("button")) entry.focus();
    };
  }

  get asJson() {
    return !byId("json").hidden;
  }

  /** Whether what stands here is not what the server uses. */
  get changed() {
    if (!this.asJson) return byId("entry").value.trim() !== "" || this.text !== this.saved;
    try {
      return JSON.stringify(compose(parse(JSON.parse(this.text)))) !== this.saved;
    } catch {
      return true;
    }
  }

  /** What is sent: the JSON as it stands, for the server is the judge of it; or the chips' set. */
  get text() {
    return this.asJson ? byId("json").value : JSON.stringify(compose(this.set));
  }

  /** Takes the labels that the server uses now. Where that is news, maybe from another browser,
   * shows them; unless one is at work here. */
  seen(names) {
    if (same(names, this.told)) return;
    this.told = names;
    if (!this.busy && !same(names, this.names)) this.load();
  }

  async load() {
    const { body, error } = await send("GET", "/labels");
    if (error) this.say(error, true);
    else if (this.changed) this.say("The labels were changed elsewhere meanwhile.");
    else this.take(body);
  }

  take({ labels, set }) {
    byId("prompts").inert = false;
    this.names = labels;
    this.set = parse(set ?? labels, labels);
    this.saved = JSON.stringify(compose(this.set));
    byId("entry").value = "";
    this.show();
  }

  async submit(event) {
    event.preventDefault();
    if (!this.asJson) this.add(byId("entry").value);
    this.say("Applying…");
    this.busy = true;
    const { body, error } = await send("PUT", "/labels", this.text);
    this.busy = false;
    if (error) return this.say(error, true);
    this.take(body);
    this.say(body.labels.length === 1 ? "1 label in use" : `${body.labels.length} labels in use`);
  }

  key(event) {
    const empty = !byId("entry").value && this.set.labels.length;
    if (event.key === "Backspace" && empty && !event.repeat) this.remove(this.set.labels.at(-1));
  }

  /** A comma ends a label. */
  typed() {
    const { value } = byId("entry");
    const end = value.lastIndexOf(",");
    if (end < 0) return this.mark();
    this.add(value.slice(0, end));
    byId("entry").value = value.slice(end + 1).trimStart();
    this.mark();
  }

  /** Lines are labels too; a field of one line would join them. */
  pasted(event) {
    const text = event.clipboardData.getData("text");
    if (!/[\r\n]/.test(text.trim())) return;
    event.preventDefault();
    this.add(text);
  }

  add(text) {
    const known = this.set.labels.map(({ name }) => name);
    const names = text.split(/[,\r\n]/).map((name) => name.trim());
    for (const name of new Set(names)) {
      if (name && !known.includes(name)) this.set.labels.push({ name, groups: [], entry: null });
    }
    byId("entry").value = "";
    this.show();
  }

  remove(label) {
    this.set.labels = this.set.labels.filter((other) => other !== label);
    this.show();
    byId("entry").focus();
  }

  clear() {
    this.set = { labels: [], rest: {} };
    byId("entry").value = "";
    this.show();
    (this.asJson ? byId("json") : byId("entry")).focus();
  }

  /** Between chips and JSON: what was changed in one is in the other. */
  toggle() {
    if (!this.asJson) this.add(byId("entry").value);
    else if (!this.parsed()) return;
    const json = !this.asJson;
    byId("json").hidden = !json;
    byId("chip-view").hidden = json;
    byId("advanced").ariaPressed = String(json);
    this.show();
  }

  parsed() {
    try {
      this.set = parse(JSON.parse(byId("json").value));
      return true;
    } catch (error) {
      this.say(`Chips cannot show this: ${error.message}`, true);
      return false;
    }
  }

  show() {
    byId("chips").replaceChildren(...this.set.labels.map((label) => this.chip(label)));
    byId("json").value = JSON.stringify(composeLong(this.set), null, 2);
    this.mark();
  }

  chip(label) {
    const button = element("button", "", "×");
    button.type = "button";
    button.ariaLabel = `Remove ${label.name}`;
    button.onclick = () => this.remove(label);
    const name = element("span", "name", [...label.groups, label.name].join(" / "));
    const chip = element("li", "chip", name, button);
    chip.title = label.entry ? JSON.stringify(label.entry) : label.name;
    chip.classList.toggle("rich", label.entry !== null);
    return chip;
  }

  /** Says whether there is something to apply; what was said of the last try is over. */
  mark() {
    byId("apply").classList.toggle("ready", this.changed);
    this.say("");
  }

  say(text, wrong = false) {
    setText(byId("said"), text);
    byId("said").classList.toggle("wrong", wrong);
    byId("entry").ariaInvalid = byId("json").ariaInvalid = String(wrong);
  }
}

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
