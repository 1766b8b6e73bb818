// The last events: what came and went, with a small picture and the time.

import { byId, duration, element, percent, shortName } from "./elements.js";

const MOST = 40;
const WORDS = { started: "began", ended: "ended", fired: "rule fired", cleared: "rule cleared" };

export class Events {
  constructor() {
    this.rows = new Map();
  }

  /** Adds events, each once, in any order. `several`: their source is named. */
  add(events, several) {
    const fresh = events.filter((event) => !this.rows.has(event.id));
    if (!fresh.length) return;
    for (const event of fresh) this.rows.set(event.id, makeRow(event, several));
    const newest = [...this.rows].sort(([one], [other]) => other - one).slice(0, MOST);
    this.rows = new Map(newest);
    this.show();
  }

  /** For a server that was started anew: it counts from the beginning. */
  forget() {
    this.rows.clear();
    this.show();
  }

  show() {
    const list = byId("events");
    list.replaceChildren(...this.rows.values());
    list.hidden = this.rows.size === 0;
    byId("no-events").hidden = this.rows.size > 0;
  }
}

function makeRow(event, several) {
  const label = element("span", "label", event.label);
  label.title = event.label;
  const words = element("span", "words", sentence(event, several));
  words.title = words.textContent;
  const what = element("div", "what", label, words);
  return element("li", event.event, picture(event), what, clock(event));
}

function sentence(event, several) {
  const over = event.event === "ended" || event.event === "cleared";
  const time = over ? ` after ${duration(event.duration)}` : "";
  const score = event.score === undefined ? "" : `, ${percent(event.score)}`;
  return `${WORDS[event.event]}${time}${score}${several ? ` · ${shortName(event.source)}` : ""}`;
}

function clock(event) {
  const when = new Date(event.wall * 1000);
  const time = element("time", "number", when.toLocaleTimeString([], { hour12: false }));
  time.dateTime = when.toISOString();
  return time;
}

/** The thumbnail, or an empty place of its size. */
function picture(event) {
  if (!event.thumbnail) return element("span", "thumb");
  const image = element("img", "thumb");
  image.alt = "";
  const bytes = Uint8Array.from(atob(event.thumbnail), (letter) => letter.charCodeAt(0));
  image.src = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
  image.onload = image.onerror = () => URL.revokeObjectURL(image.src);
  return image;
}
