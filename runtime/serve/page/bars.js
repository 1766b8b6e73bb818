// Labels with their scores, as bars. A label keeps its row while it is shown, so nothing jumps.

import { element, percent, setText } from "./elements.js";

export const MOST = 8;

/** The labels that get a row: of few labels all, in their own order; of many the best. */
export function rowsOf(before, scores, labels) {
  if (labels.length <= MOST) return labels;
  const best = scores.slice(0, MOST).map(([label]) => label);
  const fresh = best.filter((label) => !before.includes(label));
  const kept = before.map((label) => (best.includes(label) ? label : fresh.shift()));
  return [...kept, ...fresh].filter((label) => label !== undefined);
}

export class Bars {
  constructor(list) {
    this.list = list;
    this.rows = new Map();
  }

  /** `labels` in the order of their rows, `scores` [[label, 0 to 1]...], `active` the labels that
   * are there now. */
  show(labels, scores, active = []) {
    if (labels.join("\n") !== [...this.rows.keys()].join("\n")) this.arrange(labels);
    const found = new Map(scores);
    for (const [label, row] of this.rows) {
      this.fill(row, found.get(label) ?? 0, active.includes(label));
    }
  }

  arrange(labels) {
    this.rows = new Map(labels.map((label) => [label, this.rows.get(label) ?? makeRow(label)]));
    this.list.replaceChildren(...[...this.rows.values()].map((row) => row.item));
  }

  fill(row, score, active) {
    row.bar.style.transform = `scaleX(${Math.min(1, Math.max(0, score))})`;
    setText(row.score, percent(score));
    row.item.classList.toggle("active", active);
    setText(row.said, active ? "active" : "");
  }
}

function makeRow(label) {
  const name = element("span", "label", label);
  name.title = label;
  const said = element("span", "hidden");
  const score = element("span", "number");
  const bar = element("span", "fill");
  const track = element("span", "track", bar);
  track.ariaHidden = "true";
  return { item: element("li", "", name, said, track, score), bar, score, said };
}
