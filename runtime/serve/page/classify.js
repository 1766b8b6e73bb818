// Classifies a picture that is dropped, chosen or pasted.

import { Bars } from "./bars.js";
import { byId, percent, setText } from "./elements.js";
import { send } from "./send.js";

const TOP = 5;

export class Classify {
  constructor() {
    this.bars = new Bars(byId("try-bars"));
    const [drop, file] = [byId("drop"), byId("file")];
    byId("choose").onclick = () => file.click();
    file.onchange = () => {
      if (file.files.length) this.take(file.files[0]);
      file.value = ""; // so that the same file may be chosen again
    };
    drop.ondragover = (event) => this.over(event, true);
    drop.ondragleave = (event) => this.over(event, false);
    drop.ondrop = (event) => {
      this.over(event, false);
      if (event.dataTransfer.files.length) this.take(event.dataTransfer.files[0]);
    };
    // A picture that misses the field must not replace the page.
    for (const kind of ["dragover", "drop"]) {
      addEventListener(kind, (event) => event.preventDefault());
    }
  }

  over(event, on) {
    event.preventDefault();
    byId("drop").classList.toggle("over", on);
  }

  async take(file) {
    this.say("Classifying…");
    this.preview(file);
    const sent = performance.now();
    const address = `/classify?top=${TOP}`;
    const { body, error } = await send("POST", address, file, "application/octet-stream");
    if (error) return this.fail(file, error);
    setText(byId("try-time"), `${Math.round(performance.now() - sent)} ms`);
    const sure = body.unknown ? "unknown; nearest " : "";
    this.say(`${sure}${body.label}, ${percent(body.score)}`);
    this.bars.show(body.top.map(([label]) => label), body.top, body.unknown ? [] : [body.label]);
    byId("try-bars").hidden = false;
  }

  fail(file, error) {
    setText(byId("try-time"), "");
    byId("try-bars").hidden = true;
    byId("try-picture").hidden = true;
    this.say(`${file.name}: ${error}`, true);
  }

  say(text, wrong = false) {
    const said = byId("try-said");
    const choose = byId("choose");
    const focused = document.activeElement === choose;
    said.classList.toggle("wrong", wrong);
    choose.textContent = "choose another";
    said.replaceChildren(text, " ", choose);
    if (focused) choose.focus();
  }

  preview(file) {
    const image = byId("try-picture");
    const url = URL.createObjectURL(file);
    image.onload = () => URL.revokeObjectURL(url);
    image.onerror = () => {
      URL.revokeObjectURL(url);
      image.hidden = true; // the browser cannot show it; the server may read it all the same
    };
    image.src = url;
    image.hidden = false;
  }
}
