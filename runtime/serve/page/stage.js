// The chosen source's picture with its state and figures, and a tile for each source to choose by.

import { byId, element, setText, shortName } from "./elements.js";

const CALM = 250; // ms between changes of figures
const WIDTHS = [320, 640, 960, 1280]; // few, so that browsers share what the server encodes
const NOTICES = {
  connecting: "Waiting for the first frame",
  stalled: "No new frames",
  lost: "Camera lost; trying again",
};

export class Stage {
  /** `choose(index)` hears which source was chosen. */
  constructor(choose) {
    this.choose = choose;
    this.tiles = [];
    this.latest = new Map(); // the newest JPEG by source number
    this.figured = -Infinity;
  }

  /** The width in pixels that its pictures should have. */
  get width() {
    const wanted = byId("picture").clientWidth * devicePixelRatio;
    return WIDTHS.find((width) => width >= wanted) ?? WIDTHS.at(-1);
  }

  /** Shows the sources of a message, and `chosen` in full. */
  show(sources, chosen) {
    if (sources.length !== this.tiles.length) this.makeTiles(sources.length);
    sources.forEach((source, index) => this.fillTile(source, this.tiles[index], index === chosen));
    this.chosen = chosen;
    const source = sources[chosen];
    if (!source) return this.empty();
    setText(byId("stage-name"), shortName(source.source));
    byId("stage-name").title = source.source;
    byId("state").dataset.state = source.state;
    byId("state").title = source.reason;
    this.notice(source);
    this.figures(source);
  }

  empty() {
    setText(byId("stage-name"), "No camera");
    setText(byId("state"), "Start edgeclip serve with --source to see one here.");
  }

  notice(source) {
    const text = NOTICES[source.state] ?? "No picture yet";
    const shown = !this.latest.has(source.index) || source.state in NOTICES;
    byId("notice").hidden = !shown;
    byId("picture").classList.toggle("dim", shown);
    const why = source.reason ? `: ${source.reason}` : "";
    setText(byId("notice"), shown ? text + why : "");
    setText(byId("state"), shown ? source.state : source.state + why);
    byId("screen").ariaLabel = `Picture of ${source.source}`;
  }

  figures(source) {
    const now = performance.now();
    if (now - this.figured < CALM) return;
    this.figured = now;
    setText(byId("fps"), source.fps ? source.fps.toFixed(1) : "–");
    const ms = source.p50_ms;
    setText(byId("age"), ms ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : "–");
    setText(byId("dropped"), source.dropped.toLocaleString());
  }

  /** Draws pictures, a Map of source index to JPEG; resolves when they are on the screen. */
  async draw(pictures) {
    for (const [index, jpeg] of pictures) {
      const bitmap = await createImageBitmap(jpeg).catch(() => null); // broken: wait for the next
      if (!bitmap) continue;
      this.latest.set(index, jpeg);
      if (index === this.chosen) paint(byId("screen"), bitmap, bitmap.width);
      if (this.tiles[index]) paint(this.tiles[index].canvas, bitmap, 320);
      bitmap.close();
    }
  }

  /** Another source is chosen: shows what it showed last, for it may have ended. */
  turn(index) {
    this.figured = -Infinity;
    const jpeg = this.latest.get(index);
    if (jpeg) return this.draw(new Map([[index, jpeg]]));
    byId("screen").width = byId("screen").height = 1; // empty
  }

  makeTiles(count) {
    this.tiles = Array.from({ length: count }, (_, index) => makeTile(() => this.choose(index)));
    byId("tiles").replaceChildren(...this.tiles.map((tile) => tile.button));
    byId("tiles").hidden = count < 2;
  }

  fillTile(source, tile, chosen) {
    setText(tile.name, shortName(source.source));
    setText(tile.label, source.state === "live" ? (source.active[0] ?? "") : source.state);
    tile.button.title = source.source;
    tile.button.dataset.state = source.state;
    tile.button.ariaPressed = String(chosen);
  }
}

function makeTile(choose) {
  const canvas = element("canvas");
  const [name, label] = [element("span", "name"), element("span", "label")];
  const dot = element("span", "dot");
  const button = element("button", "tile", canvas, element("span", "line", dot, name), label);
  canvas.ariaHidden = dot.ariaHidden = "true";
  button.type = "button";
  button.onclick = choose;
  return { button, canvas, name, label };
}

function paint(canvas, bitmap, width) {
  const height = Math.round((bitmap.height * width) / bitmap.width);
  if (canvas.width !== width || canvas.height !== height) {
    [canvas.width, canvas.height] = [width, height];
  }
  canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
}
