// What one source has shown lately: labels' scores as curves, and when they were there as spans.

const STEP = 0.2; // seconds between the points of a curve
const LONGEST = 1800; // seconds that are kept
const ANEW = 5; // seconds back: the source began anew; less is a message that took longer
const GAP = 2; // seconds after which a label that comes back has a span of its own

export class Track {
  constructor() {
    this.clear();
  }

  clear() {
    this.start = this.end = null;
    this.curves = new Map(); // label: [[time, score]...]
    this.spans = []; // {label, start, end, rule}
  }

  /** Takes what the server remembers, in place of what is here. */
  load({ start, end, spans, curves }) {
    this.clear();
    if (end === null || !Object.keys(curves).length) return;
    [this.start, this.end] = [start, end];
    this.curves = new Map(Object.entries(curves));
    this.spans = spans.map((span) => ({ ...span, open: span.rule && span.open }));
  }

  /** Takes a source's part of a live message. */
  see({ time, scores, active }) {
    if (time === null || time === this.end) return;
    if (this.end !== null && time < this.end - ANEW) this.clear();
    if (this.end !== null && time < this.end) return;
    this.start ??= time;
    this.end = time;
    for (const [label, score] of scores) this.point(label, time, score);
    for (const label of active) this.extend(label, time);
    this.forget(time - LONGEST);
  }

  point(label, time, score) {
    const curve = this.curves.get(label) ?? [];
    this.curves.set(label, curve);
    const before = curve.at(-2);
    if (before && curve.at(-1)[0] - before[0] < STEP) curve.pop(); // the last one is always shown
    curve.push([time, score]);
  }

  extend(label, time) {
    const span = this.spans.findLast((span) => span.label === label && !span.rule);
    if (span && time - span.end < GAP && !span.over) span.end = time;
    else this.spans.push({ label, start: time, end: time, rule: false });
  }

  /** Takes an event, which knows better when a label began and ended. */
  event({ event, label, time, duration }) {
    const rule = event === "fired" || event === "cleared";
    const start = time - duration;
    const same = (span) => span.label === label && span.rule === rule && span.end >= start;
    let span = this.spans.findLast(same);
    if (!span) this.spans.push((span = { label, start, end: time, rule }));
    span.start = Math.min(span.start, start);
    span.over = event === "ended" || event === "cleared";
    span.end = span.over ? time : Math.max(span.end, time);
    span.open = rule && !span.over; // of rules only events tell
  }

  forget(before) {
    if (this.start >= before - 60) return; // now and then is enough
    this.start = before;
    this.spans = this.spans.filter((span) => span.open || span.end >= before);
    for (const [label, curve] of this.curves) {
      const first = curve.findIndex(([time]) => time >= before);
      if (first < 0) this.curves.delete(label);
      else curve.splice(0, first);
    }
  }

  /** The rows for the time since `from`: labels by how long they were there, then by their highest
   * score; at most `most`, in the order of `labels`, rules last. */
  rows(from, labels, most) {
    const rows = new Map();
    for (const { label, rule, start, end, open } of this.spans) {
      if (!open && end < from) continue;
      const row = { label, rule, weight: (open ? this.end : end) - Math.max(start, from) + 1 };
      const key = JSON.stringify([label, rule]);
      row.weight += rows.get(key)?.weight ?? 0;
      rows.set(key, row);
    }
    for (const [label, curve] of this.curves) {
      const key = JSON.stringify([label, false]);
      if (!rows.has(key)) rows.set(key, { label, rule: false, weight: highest(curve, from) });
    }
    const best = [...rows.values()].sort((one, other) => other.weight - one.weight);
    const place = ({ label, rule }) => (rule ? Infinity : (labels.indexOf(label) + 1 || 1e6));
    return best.slice(0, most).sort((one, other) => place(one) - place(other) || 0);
  }
}

function highest(curve, from) {
  let found = -1;
  for (const [time, score] of curve) if (time >= from && score > found) found = score;
  return found;
}
