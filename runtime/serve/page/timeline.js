// Labels over time: a row each, its score as a curve, and as a bar when it was there.

import { byId, duration } from "./elements.js";

const CALM = 250; // ms between pictures
const LEAST = 10; // seconds across
const STEPS = [2, 5, 10, 15, 30, 60, 120, 300, 600];
const MOST_ROWS = 6;
const FOOT = 22;

export class Timeline {
  constructor() {
    this.canvas = byId("timeline");
    this.drawn = -Infinity;
    byId("spans").onchange = () => this.draw();
    addEventListener("resize", () => this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  get longest() {
    return Number(byId("spans").querySelector(":checked").value);
  }

  /** Shows a track, at most some times a second. `live`: its end is now. */
  show(track, labels, live) {
    const other = track !== this.track;
    Object.assign(this, { track, labels, live });
    if (other || performance.now() - this.drawn >= CALM) this.draw();
  }

  draw() {
    this.drawn = performance.now();
    const context = this.fit();
    if (!this.track || this.track.end === null) return this.empty(context);
    const { start, end } = this.track;
    this.seconds = Math.max(LEAST, Math.min(this.longest, end - start));
    const rows = this.track.rows(end - this.seconds, this.labels, MOST_ROWS);
    this.axis(context, rows.length);
    const height = this.height(rows.length);
    rows.forEach((row, index) => this.row(context, row, index * height, height));
    this.describe(rows);
  }

  /** The canvas at the size it has on the screen, cleared; and the colours of the page. */
  fit() {
    const { clientWidth, clientHeight } = this.canvas;
    const ratio = devicePixelRatio;
    this.canvas.width = Math.round(clientWidth * ratio);
    this.canvas.height = Math.round(clientHeight * ratio);
    const style = getComputedStyle(this.canvas);
    this.color = (name) => style.getPropertyValue(`--${name}`);
    this.left = Math.min(168, Math.round(clientWidth * 0.3));
    [this.right, this.bottom] = [clientWidth - 16, clientHeight - FOOT];
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.font = `13px ${style.fontFamily}`;
    context.textBaseline = "middle";
    return context;
  }

  height(rows) {
    return Math.min(40, this.bottom / Math.max(1, rows));
  }

  x(time) {
    const share = 1 - (this.track.end - time) / this.seconds;
    return this.left + Math.min(1, Math.max(0, share)) * (this.right - this.left);
  }

  empty(context) {
    context.fillStyle = this.color("pale");
    context.textAlign = "center";
    const text = "Grows with the first frames";
    context.fillText(text, this.canvas.clientWidth / 2, this.canvas.clientHeight / 2);
  }

  axis(context, rows) {
    const room = this.right - this.left;
    const step = STEPS.find((step) => (step / this.seconds) * room >= 72) ?? STEPS.at(-1);
    const floor = rows * this.height(rows);
    context.lineWidth = 1;
    for (let ago = 0; ago <= this.seconds; ago += step) {
      const x = Math.round(this.x(this.track.end - ago)) - 0.5;
      context.strokeStyle = this.color("line");
      context.beginPath();
      context.moveTo(x, 0);
      context.lineTo(x, floor + 4);
      context.stroke();
      context.fillStyle = this.color("pale");
      context.textAlign = ago ? "center" : "right";
      const text = ago ? `−${clock(ago)}` : this.live ? "now" : "end";
      context.fillText(text, ago ? x : x + 6, floor + 13);
    }
  }

  row(context, { label, rule }, top, height) {
    const spans = this.track.spans.filter((span) => span.label === label && span.rule === rule);
    context.textAlign = "left";
    context.fillStyle = this.color(spans.length ? "ink" : "pale");
    context.fillText(shortened(context, label, this.left - 16), 0, top + height / 2);
    const floor = top + height - 3;
    if (!rule) this.curve(context, this.track.curves.get(label) ?? [], top + 3, floor);
    context.fillStyle = this.color(rule ? "ink" : "accent");
    for (const span of spans) this.bar(context, span, floor);
  }

  curve(context, points, top, floor) {
    const from = this.track.end - this.seconds;
    const shown = points.filter(([time]) => time >= from);
    if (shown.length < 2) return;
    context.beginPath();
    context.moveTo(this.x(shown[0][0]), floor);
    for (const [time, score] of shown) context.lineTo(this.x(time), floor - score * (floor - top));
    context.lineTo(this.x(shown.at(-1)[0]), floor);
    context.fillStyle = this.color("wash");
    context.fill();
  }

  bar(context, { start, end, open }, floor) {
    const [from, to] = [this.x(start), this.x(open ? this.track.end : end)];
    if (to <= this.left) return;
    context.beginPath();
    context.roundRect(from, floor - 5, Math.max(3, to - from), 5, 2);
    context.fill();
  }

  /** The same in words. */
  describe(rows) {
    const there = rows.filter((row) => row.weight > 1).map((row) => row.label);
    const text = `The last ${duration(this.seconds)}: ${there.join(", ") || "no label was there"}`;
    if (this.canvas.ariaLabel !== text) this.canvas.ariaLabel = text;
  }
}

/** 45 as "45 s", 90 as "1:30". */
function clock(seconds) {
  if (seconds < 60) return `${seconds} s`;
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}

function shortened(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  let end = text.length;
  while (end > 1 && context.measureText(`${text.slice(0, end)}…`).width > room) end -= 1;
  return `${text.slice(0, end)}…`;
}
