// The page of `edgeclip serve`: wires the live connection to what shows it.

import { Bars, rowsOf } from "./bars.js";
import { Classify } from "./classify.js";
import { Connection } from "./connection.js";
import { byId, percent, setText } from "./elements.js";
import { Events } from "./events.js";
import { Prompts } from "./prompts.js";
import { send } from "./send.js";
import { Stage } from "./stage.js";
import { Timeline } from "./timeline.js";
import { Track } from "./track.js";

const TILES = 1000; // ms between pictures of the sources that are not chosen
const CALM = 200; // ms between scores: bars glide as long

const stage = new Stage(choose);
const bars = new Bars(byId("bars"));
const prompts = new Prompts();
const events = new Events();
const timeline = new Timeline();
new Classify();

let sources = [];
let labels = [];
let chosen = 0;
let rows = [];
let state = ""; // of the connection
let behind = true; // what is not told live is still to be had
let asked = -Infinity; // when all pictures were asked for
let scored = -Infinity;
const tracks = new Map(); // by source numbers

function ask() {
  const now = performance.now();
  const all = now - asked >= TILES;
  if (all) asked = now;
  const next = all ? sources.map((_, index) => index) : [chosen];
  return { next: sources.length ? next : [], width: stage.width };
}

async function answer(message, pictures) {
  ({ sources, labels } = message);
  prompts.seen(labels);
  events.add(message.events, sources.length > 1);
  sources.forEach((source, index) => trackOf(index).see(source));
  for (const event of message.events) {
    const index = sources.findIndex(({ source }) => source === event.source);
    if (index >= 0) trackOf(index).event(event);
  }
  show();
  if (behind) catchUp();
  await stage.draw(pictures);
}

function show() {
  const source = sources[chosen];
  stage.show(sources, chosen);
  document.body.classList.toggle("no-source", !source);
  if (!source) return;
  timeline.show(trackOf(chosen), labels, source.state === "live");
  const now = performance.now();
  if (now - scored < CALM) return;
  scored = now;
  scores(source);
}

/** The labels' bars, and over them the label that scores best lately; `unknown` plainly so. */
function scores({ scores, active, unknown }) {
  rows = rowsOf(rows, scores, labels);
  bars.show(rows, scores, active);
  const left = labels.length > rows.length;
  setText(byId("count"), left ? `best ${rows.length} of ${labels.length}` : "");
  const [label, score] = scores[0] ?? ["–", null];
  byId("verdict").classList.toggle("unknown", Boolean(unknown));
  setText(byId("verdict-label"), unknown ? "unknown" : label);
  byId("verdict-label").title = unknown ? `nearest: ${label}` : label;
  setText(byId("verdict-score"), score === null || unknown ? "" : percent(score));
}

function trackOf(index) {
  if (!tracks.has(index)) tracks.set(index, new Track());
  return tracks.get(index);
}

function choose(index) {
  chosen = index;
  rows = [];
  scored = asked = -Infinity;
  show();
  stage.turn(index);
}

/** The connection's state: said where it changes. */
function tell(now, wait) {
  if (now === "lost") explain(wait);
  if (now === state) return;
  state = now;
  behind = now !== "live";
  const text = { live: "Connected", paused: "Paused", lost: "Disconnected" };
  setText(byId("link-text"), text[now]);
  byId("link").dataset.state = now;
  byId("lost").hidden = now !== "lost";
  document.body.classList.toggle("off", now === "lost"); // what is shown is old
  if (now === "live") begin();
}

/** Says why there is no connection: the server does not answer, or refuses. */
async function explain(wait) {
  const { error } = await send("GET", "/info");
  const again = `Trying again in ${wait < 1000 ? "a moment" : `${wait / 1000} s`}.`;
  setText(byId("lost-text"), `${error ?? "The connection was lost."} ${again}`);
}

/** A connection begins, maybe with a server that was started anew. */
function begin() {
  behind = true;
  events.forget();
  about();
}

/** What the sources showed until now. */
async function catchUp() {
  behind = false;
  for (const index of sources.keys()) {
    const { body } = await send("GET", `/sources/${index}/history`);
    if (body) trackOf(index).load(body);
  }
}

async function about() {
  const { body } = await send("GET", "/info");
  if (!body) return;
  const parts = [body.model, body.backend, body.precision, `v${body.version}`];
  setText(byId("about"), parts.filter((part) => part).join(" · "));
  byId("about").title = body.bundle;
  document.title = `${body.model ?? "edgeclip"} – edgeclip`;
}

const connection = new Connection({ ask, answer, tell });
byId("retry").onclick = () => connection.retry();
