// How the page makes and fills elements. Text goes in as text, never as HTML.

/** The element of the page with this id. */
export const byId = (id) => document.getElementById(id);

/** A new element; `children` are elements or texts. */
export function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** Sets a text where it is another, so that screen readers and layout rest. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** A source's name where room is scarce: of a file its name, of an address all but the scheme. */
export const shortName = (source) =>
  source.includes("://") ? source.split("://")[1] : source.split("/").findLast((part) => part);

/** 0.873 as "87 %". */
export const percent = (score) => `${Math.round(score * 100)} %`;

/** Seconds as "0.8 s", "12 s", "3:05 min" or "2:03:05 h". */
export function duration(seconds) {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  const two = (number) => String(number).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  const rest = two(whole % 60);
  return hours ? `${hours}:${two(minutes)}:${rest} h` : `${minutes}:${rest} min`;
}
